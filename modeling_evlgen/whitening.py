"""Starts a linear map from the statistics of its inputs."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def whiten_inputs(linear: nn.Linear, batches: Iterable[torch.Tensor]) -> None:
    """Changes a fresh linear map so that it whitens its inputs first.

    Its outputs then have mean 0, and all directions of the inputs count about the same in them. With weight W, the
    matrix M of [`whitening_matrix`] and the inputs' mean m, the weight becomes W M and the bias -W M m. Source of
    data-dependent starts: Krähenbühl et al., "Data-dependent initializations of convolutional neural networks", 2016.

    Args:
        linear (`nn.Linear`): The map, with a bias.
        batches (`Iterable[torch.Tensor]`): Inputs, each of shape `(tokens, dim)`.

    Raises:
        ValueError: If there are fewer than two inputs, or they are not finite or do not vary.
    """
    mean, covariance = moments(batches)
    weight = linear.weight.cpu().double() @ whitening_matrix(covariance)  # (out_dim, dim)
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ mean)


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
        tokens = tokens.detach().cpu().double()  # some accelerators have no float64
        count += len(tokens)
        total = total + tokens.sum(dim=0)  # (dim,)
        products = products + tokens.T @ tokens  # (dim, dim)
    if count < 2:
        raise ValueError(f"A covariance needs 2 tokens or more, but there are {count}.")
    mean = total / count  # (dim,)
    covariance = products / count - torch.outer(mean, mean)  # (dim, dim)
    if not covariance.isfinite().all():
        raise ValueError("The tokens must be finite.")
    if not covariance.diagonal().mean() > 1e-12 * mean.square().mean():  # less is rounding error
        raise ValueError("The tokens must vary, but are all the same.")
    return mean, covariance


def whitening_matrix(covariance: torch.Tensor, shrinkage: float = 0.1) -> torch.Tensor:
    """The matrix that makes the directions of tokens uncorrelated, and their variances nearly 1.

    With covariance C and shrinkage s it is ((1 - s) C + s tr(C) / dim I)^(-1/2). This is ZCA whitening (Bell and
    Sejnowski, "The independent components of natural scenes are edge filters", 1997). The covariance is shrunk towards
    a multiple of the identity (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004). Without the shrinkage, directions of little variance would be blown up.

    Args:
        covariance (`torch.Tensor` of shape `(dim, dim)`): The tokens' covariance, in float64.
        shrinkage (`float`, *optional*, defaults to 0.1): Above 0 and at most 1, which scales all directions alike.

    Returns:
        The matrix, symmetric, of shape `(dim, dim)` and `covariance`'s dtype.

    Raises:
        ValueError: If `shrinkage` is out of range.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be above 0 and at most 1, but is {shrinkage}.")
    values, vectors = torch.linalg.eigh(covariance)  # (dim,), (dim, dim)
    # Rounding makes some of the smallest eigenvalues negative.
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * covariance.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.T
