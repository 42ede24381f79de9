"""Soft prompts: the model's outputs, tiles that become one image, and placeholders that soft prompts take."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import torch_compilable_check

from configuration_evlgen import EVLGenConfig

Grid = tuple[int, int]  # rows and columns of tiles


@dataclass
class EVLGenImageOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(tiles, num_vision_tokens, vision_hidden_size)`):
            The frozen vision tower's tokens.
        pooler_output (`torch.Tensor` of shape `(batch, num_image_tokens, text_hidden_size)`):
            The soft prompt: merged tokens in the language model's embedding space. A tuple with a tensor for each
            image, if images differ in their number of tokens.
        output_index (`torch.LongTensor` of shape `(batch, num_vision_tokens)`):
            For each vision token, the index of the soft prompt's token that it was merged into. A tuple, if images
            differ in their tiles or their number of tokens. The patches of several tiles are in rows over the whole
            image. None from a connector that does not merge.
        token_places (`torch.FloatTensor` of shape `(videos, num_vision_tokens, 3)`, *optional*):
            For merged videos: seconds since the first frame, row and column in the grid of patches of each token of
            `last_hidden_state`.
    """

    output_index: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    token_places: torch.Tensor | None = None

    @property
    def soft_tokens(self) -> torch.Tensor:
        """The tokens of all soft prompts in one tensor, `(tokens, text_hidden_size)`."""
        prompts = self.pooler_output
        return torch.cat(prompts) if isinstance(prompts, tuple | list) else prompts.reshape(-1, prompts.shape[-1])


# The encoded images and the encoded videos, under "image" and "video".
Encoded = dict[str, EVLGenImageOutput | None]


@dataclass
class EVLGenModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, dim)`): The input of the language model's head.
        image_outputs, video_outputs ([`EVLGenImageOutput`], *optional*): The encoded images and videos, if any.
    """

    image_outputs: EVLGenImageOutput | None = None
    video_outputs: EVLGenImageOutput | None = None


@dataclass
class EVLGenCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.Tensor`, *optional*): The mean cross-entropy of the targets, if there are labels.
        logits (`torch.Tensor` of shape `(batch, sequence, vocab)`):
            Scores of the next token; for a `logits_to_keep` of shape `(batch, sequence)`, of shape `(kept, vocab)`.
        image_outputs, video_outputs ([`EVLGenImageOutput`], *optional*): The encoded images and videos, if any.
    """

    image_outputs: EVLGenImageOutput | None = None
    video_outputs: EVLGenImageOutput | None = None


def read_grids(image_grid_thw: torch.Tensor | None, num_tiles: int) -> list[Grid]:
    """The grid of each image; one tile for each of `num_tiles` images if no grids are given.

    Raises a ValueError if the grids have another number of tiles, or another shape than `(images, 3)`.
    """
    if image_grid_thw is None:
        return [(1, 1)] * num_tiles
    grids = torch.as_tensor(image_grid_thw)
    has_shape = grids.ndim == 2 and grids.shape[1] == 3 and not grids.is_floating_point()
    if not has_shape or (grids[:, 0] != 1).any() or (grids < 1).any():
        wanted = "integers of shape (images, 3), 1 in its first column, and rows and columns of tiles"
        raise ValueError(f"`image_grid_thw` must hold {wanted}, but is {grids.tolist()}.")
    if int(grids.prod(dim=1).sum()) != num_tiles:
        raise ValueError(f"`image_grid_thw` is {grids.tolist()}, but the images have {num_tiles} tiles together.")
    return [(rows, columns) for _, rows, columns in grids.tolist()]


def join_tiles(tokens: torch.Tensor, grid: Grid, class_token: bool) -> torch.Tensor:
    """Puts the patches of an image's tiles in rows over the whole image. The class token is the mean of the tiles'.

    Of `(images, tiles, tokens, dim)`, with tiles row by row, each a square grid of patches, it makes
    `(images, class_token + tiles * patches, dim)`.
    """
    if grid == (1, 1):
        return tokens.squeeze(1)
    prefix, patches = tokens[:, :, : int(class_token)], tokens[:, :, int(class_token) :]
    side = math.isqrt(patches.shape[2])
    patches = patches.unflatten(2, (side, side)).unflatten(1, grid)  # (images, rows, columns, side, side, dim)
    patches = patches.transpose(2, 3).flatten(1, 4)  # (images, rows * side * columns * side, dim)
    return torch.cat([prefix.mean(dim=1), patches], dim=1)


def count_placeholders(mask: torch.Tensor, num_items: int) -> list[int] | None:
    """The length of each run of placeholders in a mask, `(batch, sequence)`. None if not each item has a run."""
    row_ends = nn.functional.pad(mask, (1, 1)).int().diff(dim=1)  # (batch, sequence + 1)
    starts, ends = (row_ends == 1).nonzero()[:, 1], (row_ends == -1).nonzero()[:, 1]
    runs: list[int] = (ends - starts).tolist()
    return runs if len(runs) == num_items else None


def check_runs(name: str, mask: torch.Tensor, budgets: list[int]) -> None:
    """Raises a ValueError if a soft prompt would go on behind other text, or in another row.

    `name` is `"image"` or `"video"`. `mask`, `(batch, sequence)`, is True for placeholders. `budgets` are the numbers
    of tokens of the soft prompts. If placeholders are more or fewer in all, [`embed_ids`] says so.
    """
    total = sum(budgets)
    may_end = torch.zeros(total + 1, dtype=torch.bool, device=mask.device)
    may_end[list(itertools.accumulate(budgets))] = True
    ends = mask & ~nn.functional.pad(mask[:, 1:], (0, 1))  # (batch, sequence), the last placeholder of each run
    so_far = mask.flatten().cumsum(0)  # placeholders up to each token

    def describe() -> str:
        until_ends = [0, *so_far[ends.flatten()].tolist()]
        runs = [end - start for start, end in itertools.pairwise(until_ends)]
        return f"`input_ids` holds runs of {runs} {name} placeholders, but the {name}s give {budgets} tokens."

    is_whole = (may_end[so_far.clamp(max=total)] | ~ends.flatten()).all()
    torch_compilable_check(is_whole | (mask.sum() != total), describe)


def embed_ids(
    embedding: nn.Module, input_ids: torch.LongTensor, encoded: Encoded, config: EVLGenConfig
) -> torch.Tensor:
    """Embeds token ids and fills the soft prompts in, `(batch, sequence, text_dim)`.

    Raises a ValueError if placeholders and tokens of the soft prompts differ in number.
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
    """Fills the soft prompts in where embedded text holds the embedding of a placeholder. Raises as [`embed_ids`]."""
    for name, outputs in encoded.items():
        if outputs is None:
            continue
        placeholder_id = getattr(config, f"{name}_token_id")
        if placeholder_id >= embedding.weight.shape[0]:
            reason = f"`{name}_token_id` ({placeholder_id}) has no embedding"
            raise ValueError(f"{name.capitalize()}s need `input_ids` instead of `inputs_embeds`: {reason}.")
        placeholder = embedding(torch.tensor(placeholder_id, device=embedding.weight.device))  # (text_dim,)
        mask = (inputs_embeds == placeholder.to(inputs_embeds)).all(dim=-1)  # (batch, sequence)
        inputs_embeds = _fill(name, mask, outputs, inputs_embeds)
    return inputs_embeds


def _fill(
    name: str, mask: torch.Tensor, outputs: EVLGenImageOutput | None, inputs_embeds: torch.Tensor
) -> torch.Tensor:
    num_placeholders = mask.sum()
    num_features = 0 if outputs is None else len(outputs.soft_tokens)

    def describe() -> str:
        given = f"there are no {name}s"
        if outputs is not None:
            prompts = outputs.pooler_output
            each = f"{prompts.shape[1]} each" if torch.is_tensor(prompts) else [len(prompt) for prompt in prompts]
            given = f"the {name}s give {num_features} tokens, {each}"
        return f"`input_ids` holds {int(num_placeholders)} {name} placeholders, but {given}."

    torch_compilable_check(num_placeholders == num_features, describe)
    if outputs is None:
        return inputs_embeds
    soft_tokens = outputs.soft_tokens.to(inputs_embeds.device, inputs_embeds.dtype)  # (tokens, text_dim)
    return inputs_embeds.masked_scatter(mask.unsqueeze(2).to(inputs_embeds.device), soft_tokens)


def check_finite(tensors: dict[str, torch.Tensor | tuple[torch.Tensor, ...] | None]) -> None:
    """Raises a ValueError if a value is NaN or infinite. It names the tensor, and its entries counted from 0."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if isinstance(tensor, tuple):  # entries of different lengths
            tensor = torch.stack([entry.float().sum() for entry in tensor])
        entries = (~tensor.isfinite()).reshape(len(tensor), -1).any(dim=1).nonzero().flatten().tolist()
        if entries:
            raise ValueError(f"{name} must be finite, but has NaN or infinity in entries {entries}.")
