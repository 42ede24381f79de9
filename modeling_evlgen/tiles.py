"""Images of several tiles, and budgets of tokens that differ from image to image."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from configuration_evlgen import EVLGenConfig

Grid = tuple[int, int]  # rows and columns of tiles


def read_grids(image_grid_thw: torch.Tensor | None, num_rows: int) -> list[Grid]:
    """The grid of each image; one tile for each of `num_rows` images if no grids are given.

    Raises:
        ValueError: If the grids have another number of tiles than `num_rows`, or another shape than `(images, 3)`.
    """
    if image_grid_thw is None:
        return [(1, 1)] * num_rows
    grids = torch.as_tensor(image_grid_thw)
    has_shape = grids.ndim == 2 and grids.shape[1] == 3 and not grids.is_floating_point()
    if not has_shape or (grids[:, 0] != 1).any() or (grids < 1).any():
        raise ValueError(
            "`image_grid_thw` must hold integers of shape (images, 3), 1 in its first column and the rows and columns "
            f"of tiles in the others, but is {grids.tolist()}."
        )
    if int(grids.prod(dim=1).sum()) != num_rows:
        raise ValueError(f"`image_grid_thw` is {grids.tolist()}, but the images have {num_rows} tiles together.")
    return [(rows, columns) for _, rows, columns in grids.tolist()]


def read_budgets(
    name: str,
    given: Sequence[int] | torch.Tensor | None,
    num_items: int,
    mask: torch.Tensor | None,
    config: EVLGenConfig,
) -> list[int]:
    """The number of tokens of each image or video.

    They are those given. Otherwise, a model that was trained with several budgets reads them from the placeholders. A
    compiled model does not, nor does one whose images follow each other without a token between them. There, all have
    the default number.

    Args:
        name (`str`): `"image"` or `"video"`, for messages.
        given (`torch.LongTensor` of shape `(items,)` or a list, *optional*): The budgets, if they are known.
        num_items (`int`): Number of images or videos.
        mask (`torch.BoolTensor` of shape `(batch, sequence)`, *optional*): True for placeholders.
        config ([`EVLGenConfig`]): Has the default and the range.

    Raises:
        ValueError: If a budget is out of range, or there is not one for each item.
    """
    if given is not None:
        budgets = given.tolist() if hasattr(given, "tolist") else given
        is_sequence = isinstance(budgets, Sequence) and not isinstance(budgets, str)
        if is_sequence:
            budgets = [budget.item() if torch.is_tensor(budget) else budget for budget in budgets]
        if not is_sequence or any(isinstance(budget, bool) or not isinstance(budget, int) for budget in budgets):
            raise ValueError(f"`{name}_budgets` must be a list of integers, but is {budgets!r}.")
        if len(budgets) != num_items:
            raise ValueError(f"`{name}_budgets` holds {len(budgets)} numbers for {num_items} {name}s.")
    elif config.image_token_range is None or mask is None or torch.compiler.is_compiling():
        return [config.num_image_tokens] * num_items
    else:
        budgets = _count_placeholders(mask, num_items) or [config.num_image_tokens] * num_items
    low, high = config.image_token_range or [config.num_image_tokens] * 2
    if not all(low <= budget <= high for budget in budgets):
        raise ValueError(
            f"`num_{name}_tokens` must be from {low} to {high}, as the model was trained, but is {budgets}."
        )
    return budgets


def _count_placeholders(mask: torch.Tensor, num_items: int) -> list[int] | None:
    """Placeholders of each item: the length of each run. None if there is not a run for each item."""
    row_ends = torch.nn.functional.pad(mask, (1, 1)).int().diff(dim=1)  # (batch, sequence + 1)
    starts, ends = (row_ends == 1).nonzero()[:, 1], (row_ends == -1).nonzero()[:, 1]
    runs: list[int] = (ends - starts).tolist()
    return runs if len(runs) == num_items else None


def join_tiles(tokens: torch.Tensor, grid: Grid, class_token: bool) -> torch.Tensor:
    """Puts the patches of an image's tiles in rows over the whole image. The class token is the mean of the tiles'.

    Args:
        tokens (`torch.Tensor` of shape `(images, tiles, tokens, dim)`):
            Tokens of each tile, the tiles row by row. The patches of a tile are a square grid.
        grid (`tuple[int, int]`): Rows and columns of tiles.
        class_token (`bool`): Whether token 0 of each tile is a class token.

    Returns:
        `torch.Tensor` of shape `(images, class_token + tiles * patches, dim)`.
    """
    prefix, patches = tokens[:, :, : int(class_token)], tokens[:, :, int(class_token) :]
    side = math.isqrt(patches.shape[2])
    patches = patches.unflatten(2, (side, side)).unflatten(1, grid)  # (images, rows, columns, side, side, dim)
    patches = patches.transpose(2, 3).flatten(1, 4)  # (images, rows * side * columns * side, dim)
    return torch.cat([prefix.mean(dim=1), patches], dim=1)


def connect(
    tokens: torch.Tensor,
    grids: list[Grid],
    budgets: list[int],
    class_token: bool,
    run: Callable[[torch.Tensor, Grid, int, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]],
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor | tuple[torch.Tensor, ...] | None]:
    """Runs a connector over images, those with the same grid and budget together.

    Args:
        tokens (`torch.Tensor` of shape `(tiles of all images, tokens, dim)`): Tokens of each tile.
        grids, budgets (`list`): One for each image.
        class_token (`bool`): Whether token 0 of each tile is a class token.
        run (`Callable`): Returns the soft prompts of images, and their output indices if tokens are merged.
        places (`torch.Tensor` of shape `(images, patches, 2)`, *optional*): Goes to `run`, for images of one tile.

    Returns:
        The soft prompts, `(images, budget, text_dim)`, or a tuple with an entry for each image if budgets differ. The
        output indices, `(images, tokens of all tiles)`, or a tuple if grids or budgets differ; None without merging.
    """
    groups: dict[tuple[Grid, int], list[int]] = defaultdict(list)
    for image, key in enumerate(zip(grids, budgets, strict=True)):
        groups[key].append(image)
    tiles = tokens.split([math.prod(grid) for grid in grids])
    results: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for (grid, budget), images in groups.items():
        stacked = torch.stack([tiles[image] for image in images]) if len(groups) > 1 else tokens
        stacked = stacked.view(len(images), math.prod(grid), *tokens.shape[1:])
        joined = stacked.squeeze(1) if grid == (1, 1) else join_tiles(stacked, grid, class_token)
        prompts, index = run(joined, grid, budget, None if places is None else places[images])
        if len(groups) == 1:
            return prompts, index
        results |= zip(
            images, zip(prompts, [None] * len(images) if index is None else index, strict=True), strict=True
        )
    prompts, indices = zip(*(results[image] for image in range(len(grids))), strict=True)
    return torch.stack(prompts) if len(set(budgets)) == 1 else prompts, None if indices[0] is None else indices
