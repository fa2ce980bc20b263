"""GMRES for a batch of linear systems whose matrices are only known by their products."""

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-30


def gmres(
    product: Callable[[Tensor], Tensor], b: Tensor, *, size: int, tol: float, fixed: bool = False
) -> tuple[Tensor, Tensor, int]:
    """(x, relative residual, products used): x (B, D) minimises ||b - A x|| per row over the Krylov space of `size`.

    product  V (B, D) -> A V, row by row independent
    tol      ends early once every row's relative residual is at most tol (one synchronisation per product)
    fixed    take all `size` products, never synchronise

    Arnoldi with classical Gram-Schmidt done twice, which is as stable as the modified form and two batched products.
    Memory: size + 1 states. A row whose Krylov space closes (exact solution found) stays put. Small systems in double.
    """
    batch, width = b.shape
    norm = torch.linalg.vector_norm(b, dim=1)
    basis = b.new_zeros(batch, size + 1, width)
    basis[:, 0] = b / norm.clamp_min(TINY)[:, None]
    hessenberg = torch.zeros(batch, size + 1, size, dtype=torch.float64, device=b.device)
    target = torch.zeros(batch, size + 1, dtype=torch.float64, device=b.device)
    target[:, 0] = norm.double()
    y = torch.zeros(batch, 0, dtype=torch.float64, device=b.device)
    left = torch.ones(batch, dtype=torch.float64, device=b.device)
    used = 0
    for k in range(size):
        image = product(basis[:, k])
        scale = torch.linalg.vector_norm(image, dim=1)
        known = basis[:, : k + 1]
        for _ in range(2):
            coefficients = torch.bmm(known, image.unsqueeze(2))
            hessenberg[:, : k + 1, k] += coefficients.squeeze(2).double()
            image = image - torch.bmm(known.transpose(1, 2), coefficients).squeeze(2)
        height = torch.linalg.vector_norm(image, dim=1)
        closed = height <= 1e-7 * scale if b.dtype == torch.float32 else height <= 1e-14 * scale
        hessenberg[:, k + 1, k] = torch.where(closed, 0.0, height.double())
        basis[:, k + 1] = torch.where(closed[:, None], 0.0, image / height.clamp_min(TINY)[:, None])
        used = k + 1
        y, left = _least_squares(hessenberg[:, : k + 2, : k + 1], target[:, : k + 2])
        left = left / norm.double().clamp_min(TINY)
        if not fixed and not bool((left > tol).any()):
            break
    x = torch.bmm(y.to(b.dtype).unsqueeze(1), basis[:, :used]).squeeze(1)
    return x, left.to(b.dtype), used


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Minimiser (B, n) of ||target - matrix y|| and the norm left (B,); singular systems get the least norm."""
    y = torch.linalg.pinv(matrix) @ target.unsqueeze(2)
    left = torch.linalg.vector_norm(target - (matrix @ y).squeeze(2), dim=1)
    return y.squeeze(2), left
