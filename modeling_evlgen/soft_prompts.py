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
        ValueError: If the placeholders are not as many as the tokens of the soft prompts, or not as long as these.
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
        ValueError: If the placeholders have no embedding, or do not fit the soft prompts.
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


def _fill(
    name: str, mask: torch.Tensor, outputs: EVLGenImageOutput | None, inputs_embeds: torch.Tensor
) -> torch.Tensor:
    lengths = [] if outputs is None else [len(prompt) for prompt in outputs.pooler_output]
    num_placeholders = mask.sum()
    torch_compilable_check(
        num_placeholders == sum(lengths),
        lambda: (
            f"`input_ids` holds {int(num_placeholders)} {name} placeholders, but the {name}s give {sum(lengths)} "
            f"tokens, {lengths[0] if len({*lengths}) == 1 else lengths} each."
        ),
    )
    if outputs is None:
        return inputs_embeds
    if not torch.compiler.is_compiling():  # the number of runs would break the graph
        _check_runs(name, mask, lengths)
    soft_prompts = outputs.soft_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(2).to(inputs_embeds.device), soft_prompts)


def _check_runs(name: str, mask: torch.Tensor, lengths: list[int]) -> None:
    """Checks that each run of placeholders holds whole soft prompts. Otherwise a prompt would go on in another place.

    Args:
        name (`str`): `"image"` or `"video"`, for the message.
        mask (`torch.BoolTensor` of shape `(batch, sequence)`): True for placeholders.
        lengths (`list[int]`): Number of tokens of each soft prompt, as many in all as placeholders.

    Raises:
        ValueError: If a run ends within a soft prompt.
    """
    is_end = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))  # (batch, sequence)
    ends = mask.flatten().cumsum(0)[is_end.flatten()].tolist()  # placeholders up to the end of each run
    if not {*ends} <= {*itertools.accumulate(lengths)}:
        runs = [end - start for start, end in itertools.pairwise([0, *ends])]
        raise ValueError(
            f"`input_ids` holds runs of {runs} {name} placeholders, but the {name}s give {lengths} tokens, in this "
            "order."
        )
