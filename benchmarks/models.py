"""Models with random weights and the steps that the benchmarks measure. Vision features are given, as if cached."""

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPVisionConfig,
    LlamaConfig,
    TimmWrapperConfig,
)

from configuration_evlgen import EVLGenConfig, TomeFormerConfig
from modeling_evlgen import EVLGenForConditionalGeneration, TomeFormerModel, limit_logits

Step = Callable[[], Any]
CROWDED_RECIPE = Path(__file__).parents[1] / "examples" / "configs" / "crowded.yaml"
BATCH, PROMPT, CAPTION = 16, 10, 10  # images of a batch, and tokens of their texts
SMOLLM2_135M = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
    pad_token_id=2,
)
LITE0 = TimmWrapperConfig(architecture="tf_efficientnet_lite0", model_args={"features_only": True, "out_indices": [3]})
DEMO_VISION = {"vision_config": LITE0, "num_vision_tokens": 196, "vision_hidden_size": 112}
CLIP_L = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)
# The demo's connector starts as merging alone, and its output has positions.
START = {"pre_norm": True, "branch_initializer_range": 0.0, "output_position_initializer_range": 1.0}


def encoder_fields(hidden_size: int, layers: int) -> dict[str, Any]:
    """Configuration fields that the TomeFormer and the Q-Former share: a BERT without dropout."""
    return {
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def candidates(
    vision: dict[str, Any],
    hidden_size: int,
    layers: int,
    front_loaded: list[int],
    r: int,
    queries: int,
    text: LlamaConfig = SMOLLM2_135M,
) -> dict[str, EVLGenConfig]:
    """Configurations of models whose connectors have about as many parameters. Times are relative to the first."""
    encoder = encoder_fields(hidden_size, layers)
    qformer = {"model_type": "evlgen_qformer", "intermediate_size": 8 * hidden_size // 3, "num_query_tokens": queries}
    mlp = {"model_type": "evlgen_mlp", "hidden_size": hidden_size, "intermediate_size": 6 * layers * hidden_size}
    connectors = {
        "EVLGen, front-loaded": {**encoder, **START, "merge_metric": "hidden_states", "merge_r": front_loaded},
        f"EVLGen, r = {r}": {**encoder, "merge_r": r},
        f"Q-Former, {queries} queries": {**encoder, **qformer},
        "MLP on 5 x 5 means": {**mlp, "pool_size": 5},
        "MLP on all tokens": mlp,
    }
    class_token = isinstance(vision["vision_config"], CLIPVisionConfig)
    return {
        name: EVLGenConfig(**vision, connector_config={**fields, "class_token": class_token}, text_config=text)
        for name, fields in connectors.items()
    }


SIZES = {
    "demo": candidates(DEMO_VISION, hidden_size=384, layers=3, front_loaded=[98, 49, 24], r=57, queries=25),
    "clip-l": candidates(
        {"vision_config": CLIP_L}, hidden_size=768, layers=6, front_loaded=[128, 64, 32, 4], r=38, queries=29
    ),
}


def build(config: EVLGenConfig) -> EVLGenForConditionalGeneration:
    """Returns a model with random weights, in training mode."""
    torch.manual_seed(0)
    return EVLGenForConditionalGeneration(config).train()


def random_batch(
    model: EVLGenForConditionalGeneration,
    images: int = BATCH,
    texts: int = 1,
    prefix: int = 0,
    prompt: int = PROMPT,
    answer: int = CAPTION,
    shared: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns random vision features with texts of each image: in one row if `shared`, else each in its own.

    The texts of an image have `prefix` tokens alike behind it, then `prompt` tokens each, then `answer` ones to learn.
    """
    config = model.config
    rows, per_row = (images, texts) if shared else (images * texts, 1)
    prefix_ids = torch.full((rows, config.num_image_tokens + prefix), 3)
    prefix_ids[:, : config.num_image_tokens] = config.image_token_id
    text = torch.randint(3, config.text_config.vocab_size, (rows, per_row, prompt + answer))
    answers = text.where(torch.arange(prompt + answer) >= prompt, -100)
    batch = {
        "vision_features": torch.randn(rows, config.num_vision_tokens, config.vision_hidden_size),
        "input_ids": torch.cat([prefix_ids, text.flatten(1)], dim=1),  # (rows, prefix + texts)
        "labels": torch.cat([torch.full_like(prefix_ids, -100), answers.flatten(1)], dim=1),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if shared:
        numbers = torch.arange(1, texts + 1).repeat_interleave(prompt + answer).expand(rows, -1)
        batch["segment_ids"] = torch.cat([torch.zeros_like(prefix_ids), numbers], dim=1)
    return batch


def training_step(model: torch.nn.Module, batches: Iterator[dict[str, Any]]) -> Step:
    """Returns a whole training step on the next batch. Its learning rate is small: the model hardly changes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**limit_logits(next(batches)))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_step(model: EVLGenForConditionalGeneration) -> Step:
    """Returns a whole training step on a random batch."""
    return training_step(model, repeat(random_batch(model)))


def generation(model: EVLGenForConditionalGeneration) -> Step:
    """Returns the generation of captions of exactly 10 tokens for 8 images, with 5 beams."""
    batch = random_batch(model, 8)
    inputs = {name: batch[name][:, :-CAPTION] for name in ("input_ids", "attention_mask")}
    settings = {"num_beams": 5, "do_sample": False, "min_new_tokens": CAPTION, "max_new_tokens": CAPTION}

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def generate() -> None:
        model.eval()
        model.generate(vision_features=batch["vision_features"], **inputs, **settings)
        model.train()

    return generate


def share_towers(models: list[EVLGenForConditionalGeneration]) -> None:
    """Gives all models the frozen towers of the first, so that no candidate gains from its place in memory."""
    for model in models[1:]:
        model.vision_tower, model.language_model = models[0].vision_tower, models[0].language_model


BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
EVA_WIDTH, QUERIES = 1408, 32


class Connector(nn.Module):
    """A TomeFormer, a BERT or a Q-Former on vision tokens of width 1408."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.projection = nn.Linear(EVA_WIDTH, encoder.config.hidden_size)
        self.queries = nn.Parameter(torch.zeros(1, QUERIES, encoder.config.hidden_size))
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if isinstance(self.encoder, Blip2QFormerModel):
            queries = self.queries.expand(len(tokens), -1, -1)  # (batch, queries, dim)
            return self.encoder(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        return self.encoder(inputs_embeds=self.projection(tokens)).last_hidden_state


def bert_base_connectors(num_tokens: int, front_loaded: list[int]) -> dict[str, Connector]:
    """Connectors of BERT-base's size for `num_tokens` vision tokens. Times are relative to those of the first."""
    fields = {**BERT_BASE, "max_position_embeddings": num_tokens}
    qformer = Blip2QFormerConfig(encoder_hidden_size=EVA_WIDTH, **BERT_BASE)
    encoders = {
        "TomeFormer, r = 19": TomeFormerModel(TomeFormerConfig(**fields, merge_r=19)),
        "TomeFormer, front-loaded": TomeFormerModel(TomeFormerConfig(**fields, merge_r=front_loaded)),
        f"Q-Former, {QUERIES} queries": Blip2QFormerModel(qformer),
        "BERT, no merging": BertModel(BertConfig(**fields, vocab_size=2), add_pooling_layer=False),
    }
    return {name: Connector(encoder).eval() for name, encoder in encoders.items()}


def forward_and_backward(model: nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    model(tokens).sum().backward()
