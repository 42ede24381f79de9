"""Compares training steps and generation of EVLGen, the Q-Former and MLPs on the same frozen towers.

    python -m benchmarks.training_step

Two sizes are measured: the demo's (196 tokens of EfficientNet-Lite0) and that of CLIP ViT-L/14 (257 tokens). Both have
a language model of SmolLM2-135M's shape, random weights, batches of 16, bfloat16 autocast and cached vision features.
Candidates share the frozen towers and take turns. Times are medians. Peak memory is measured in new processes. The
GEMM rate compares the operations per second of a step with those of one large matrix product.

`--what steps` measures instead how much each of several changes saves of EVLGen's step.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, TimmWrapperConfig

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits

from .timing import argument_parser, count_flops, in_new_process, markdown_table, peak_megabytes, take_turns

BATCH, PROMPT, CAPTION = 16, 10, 10
BEAMS, GENERATION_BATCH = 5, 8
SQUARE = 4096  # side of the large matrices
TEXT = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
    pad_token_id=2,
)
Step = Callable[[], None]


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
    vision: dict[str, Any], hidden_size: int, layers: int, front_loaded: list[int], r: int, queries: int
) -> dict[str, EVLGenConfig]:
    """Configurations of models whose connectors have about as many parameters. Times are relative to the first."""
    encoder = encoder_fields(hidden_size, layers)
    options = {
        "pre_norm": True,
        "branch_initializer_range": 0.0,
        "output_position_initializer_range": 1.0,
        "merge_metric": "hidden_states",
    }
    qformer = {"model_type": "evlgen_qformer", "intermediate_size": 8 * hidden_size // 3, "num_query_tokens": queries}
    mlp = {"model_type": "evlgen_mlp", "hidden_size": hidden_size, "intermediate_size": 6 * layers * hidden_size}
    connectors = {
        "EVLGen, front-loaded": {**encoder, **options, "merge_r": front_loaded},
        f"EVLGen, r = {r}": {**encoder, "merge_r": r},
        f"Q-Former, {queries} queries": {**encoder, **qformer},
        "MLP on 5 x 5 means": {**mlp, "pool_size": 5},
        "MLP on all tokens": mlp,
    }
    class_token = isinstance(vision["vision_config"], CLIPVisionConfig)
    return {
        name: EVLGenConfig(**vision, connector_config={**fields, "class_token": class_token}, text_config=TEXT)
        for name, fields in connectors.items()
    }


LITE0 = TimmWrapperConfig(architecture="tf_efficientnet_lite0", model_args={"features_only": True, "out_indices": [3]})
DEMO_VISION = {"vision_config": LITE0, "num_vision_tokens": 196, "vision_hidden_size": 112}
CLIP_L = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
)
CLIP_VISION = {"vision_config": CLIP_L}
SIZES = {
    "demo": candidates(DEMO_VISION, hidden_size=384, layers=3, front_loaded=[98, 49, 24], r=57, queries=25),
    "clip-l": candidates(CLIP_VISION, hidden_size=768, layers=6, front_loaded=[128, 64, 32, 4], r=38, queries=29),
}


def build(config: EVLGenConfig) -> EVLGenForConditionalGeneration:
    """Returns a model with random weights, in training mode."""
    torch.manual_seed(0)
    return EVLGenForConditionalGeneration(config).train()


def random_batch(model: EVLGenForConditionalGeneration, size: int = BATCH) -> dict[str, torch.Tensor]:
    """Returns random vision features with a prompt and a caption."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, config.text_config.vocab_size, (size, PROMPT + CAPTION), generator=generator)
    images = torch.full((size, config.num_image_tokens), config.image_token_id)
    input_ids = torch.cat([images, text], dim=1)  # (batch, image tokens + text)
    labels = input_ids.clone()
    labels[:, :-CAPTION] = -100
    return {
        "vision_features": torch.randn(size, config.num_vision_tokens, config.vision_hidden_size),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


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


def parts_of_a_step(model: EVLGenForConditionalGeneration) -> dict[str, Step]:
    """Returns a whole training step, and the connector's part of it alone."""
    batch = random_batch(model)

    def connector() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompt = model.project_vision_features(batch["vision_features"]).pooler_output
        prompt.float().sum().backward()
        model.zero_grad()

    return {"step": training_step(model, repeat(batch)), "connector": connector}


def generation(model: EVLGenForConditionalGeneration) -> Step:
    """Returns the generation of captions of exactly 10 tokens for 8 images, with 5 beams."""
    batch = random_batch(model, GENERATION_BATCH)
    inputs = {name: batch[name][:, :-CAPTION] for name in ("input_ids", "attention_mask")}
    settings = {"num_beams": BEAMS, "do_sample": False, "min_new_tokens": CAPTION, "max_new_tokens": CAPTION}

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


def peak_of_a_step(config: EVLGenConfig) -> float:
    """Peak memory of one step in MB, beyond that of the process before it."""
    step = parts_of_a_step(build(config))["step"]
    before = peak_megabytes()
    step()
    return peak_megabytes() - before


def compare_connectors(size: str, configs: dict[str, EVLGenConfig], rounds: int) -> None:
    """Prints times, operations and memory of all candidates of a size."""
    # Before this process grows: on Linux, a new process starts with its parent's peak as its own.
    peaks = {name: in_new_process(peak_of_a_step, config) for name, config in configs.items()}
    models = {name: build(config) for name, config in configs.items()}
    share_towers(list(models.values()))
    first = next(iter(models))
    encode = torch.autocast("cpu", dtype=torch.bfloat16)(models[first].get_vision_features)
    square = torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16)
    runs = {"tower": partial(encode, torch.randn(BATCH, 3, 224, 224)), "product": partial(torch.mm, square, square)}
    flops = {}
    for name, model in models.items():
        parts = parts_of_a_step(model)
        flops[name] = count_flops(parts["step"])
        runs |= {(name, part): run for part, run in parts.items()}
        runs[name, "generation"] = generation(model)
    seconds = take_turns(runs, rounds)
    rate = 2 * SQUARE**3 / seconds["product"]
    rows = []
    for name, model in models.items():
        step = seconds[name, "step"]
        row = [name, model.config.num_image_tokens, f"{step / seconds[first, 'step']:.2f}", f"{BATCH / step:.1f}"]
        row += [f"{BATCH / (step + seconds['tower']):.1f}", f"{seconds[name, 'connector'] / step:.0%}"]
        row += [f"{flops[name] / step / rate:.0%}", f"{peaks[name]:.0f} MB"]
        rows.append([*row, f"{seconds[name, 'generation'] / seconds[first, 'generation']:.2f}"])
    print(f"\n{size}: {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s on one large product\n")
    header = ["connector", "tokens", "step", "images/s", "with the tower", "connector", "GEMM rate", "peak", "beam 5"]
    print(markdown_table(header, rows))


def compare_steps(constant: EVLGenConfig, front_loaded: EVLGenConfig, rounds: int) -> None:
    """Prints how much each change of EVLGen's step saves. Each change keeps those before it."""

    def step(
        config: EVLGenConfig, dtype: torch.dtype = torch.float32, compiled: bool = False, **settings: Any
    ) -> Step:
        model = build(config)
        model.language_model.to(dtype)
        if compiled:
            model.language_model.compile()
        return training_step(model, repeat({**random_batch(model), **settings}))

    runs = {
        "constant merging, float32 language model, all logits": step(constant, logits_to_keep=0),
        "+ logits of the captions alone": step(constant),
        "+ front-loaded merging": step(front_loaded),
        "+ bfloat16 language model": step(front_loaded, torch.bfloat16),
        "+ torch.compile of the language model": step(front_loaded, torch.bfloat16, compiled=True),
    }
    seconds = take_turns(runs, rounds)
    reference = next(iter(seconds.values()))
    rows = [[name, f"{value / reference:.2f}", f"{reference / value:.2f} x"] for name, value in seconds.items()]
    print(markdown_table(["step", "time", "speed"], rows))


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--what", choices=("connectors", "steps"), default="connectors", help="What is compared.")
    arguments = parser.parse_args(argv)
    if arguments.what == "steps":
        compare_steps(SIZES["demo"]["EVLGen, r = 57"], SIZES["demo"]["EVLGen, front-loaded"], arguments.rounds)
    else:
        for size, configs in SIZES.items():
            compare_connectors(size, configs, arguments.rounds)


if __name__ == "__main__":
    main()
