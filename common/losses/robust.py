"""Metrics between two images that grow more slowly than the square."""

from torch import Tensor


def squared_distance(delta: Tensor) -> Tensor:
    """Sum (not mean) of squares over everything but the batch: (B, ...) -> (B,)."""
    return delta.square().flatten(1).sum(1)


def pseudo_huber(squared: Tensor, c: float = 0.0, *, official: bool = False) -> Tensor:
    """sqrt(squared + c^2) - c; for c = 0 the plain distance sqrt(squared).

    squared   (B,) sum of squares over all pixels and channels; c is calibrated for that SUM (0.06 for 3 x 64 x 64)
    official  for c = 0 use the exact square root, whose gradient at 0 is infinite (the official ECT code does and then
              replaces nan gradients). Default: sqrt(squared + 1e-12).

    iCT (arXiv 2310.14189) eq. 6; ECT (arXiv 2406.14548), adaptive weight 1 / (squared + c^2)^(1/2).
    """
    if c > 0:
        return (squared + c**2).sqrt() - c
    return squared.sqrt() if official else (squared + 1e-12).sqrt()


def adaptive_weight(squared: Tensor, *, power: float = 1.0, eps: float = 1e-3) -> Tensor:
    """1 / (squared + eps)^power with no gradient, (B,): times `squared` it gives the family of robust losses of
    MeanFlow (arXiv 2505.13447) eq. 22; power 1/2 has the gradient of the pseudo-Huber metric.
    """
    return (squared.detach() + eps) ** -power
