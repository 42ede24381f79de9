"""The statistics of a vision tower's tokens, from which a fresh projection can start."""

from collections.abc import Iterable

import torch


def moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of tokens that come in batches.

    Args:
        batches (`Iterable[torch.Tensor]`): Each of shape `(tokens, dim)`, of any floating dtype, on any device.

    Returns:
        The mean, of shape `(dim,)`, and the covariance, `(dim, dim)`, both in float64 on the CPU.

    Raises:
        ValueError: If there are fewer than two tokens, or they are not finite or do not vary.
    """
    count, total, products = 0, 0.0, 0.0
    for tokens in batches:
        tokens = tokens.detach().cpu().double()  # not every device has float64
        count += len(tokens)
        total = total + tokens.sum(dim=0)
        products = products + tokens.T @ tokens
    if count < 2:
        raise ValueError(f"A covariance needs 2 tokens or more, but there are {count}.")
    mean = total / count  # (dim,)
    covariance = products / count - torch.outer(mean, mean)  # (dim, dim)
    if not covariance.isfinite().all():
        raise ValueError("The tokens must be finite.")
    if not covariance.diagonal().mean() > 1e-12 * mean.square().mean():  # below is rounding
        raise ValueError("The tokens must vary, but are all the same.")
    return mean, covariance


def whitening_matrix(covariance: torch.Tensor, shrinkage: float = 0.1) -> torch.Tensor:
    """The matrix behind which the directions of tokens have nearly equal variance, about 1, and are uncorrelated.

    With covariance C and shrinkage s it is ((1 - s) C + s tr(C) / dim I)^(-1/2): ZCA whitening (Bell and Sejnowski,
    "The independent components of natural scenes are edge filters", 1997) of a covariance that is shrunk towards a
    multiple of the identity (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004). Without the shrinkage, directions in which tokens hardly differ would be blown up.

    Args:
        covariance (`torch.Tensor` of shape `(dim, dim)`): Of tokens, in float64.
        shrinkage (`float`, *optional*, defaults to 0.1): Above 0 and at most 1, which scales all directions alike.

    Returns:
        The matrix, symmetric, of shape `(dim, dim)` and `covariance`'s dtype.

    Raises:
        ValueError: If `shrinkage` is out of range.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be above 0 and at most 1, but is {shrinkage}.")
    values, vectors = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * covariance.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.T
