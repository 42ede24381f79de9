"""What vLLM's Transformers backend needs of a model that it builds and serves itself.

vLLM brings the attention, the head and linear maps of its own, in the serving dtype. The model ends at the last hidden
state, and gets soft prompts as `inputs_embeds`.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from configuration_evlgen import EVLGenConfig

from .fingerprints import TRAINED_PARTS
from .soft_prompts import EVLGenImageOutput


def is_built_by_vllm(config: EVLGenConfig) -> bool:
    """Whether vLLM builds a model. It sets its own attention for the language model before."""
    attention = getattr(config.text_config, "_attn_implementation", None)  # where vLLM writes it; there is no other
    return str(attention).startswith("vllm")


def check_checkpoint(config: EVLGenConfig) -> None:
    """Raises a ValueError if the checkpoint only names its towers. vLLM reads the weights of one checkpoint alone."""
    if config.towers != "reference":
        return
    name = config.name_or_path
    load = f"from_pretrained({name!r}, trust_remote_code=True).save_pretrained('complete'"
    raise ValueError(
        f"vLLM cannot serve {name!r}, which only names its towers. This makes a complete checkpoint of it: python -c "
        f"\"from transformers import AutoModel, AutoProcessor; AutoModel.{load}, towers='include'); "
        f'AutoProcessor.{load})"'
    )


def adapt_to_vllm(model: PreTrainedModel) -> None:
    """Changes a fresh model's layers in place so that vLLM can replace the rest. The names of its weights stay."""
    model.language_model.set_output_embeddings(nn.Identity())  # vLLM has its own, and loads the weights there
    for name in TRAINED_PARTS:
        if getattr(model, name) is not None:
            setattr(model, name, _keep_linear_maps(getattr(model, name)))
    for module in model.vision_tower.modules():
        if isinstance(module, nn.MultiheadAttention):  # it reads the weight of its linear map directly
            module.out_proj = _KeptLinear(module.out_proj)
    embeddings = model.get_input_embeddings()
    if type(embeddings) is nn.Embedding:
        embeddings.__class__ = _PlaceholderEmbedding
    model.get_image_features = _list_soft_prompts(model.get_image_features)
    model.get_video_features = _stack_frame_inputs(model.get_video_features)
    _count_only_words()


def _list_soft_prompts(encode: Callable[..., EVLGenImageOutput]) -> Callable[..., EVLGenImageOutput]:
    """Makes a tuple of the images' soft prompts. vLLM would split one tensor in proportion to the images' tiles."""

    @wraps(encode)
    def encode_images(*args: Any, **kwargs: Any) -> EVLGenImageOutput:
        output = encode(*args, **kwargs)
        output.pooler_output = tuple(output.pooler_output)
        return output

    return encode_images


def _stack_frame_inputs(encode: Callable[..., EVLGenImageOutput]) -> Callable[..., EVLGenImageOutput]:
    """Stacks times and masks of frames. vLLM gives them in lists if videos of concurrent requests differ in length."""

    @wraps(encode)
    def encode_videos(pixel_values_videos: torch.Tensor, *args: Any, **kwargs: Any) -> EVLGenImageOutput:
        for name in ("frame_mask", "frame_times"):
            if isinstance(kwargs.get(name), list):
                kwargs[name] = torch.stack(kwargs[name]).to(pixel_values_videos.device)  # (videos, frames)
        return encode(pixel_values_videos, *args, **kwargs)

    return encode_videos


class _PlaceholderEmbedding(nn.Embedding):
    """Input embeddings that vLLM also looks placeholders up in, before it fills in the soft prompts."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids.clamp(max=self.num_embeddings - 1))


class _KeptLinear(nn.Module):
    """A linear map that vLLM does not replace, since it is no `nn.Linear`. Its weights keep their names and dtype."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(tokens, self.weight, self.bias)


def _keep_linear_maps(part: nn.Module) -> nn.Module:
    for name, child in part.named_children():
        setattr(part, name, _keep_linear_maps(child))
    return _KeptLinear(part) if isinstance(part, nn.Linear) else part


def _count_only_words() -> None:
    """Lets vLLM's penalties take prompts with placeholders, whose ids may lie beyond the vocabulary.

    vLLM counts the ids of a prompt in a table of `vocab_size + 1` entries, of which the last stands for padding. A
    larger id is written outside of the table, and one request would end the server.
    """
    utils: Any = sys.modules.get("vllm.model_executor.layers.utils")
    count = getattr(utils, "get_token_bin_counts_and_mask", None)
    if count is None or getattr(count, "counts_only_words", False):
        return

    def count_words(tokens: torch.Tensor, vocab_size: int, num_seqs: int) -> Any:
        return count(tokens.clamp(max=vocab_size), vocab_size, num_seqs)

    count_words.counts_only_words = True
    utils.get_token_bin_counts_and_mask = count_words
