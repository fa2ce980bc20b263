"""GMRES for a batch of linear systems A x = b, where A is given by its products with vectors."""

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-30  # lower limit of a divisor


def dots(history: Tensor, v: Tensor) -> Tensor:
    """h_i . v per sample: history (B, n, D), v (B, D) -> (B, n).

    Computed as row times matrix: torch's batched matrix times column is ten times slower on a CPU.
    """
    return torch.bmm(v.unsqueeze(1), history.transpose(1, 2)).squeeze(1)


def combine(weights: Tensor, history: Tensor) -> Tensor:
    """sum_i w_i h_i per sample: weights (B, n), history (B, n, D) -> (B, D)."""
    return torch.bmm(weights.unsqueeze(1), history).squeeze(1)


def gmres(
    product: Callable[[Tensor], Tensor], b: Tensor, *, size: int, tol: float, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, relative residual, products used): x minimises ||b - A x|| over the Krylov space of each row (sample).

    product  V (B, D) -> A V (B, D); the rows must not depend on one another
    b        (B, D)
    size     largest dimension of the Krylov space
    tol      a row ends with the first space in which its relative residual is at most tol, so its x does not depend on
             the other rows. Each product costs one synchronisation: has every row ended?
    fixed    take all `size` products and never synchronise

    x (B, D); relative residual (B,) ||b - A x|| / ||b||; products used (B,) int.

    The Arnoldi process gives an orthonormal basis V_k of the Krylov space and a Hessenberg matrix H_k with

        A V_k = V_{k+1} H_k,   b = ||b|| v_1,   so   min_x ||b - A x|| = min_y || ||b|| e_1 - H_k y ||,   x = V_k y

    (Saad and Schultz 1986). The basis is orthogonalised by classical Gram-Schmidt done twice: as stable as the modified
    form, and each pass is two batched products. H_k and y are kept in double precision. Memory: size + 1 states.
    A row whose Krylov space is exhausted has its exact solution and changes no more. A row with a product that is not
    finite ends with the x of the products before.
    """
    batch, width = b.shape
    norm = torch.linalg.vector_norm(b, dim=1)
    active = (norm > 0) & torch.isfinite(norm)
    basis = b.new_zeros(batch, size + 1, width)
    basis[:, 0] = torch.where(active[:, None], b / norm.clamp_min(TINY)[:, None], 0.0)
    hessenberg = torch.zeros(batch, size + 1, size, dtype=torch.float64, device=b.device)
    target = torch.zeros(batch, size + 1, dtype=torch.float64, device=b.device)
    target[:, 0] = norm.double()  # ||b|| e_1
    y = torch.zeros(batch, size, dtype=torch.float64, device=b.device)
    residual = (norm != 0).double()
    used = torch.zeros(batch, dtype=torch.int64, device=b.device)
    k = -1
    for k in range(size):
        if not fixed and not bool(active.any()):
            break
        image = product(basis[:, k])
        scale = torch.linalg.vector_norm(image, dim=1)
        active = active & torch.isfinite(scale)
        image = torch.where(active[:, None], image, 0.0)
        previous = basis[:, : k + 1]
        for _ in range(2):  # h_ik = v_i . A v_k; the second pass removes what rounding left in the first
            coefficients = dots(previous, image)
            hessenberg[:, : k + 1, k] += coefficients.double()
            image = image - combine(coefficients, previous)
        length = torch.linalg.vector_norm(image, dim=1)  # h_{k+1,k}
        # A v_k lies in the space already: the rest is rounding and must not become a basis vector
        exhausted = length <= 1e-7 * scale if b.dtype == torch.float32 else length <= 1e-14 * scale
        hessenberg[:, k + 1, k] = torch.where(exhausted, 0.0, length.double())
        basis[:, k + 1] = torch.where(exhausted[:, None], 0.0, image / length.clamp_min(TINY)[:, None])
        minimiser, norm_left = _least_squares(hessenberg[:, : k + 2, : k + 1], target[:, : k + 2])
        y[:, : k + 1] = torch.where(active[:, None], minimiser, y[:, : k + 1])
        residual = torch.where(active, norm_left / norm.double().clamp_min(TINY), residual)
        used += active
        active = active & ~exhausted if fixed else active & ~exhausted & (residual > tol)
    x = combine(y[:, : k + 1].to(b.dtype), basis[:, : k + 1])
    return x, residual.to(b.dtype), used


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(y (B, n) that minimises ||target - matrix y||, that norm (B,)). In singular systems y has the least norm."""
    y = torch.linalg.pinv(matrix) @ target.unsqueeze(2)
    norm_left = torch.linalg.vector_norm(target - (matrix @ y).squeeze(2), dim=1)
    return y.squeeze(2), norm_left
