"""Starts a linear map from the statistics of its inputs."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def whiten_inputs(linear: nn.Linear, batches: Iterable[torch.Tensor]) -> None:
    """Changes a fresh linear map with a bias so that it whitens its inputs, batches of `(tokens, dim)`, first.

    Its outputs then have mean 0, and all directions of the inputs count about the same in them. With weight W, the
    matrix M of [`whitening_matrix`] and the inputs' mean m, the weight becomes W M and the bias -W M m. Source of
    data-dependent starts: Krähenbühl et al., "Data-dependent initializations of convolutional neural networks", 2016.

    Raises:
        ValueError: If the inputs have no covariance, as in [`moments`].
    """
    mean, covariance = moments(batches)
    if linear.weight.is_meta:  # accelerate offloaded it, and would bring the old weights back: it stays loaded
        linear._hf_hook.pre_forward(linear)
        linear._hf_hook.offload = False
    weight = linear.weight.cpu().double() @ whitening_matrix(covariance)  # (out_dim, dim)
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ mean)


def moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(dim,)` and covariance `(dim, dim)` of batches of `(tokens, dim)`, in float64 on the CPU.

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
    """
    values, vectors = torch.linalg.eigh(covariance)  # (dim,), (dim, dim)
    # Rounding makes some of the smallest eigenvalues negative.
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * covariance.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.T
