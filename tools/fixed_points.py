"""Textbook fixed-point algorithms and families of maps on which solvers are compared with them.

The algorithms are restated from the papers, without any of the refinements of `common.deq`. `FAMILIES` holds maps of
every kind an equilibrium model meets, by name; each is drawn from a seed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common.deq.layers import apply_norm
from common.deq.solve import solve
from common.deq.structure import Layout, State
from common.nets.deq_transformer import DEQTransformer
from common.nets.mdeq import MDEQ

# ---------------------------------------------------------------------------------------------------------------------
# Textbook algorithms


def textbook(name: str, f: Callable, z: Tensor, *, max_iter: int, tol: float) -> Tensor:
    """The state with the smallest residual of the whole batch; `max_iter` evaluations at most."""
    algorithms = {
        "picard": textbook_picard,
        "anderson": textbook_anderson,
        "anderson, relative ridge": functools.partial(textbook_anderson, ridge=1e-10, absolute=False),
        "broyden": textbook_broyden,
    }
    return algorithms[name](f, z, max_iter, tol)


def relative(g: Tensor, fz: Tensor) -> Tensor:
    return g.norm(dim=1) / (fz.norm(dim=1) + 1e-9)


def textbook_picard(f: Callable, z: Tensor, max_iter: int, tol: float) -> Tensor:
    for _ in range(max_iter):
        before, z = z, f(z)
        if relative(z - before, z).max() < tol:
            break
    return z


def textbook_anderson(
    f: Callable, z: Tensor, max_iter: int, tol: float, m: int = 6, ridge: float = 1e-4, absolute: bool = True
) -> Tensor:
    """Walker and Ni (2011) in the form with a Lagrange multiplier, per sample; the oldest point is dropped.

    ridge  added to the diagonal of the Gram matrix, as it is (absolute) or times the mean of the diagonal
    """
    batch, width = z.shape
    points, images = z.new_zeros(batch, m, width), z.new_zeros(batch, m, width)
    points[:, 0], images[:, 0] = z, f(z)
    points[:, 1], images[:, 1] = images[:, 0], f(images[:, 0])
    system = torch.zeros(batch, m + 1, m + 1, dtype=torch.float64, device=z.device)
    system[:, 0, 1:] = system[:, 1:, 0] = 1
    right = system.new_zeros(batch, m + 1, 1)
    right[:, 0] = 1
    fz = images[:, 1]
    for k in range(2, max_iter):
        n = min(k, m)
        g = images[:, :n] - points[:, :n]
        gram = (g @ g.transpose(1, 2)).double()
        scale = 1.0 if absolute else gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        system[:, 1 : n + 1, 1 : n + 1] = gram + ridge * scale * torch.eye(n, dtype=gram.dtype, device=z.device)
        weights = torch.linalg.solve_ex(system[:, : n + 1, : n + 1], right[:, : n + 1])[0][:, 1:, 0].to(z.dtype)
        z = (weights[:, None] @ images[:, :n])[:, 0]
        fz = f(z)
        points[:, k % m], images[:, k % m] = z, fz
        if relative(fz - z, fz).max() < tol:
            break
    return fz


def textbook_broyden(f: Callable, z: Tensor, max_iter: int, tol: float) -> Tensor:
    """Good Broyden (1965), the inverse as -I + sum_j u_j v_j^T, every term kept."""
    batch, width = z.shape
    u, v = z.new_zeros(batch, width, max_iter), z.new_zeros(batch, max_iter, width)
    inverse = lambda x, n: -x + torch.einsum("bdn,bn->bd", u[:, :, :n], torch.einsum("bnd,bd->bn", v[:, :n], x))
    transposed = lambda x, n: -x + torch.einsum("bnd,bn->bd", v[:, :n], torch.einsum("bdn,bd->bn", u[:, :, :n], x))
    g = f(z) - z
    step = g
    for n in range(max_iter):
        z = z + step
        g_new = f(z) - z
        if relative(g_new, g_new + z).max() < tol:
            break
        change, g = g_new - g, g_new
        row = transposed(step, n)
        u[:, :, n] = (step - inverse(change, n)) / (row * change).sum(1, keepdim=True)
        v[:, n] = row
        step = -inverse(g, n + 1)
    return z


# ---------------------------------------------------------------------------------------------------------------------
# Families of maps


@dataclass(frozen=True)
class Map:
    """fn on states like z0 (B, ...), and the relative residual and the budget with which it is solved."""

    fn: Callable[[State], State]
    z0: State
    tol: float = 1e-3
    max_iter: int = 150


def measure(problem: Map, solver: object) -> tuple[Tensor, Tensor]:
    """Evaluations until the relative residual of each sample first meets problem.tol, inf: never; its smallest. (B,)

    solver  of `common.deq.solvers`, with any budget and tolerance, or the name of a textbook algorithm
    """
    layout, evaluation = Layout.of(problem.z0), 0
    flat = layout.pack(problem.z0)
    reached = flat.new_full((len(flat),), float("inf"))
    smallest = reached

    def watched(z: Tensor) -> Tensor:
        nonlocal evaluation, reached, smallest
        evaluation += 1
        image = layout.pack(problem.fn(layout.unpack(z)))
        residual = (image - z).norm(dim=1) / image.norm(dim=1)
        residual = torch.where(torch.isfinite(residual), residual, float("inf"))
        reached = torch.where((residual <= problem.tol) & reached.isinf(), float(evaluation), reached)
        smallest = torch.minimum(smallest, residual)
        return image

    with torch.no_grad():
        if isinstance(solver, str):
            textbook(solver, watched, flat, max_iter=problem.max_iter, tol=problem.tol)
        else:
            solve(watched, flat, solver=replace(solver, max_iter=problem.max_iter, tol=problem.tol))
    return reached, smallest


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _affine(a: Tensor, batch: int, generator: torch.Generator, tol: float = 1e-3, max_iter: int = 150) -> Map:
    """z -> A z + b, b ~ N(0, I) per sample, in single precision from zeros."""
    b = torch.randn(batch, len(a), generator=generator, dtype=torch.float64).float()
    transposed = a.float().T.contiguous()
    return Map(lambda z: torch.addmm(b, z, transposed), torch.zeros_like(b), tol, max_iter)


def symmetric(seed: int, radius: float = 0.99, width: int = 256) -> Map:
    """Symmetric A of spectral radius `radius`; eigenvalues follow the semicircle."""
    generator = _generator(seed)
    a = torch.randn(width, width, generator=generator, dtype=torch.float64)
    a = a + a.T
    return _affine(a * radius / torch.linalg.eigvalsh(a).abs().max(), 8, generator, 1e-4, 600)


def uniform(seed: int, radius: float = 0.99, width: int = 256) -> Map:
    """Symmetric A with evenly spaced eigenvalues from -radius to radius."""
    generator = _generator(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.linspace(-radius, radius, width, dtype=torch.float64)
    return _affine(turn * spectrum @ turn.T, 8, generator, 1e-4, 600)


def random(seed: int, radius: float = 0.95, width: int = 256) -> Map:
    """Gaussian A of spectral radius `radius`."""
    generator = _generator(seed)
    a = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return _affine(a * radius / torch.linalg.eigvals(a).abs().max(), 8, generator, 1e-5, 600)


def jordan(seed: int) -> Map:
    """One Jordan block: eigenvalue .5, coupling 5, D 8. Residuals grow a hundred thousand times before they fall."""
    a = 0.5 * torch.eye(8, dtype=torch.float64) + 5 * torch.diag(torch.ones(7, dtype=torch.float64), 1)
    return _affine(a, 32, _generator(seed))


def triangular(seed: int, norm: float = 8.8, width: int = 32, radius: float = 0.5) -> Map:
    """Upper triangular A: eigenvalues in [-radius, radius]; the entries above them make its spectral norm `norm`."""
    generator = _generator(seed)
    above = torch.triu(torch.randn(width, width, generator=generator, dtype=torch.float64), 1)
    diagonal = torch.rand(width, generator=generator, dtype=torch.float64) * 2 - 1
    diagonal = torch.diag(diagonal * radius / diagonal.abs().max())
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        beyond = torch.linalg.matrix_norm(diagonal + middle * above, 2) > norm
        low, high = (low, middle) if beyond else (middle, high)
    return _affine(diagonal + low * above, 32, generator)


def flipping(seed: int, factor: float = 50.0) -> Map:
    """z -> -factor z + b: expands and flips the sign, one eigenvalue."""
    b = torch.randn(32, 4, generator=_generator(seed))
    return Map(lambda z: -factor * z + b, torch.zeros_like(b), max_iter=60)


def flipping_bent(seed: int) -> Map:
    """z -> x - c z + sin(z) / 10 with c from 1.5 to 4.5 per entry."""
    generator = _generator(seed)
    x = torch.randn(32, 16, generator=generator)
    c = torch.rand(16, generator=generator) * 3 + 1.5
    return Map(lambda z: x - c * z + 0.1 * z.sin(), torch.zeros_like(x))


def tanh_map(seed: int, gain: float = 3.0, width: int = 256) -> Map:
    """tanh(W z + x), Gaussian W of spectral norm `gain`."""
    generator = _generator(seed)
    w = torch.randn(width, width, generator=generator)
    w = (w * gain / torch.linalg.matrix_norm(w, 2)).T.contiguous()
    x = torch.randn(16, width, generator=generator)
    return Map(lambda z: torch.tanh(torch.addmm(x, z, w)), torch.zeros_like(x), 1e-4, 300)


class _Caught(nn.Module):
    """Stands in for an equilibrium layer and keeps what it is called with."""

    def forward(self, fn: Callable, z: State, args: tuple) -> list[State]:
        self.map = lambda state: fn(state, *args)
        self.z0 = z
        return [z]


def transformer(seed: int, std: float = 0.02, tol: float = 1e-2) -> Map:
    """One layer-normed block (PostLN) of the DEQ language model, width 64, 16 tokens, weights N(0, std^2)."""
    caught = _Caught()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DEQTransformer(
            deq=caught, vocabulary=100, width=64, blocks=1, heads=4, head_width=16, inner=256, memory=0, dropout=0.0,
            norm_order="post", head_norm=False, std=std,
        ).eval()  # fmt: skip
        with torch.no_grad():
            net.outputs(torch.randint(0, 100, (8, 16)))
    return Map(caught.map, caught.z0, tol)


def mdeq(seed: int, norm: bool = True) -> Map:
    """A small MDEQ on 16x16 noise at its random initialisation, with or without weight normalisation: no contraction,
    so that the smallest residual counts."""
    caught = _Caught()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = MDEQ(
            deq=caught, img_resolution=16, channels=(16, 16), head_channels=(2, 2), final_channels=6, groups=8,
            expansion=2, norm=functools.partial(apply_norm, kind="weight", skip=("fuse",)) if norm else None,
        ).eval()  # fmt: skip
        with torch.no_grad():
            net.outputs(torch.randn(4, 3, 16, 16))
    return Map(caught.map, caught.z0, 1e-2, 100)


FAMILIES: dict[str, Callable[[int], Map]] = {
    "symmetric .99": symmetric,
    "uniform .99": uniform,
    "random .95": random,
    "random .8": functools.partial(random, radius=0.8, width=128),
    "jordan": jordan,
    "triangular 8.8": triangular,
    "triangular 5": functools.partial(triangular, norm=5.0, width=64),
    "triangular 3.7": functools.partial(triangular, norm=3.7, width=64),
    "flipping 50": flipping,
    "flipping 11": functools.partial(flipping, factor=11.0),
    "flipping bent": flipping_bent,
    "tanh 3": tanh_map,
    "transformer .02": transformer,
    "transformer .1": functools.partial(transformer, std=0.1, tol=1e-3),
    "mdeq": mdeq,
    "mdeq plain": functools.partial(mdeq, norm=False),
}
