"""Layers that several connectors share: positions, times, and linear maps at the end of residual branches."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

# Frequencies of the time embedding in radians per second. Their periods are 0.8 seconds to 1.8 hours.
_FREQUENCIES = tuple(2.0**exponent for exponent in range(3, -11, -1))


def smooth_positions(grid_size: int, dim: int, length: float = 0.25) -> torch.Tensor:
    """Draws a random vector for each patch of a square grid. The closer two patches are, the more alike they are.

    Each channel is a cosine over the grid with a random direction, wavelength and phase. These are random Fourier
    features (Rahimi and Recht, NeurIPS 2007; for positions Tancik et al., NeurIPS 2020) of the kernel
    `exp(-d^2 / (2 length^2))`, where d is the distance of two patches.

    Args:
        grid_size (`int`): Patches along each side, at least 2.
        dim (`int`): Channels.
        length (`float`, *optional*, defaults to 0.25):
            The distance, in sides of the grid, at which two patches have a correlation of `exp(-1/2)`.

    Returns:
        `torch.Tensor` of shape `(grid_size**2, dim)`, row by row. Each channel has mean 0. All values together have
        standard deviation 1.
    """
    side = torch.linspace(0, 1, grid_size)
    patches = torch.cartesian_prod(side, side)  # (patches, 2)
    phases = patches @ torch.randn(2, dim) / length + 2 * torch.pi * torch.rand(dim)  # (patches, dim)
    waves = phases.cos()
    waves = waves - waves.mean(dim=0)
    return waves / waves.std()


class PositionEmbeddings(nn.Embedding):
    """Learned positions that are added to tokens.

    Args:
        num_positions (`int`): Largest number of tokens.
        dim (`int`): Width of the tokens.
        initializer_range (`float`): Standard deviation of fresh positions.
        grid_size (`int`, *optional*):
            Patches along each side of a square grid. If given, the positions of the grid start smooth over it.
        num_prefix_tokens (`int`, *optional*, defaults to 0): Tokens before the first patch.
    """

    def __init__(
        self,
        num_positions: int,
        dim: int,
        initializer_range: float,
        grid_size: int | None = None,
        num_prefix_tokens: int = 0,
    ):
        super().__init__(num_positions, dim)
        self.initializer_range = initializer_range
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens

    def draw(self) -> torch.Tensor:
        """Returns fresh weights, `(positions, dim)`."""
        weight = torch.randn(self.num_embeddings, self.embedding_dim)
        if self.grid_size is not None:
            grid = smooth_positions(self.grid_size, self.embedding_dim)  # (patches, dim)
            weight[self.num_prefix_tokens : self.num_prefix_tokens + len(grid)] = grid
        return weight * self.initializer_range

    def forward(
        self, tokens: torch.Tensor, tiles: tuple[int, int] = (1, 1), places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds the positions to tokens.

        A position is a place in the whole image. So the positions of more tiles, and those of merged patches, lie
        between those of one.

        Args:
            tokens (`torch.Tensor` of shape `(batch, tokens, dim)`): Prefix tokens, then patches row by row.
            tiles (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
                Rows and columns of tiles that the patches cover. Each tile has a square grid of patches.
            places (`torch.FloatTensor` of shape `(batch, patches, 2)`, *optional*):
                Row and column of each patch in the square grid of one tile, if patches are not row by row.
        """
        if places is not None:
            prefix = self.weight[: self.num_prefix_tokens].expand(len(tokens), -1, -1)
            return tokens + torch.cat([prefix, self._interpolate(places)], dim=1)
        if tiles == (1, 1):
            return tokens + self.weight[: tokens.shape[1]]  # (batch, tokens, dim)
        prefix = self.num_prefix_tokens
        side = math.isqrt((tokens.shape[1] - prefix) // math.prod(tiles))
        grid = self.weight[prefix : prefix + side**2].T.unflatten(1, (side, side))  # (dim, side, side)
        grid = F.interpolate(grid.unsqueeze(0), size=[count * side for count in tiles], mode="bilinear")
        return tokens + torch.cat([self.weight[:prefix], grid[0].flatten(1).T])

    def _interpolate(self, places: torch.Tensor) -> torch.Tensor:
        """The positions of places in the grid, `(batch, patches, dim)`: bilinear, and exact on grid points."""
        side = math.isqrt(places.shape[1])
        low = places.floor().clamp(0, max(0, side - 2)).long()  # (batch, patches, 2)
        high = (low + 1).clamp(max=side - 1)
        share = places - low
        positions = 0
        for rows, row_share in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            for columns, column_share in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
                corner = F.embedding(self.num_prefix_tokens + rows * side + columns, self.weight)
                positions = positions + (row_share * column_share).unsqueeze(-1) * corner
        return positions.to(self.weight.dtype)


class TimeEmbedding(nn.Module):
    """A learned function of the time in seconds. It starts at zero, and stays zero at the time 0.

    It is linear in `sin(w t)` and `cos(w t) - 1` for frequencies w from one radian in 17 minutes to 8 in a second.

    Args:
        dim (`int`): Width of the tokens.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 2 * len(_FREQUENCIES)))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """Embeds times of any shape, as `(*shape, dim)`."""
        phases = times.float().unsqueeze(-1) * times.new_tensor(_FREQUENCIES, dtype=torch.float32)
        waves = torch.cat([phases.sin(), phases.cos() - 1], dim=-1)  # (*shape, 2 * frequencies)
        return F.linear(waves.to(self.weight.dtype), self.weight)


def build_output_positions(num_positions: int, dim: int, initializer_range: float | None) -> nn.Module:
    """Returns positions for the output tokens of a connector, or the identity if `initializer_range` is None."""
    if initializer_range is None:
        return nn.Identity()
    return PositionEmbeddings(num_positions, dim, initializer_range)


class BranchLinear(nn.Linear):
    """The linear map at the end of a residual branch.

    Args:
        in_features, out_features (`int`): As in `nn.Linear`.
        initializer_range (`float`): Standard deviation of fresh weights.
    """

    def __init__(self, in_features: int, out_features: int, initializer_range: float):
        super().__init__(in_features, out_features)
        self.initializer_range = initializer_range


def init_connector_layer(module: nn.Module) -> bool:
    """Draws fresh weights for a layer of this file. Returns whether `module` is one."""
    if isinstance(module, PositionEmbeddings):
        init.copy_(module.weight, module.draw())
    elif isinstance(module, BranchLinear):
        init.normal_(module.weight, std=module.initializer_range)
        init.zeros_(module.bias)
    else:
        return False
    return True
