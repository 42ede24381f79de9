"""The statistics of a vision tower's tokens, from which a fresh projection can start."""

import torch


def whitening(tokens: torch.Tensor, shrinkage: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of tokens, and the matrix that makes them uncorrelated and of variance 1 in every direction.

    With covariance C and shrinkage s, the matrix is ((1 - s) C + s tr(C) / dim I)^(-1/2): ZCA whitening (Bell and
    Sejnowski, "The independent components of natural scenes are edge filters", 1997) of a covariance that is shrunk
    towards a multiple of the identity (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
    matrices", 2004), so that directions in which tokens hardly differ are not blown up.

    Args:
        tokens (`torch.Tensor` of shape `(tokens, dim)`): Of any floating dtype.
        shrinkage (`float`, *optional*, defaults to 0.1): Between 0 and 1.

    Returns:
        The mean, of shape `(dim,)`, and the symmetric matrix, `(dim, dim)`, both in float32 and on `tokens`' device:
        `(tokens - mean) @ matrix` is white.

    Raises:
        ValueError: If `tokens` has another shape, is not finite or does not vary; or if `shrinkage` is out of range.
    """
    if tokens.ndim != 2 or len(tokens) < 2:
        raise ValueError(f"`tokens` must have shape (2 or more, dim), but has {tuple(tokens.shape)}.")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be between 0 and 1, but is {shrinkage}.")
    tokens = tokens.float()
    mean = tokens.mean(dim=0)  # (dim,)
    covariance = torch.cov((tokens - mean).T).cpu().double()  # (dim, dim); not every device has float64
    variance = covariance.diagonal().mean()
    if not variance > 0 or not variance.isfinite():
        raise ValueError(f"`tokens` must be finite and vary, but have a mean variance of {variance.item()}.")
    values, vectors = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values.clamp(min=0) + shrinkage * variance
    matrix = (vectors * values.rsqrt()) @ vectors.T
    return mean, matrix.float().to(tokens.device)
