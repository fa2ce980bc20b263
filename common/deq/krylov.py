"""GMRES for a batch of linear systems whose matrices are only known by their products."""

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-30


def dots(history: Tensor, v: Tensor) -> Tensor:
    """h_i . v per sample: history (B, n, D), v (B, D) -> (B, n).

    As row times matrix: on a CPU torch's batched matrix times column is ten times slower.
    """
    return torch.bmm(v.unsqueeze(1), history.transpose(1, 2)).squeeze(1)


def combine(weights: Tensor, history: Tensor) -> Tensor:
    """sum_i w_i h_i per sample: weights (B, n), history (B, n, D) -> (B, D)."""
    return torch.bmm(weights.unsqueeze(1), history).squeeze(1)


def gmres(
    product: Callable[[Tensor], Tensor], b: Tensor, *, size: int, tol: float, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, relative residual, products used): x (B, D) minimises ||b - A x|| per row over its Krylov space.

    product  V (B, D) -> A V, row by row independent
    size     largest Krylov space
    tol      a row ends with the first space in which its relative residual is at most tol, so its x does not depend on
             the other rows (one synchronisation per product: has every row ended?)
    fixed    take all `size` products, never synchronise

    Arnoldi with classical Gram-Schmidt done twice, which is as stable as the modified form and two batched products.
    Memory: size + 1 states. A row whose Krylov space closes (exact solution found) stays put. Small systems in double.
    A row with a product that is not finite ends with what it had before it; residual (B,), products (B,) int.
    """
    batch, width = b.shape
    norm = torch.linalg.vector_norm(b, dim=1)
    active = (norm > 0) & torch.isfinite(norm)
    basis = b.new_zeros(batch, size + 1, width)
    basis[:, 0] = torch.where(active[:, None], b / norm.clamp_min(TINY)[:, None], 0.0)
    hessenberg = torch.zeros(batch, size + 1, size, dtype=torch.float64, device=b.device)
    target = torch.zeros(batch, size + 1, dtype=torch.float64, device=b.device)
    target[:, 0] = norm.double()
    y = torch.zeros(batch, size, dtype=torch.float64, device=b.device)
    left = (norm != 0).double()
    used = torch.zeros(batch, dtype=torch.int64, device=b.device)
    k = -1
    for k in range(size):
        if not fixed and not bool(active.any()):
            break
        image = product(basis[:, k])
        scale = torch.linalg.vector_norm(image, dim=1)
        active = active & torch.isfinite(scale)
        image = torch.where(active[:, None], image, 0.0)
        known = basis[:, : k + 1]
        for _ in range(2):
            coefficients = dots(known, image)
            hessenberg[:, : k + 1, k] += coefficients.double()
            image = image - combine(coefficients, known)
        height = torch.linalg.vector_norm(image, dim=1)
        closed = height <= 1e-7 * scale if b.dtype == torch.float32 else height <= 1e-14 * scale
        hessenberg[:, k + 1, k] = torch.where(closed, 0.0, height.double())
        basis[:, k + 1] = torch.where(closed[:, None], 0.0, image / height.clamp_min(TINY)[:, None])
        fitted, misfit = _least_squares(hessenberg[:, : k + 2, : k + 1], target[:, : k + 2])
        y[:, : k + 1] = torch.where(active[:, None], fitted, y[:, : k + 1])
        left = torch.where(active, misfit / norm.double().clamp_min(TINY), left)
        used += active
        active = active & ~closed if fixed else active & ~closed & (left > tol)
    x = combine(y[:, : k + 1].to(b.dtype), basis[:, : k + 1])
    return x, left.to(b.dtype), used


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Minimiser (B, n) of ||target - matrix y|| and the norm left (B,); singular systems get the least norm."""
    y = torch.linalg.pinv(matrix) @ target.unsqueeze(2)
    left = torch.linalg.vector_norm(target - (matrix @ y).squeeze(2), dim=1)
    return y.squeeze(2), left
