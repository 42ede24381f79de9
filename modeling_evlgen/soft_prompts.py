"""Puts soft prompts in the place of the `<image>` and `<video>` placeholders of a text."""

import itertools

import torch
from torch import nn
from transformers.utils import torch_compilable_check

from configuration_evlgen import EVLGenConfig

from .model_outputs import EVLGenImageOutput

# The encoded images and the encoded videos, under "image" and "video".
Encoded = dict[str, EVLGenImageOutput | None]


def embed_ids(
    embedding: nn.Module, input_ids: torch.LongTensor, encoded: Encoded, config: EVLGenConfig
) -> torch.Tensor:
    """Embeds token ids and fills the soft prompts in, `(batch, sequence, text_dim)`.

    Raises:
        ValueError: If placeholders and tokens of the soft prompts differ in number.
    """
    masks = {name: input_ids == getattr(config, f"{name}_token_id") for name in encoded}  # (batch, sequence) each
    # Placeholders may lie beyond the embedding, so another id is looked up in their place.
    inputs_embeds = embedding(input_ids.masked_fill(masks["image"] | masks["video"], 0))
    for name, outputs in encoded.items():
        inputs_embeds = _fill(name, masks[name], outputs, inputs_embeds)
    return inputs_embeds


def fill_embedded(
    embedding: nn.Module, inputs_embeds: torch.Tensor, encoded: Encoded, config: EVLGenConfig
) -> torch.Tensor:
    """Fills the soft prompts in where embedded text holds the embedding of a placeholder.

    Raises:
        ValueError: If the placeholders have no embedding, or differ from the soft prompts in number.
    """
    for name, outputs in encoded.items():
        if outputs is None:
            continue
        placeholder_id = getattr(config, f"{name}_token_id")
        if placeholder_id >= embedding.weight.shape[0]:
            raise ValueError(
                f"{name.capitalize()}s need `input_ids`, which hold their placeholders, instead of `inputs_embeds`: "
                f"`{name}_token_id` ({placeholder_id}) has no embedding."
            )
        placeholder = embedding(torch.tensor(placeholder_id, device=embedding.weight.device))  # (text_dim,)
        mask = (inputs_embeds == placeholder.to(inputs_embeds)).all(dim=-1)  # (batch, sequence)
        inputs_embeds = _fill(name, mask, outputs, inputs_embeds)
    return inputs_embeds


def check_runs(name: str, mask: torch.Tensor | None, lengths: list[int]) -> None:
    """Checks that no soft prompt would go on behind other text, or in another row.

    Args:
        name (`str`): `"image"` or `"video"`, for the message.
        mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): True for placeholders, if there are ids.
        lengths (`list[int]`): Number of tokens of each soft prompt.

    Raises:
        ValueError: If a run of placeholders ends within a soft prompt. Other numbers in all are left to [`embed_ids`].
    """
    if mask is None:
        return
    total = sum(lengths)
    may_end = torch.zeros(total + 1, dtype=torch.bool, device=mask.device)
    may_end[list(itertools.accumulate(lengths))] = True
    ends = mask & ~nn.functional.pad(mask[:, 1:], (0, 1))  # (batch, sequence), the last placeholder of each run
    so_far = mask.flatten().cumsum(0)  # placeholders up to each token
    torch_compilable_check(
        (may_end[so_far.clamp(max=total)] | ~ends.flatten()).all() | (mask.sum() != total),
        lambda: (
            f"`input_ids` holds runs of {_run_lengths(so_far, ends)} {name} placeholders, but the {name}s give "
            f"{lengths} tokens, in this order."
        ),
    )


def _run_lengths(so_far: torch.Tensor, ends: torch.Tensor) -> list[int]:
    until_ends = [0, *so_far[ends.flatten()].tolist()]
    return [end - start for start, end in itertools.pairwise(until_ends)]


def _fill(
    name: str, mask: torch.Tensor, outputs: EVLGenImageOutput | None, inputs_embeds: torch.Tensor
) -> torch.Tensor:
    num_placeholders = mask.sum()
    num_features = 0 if outputs is None else len(outputs.soft_tokens)
    torch_compilable_check(
        num_placeholders == num_features,
        lambda: (
            f"`input_ids` holds {int(num_placeholders)} {name} placeholders, but {_describe_prompts(name, outputs)}."
        ),
    )
    if outputs is None:
        return inputs_embeds
    soft_prompts = outputs.soft_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(2).to(inputs_embeds.device), soft_prompts)


def _describe_prompts(name: str, outputs: EVLGenImageOutput | None) -> str:
    if outputs is None:
        return f"there are no {name}s"
    prompts, total = outputs.pooler_output, len(outputs.soft_tokens)
    if isinstance(prompts, tuple | list):
        return f"the {name}s give {total} tokens, {[len(prompt) for prompt in prompts]}"
    return f"the {name}s give {total} tokens, {prompts.shape[-2]} each"
