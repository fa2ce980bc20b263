"""Stability of an equilibrium: the Jacobian penalty that improves it and the spectral radius that measures it.

J is the Jacobian of fn at z, one (D, D) matrix per sample. It is never formed: only products with vectors are computed.
A state of several tensors is treated as one vector per sample (common.deq.structure.Layout).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from common.deq.structure import Layout, State
from common.errors import UserError, nearest

METHODS = ("power", "arnoldi")
PRODUCTS = ("vjp", "jvp")
TINY = 1e-30  # lower limit of a divisor


def hutchinson(
    fz: Tensor, z: Tensor, vectors: int = 1, generator: torch.Generator | None = None, create_graph: bool = True
) -> Tensor:
    """Hutchinson's estimate of ||J||_F^2 / numel(z), a scalar: the mean of ||v^T J||^2 / numel(z) over v ~ N(0, I).

    fz            fn(z), with its graph back to z; same shape as z (B, ...)
    z             the point where J is taken; requires_grad
    vectors       number of random vectors v, one vector-Jacobian product each
    create_graph  keep the graph, for a gradient of the estimate (differentiates fn twice)

    Bai et al., Stabilizing Equilibrium Models by Jacobian Regularization (arXiv 2106.14342), Equation 6. With
    E[v v^T] = I,

        E ||v^T J||^2 = E tr(J^T v v^T J) = tr(J^T J) = ||J||_F^2
    """
    total = fz.new_zeros(())
    for number in range(vectors):
        v = _standard_normal(fz, generator)
        retain = create_graph or number < vectors - 1
        (product,) = torch.autograd.grad(fz, z, v, retain_graph=retain, create_graph=create_graph)  # v^T J
        total = total + product.square().sum()
    return total / (vectors * max(z.numel(), 1))


def jacobian_penalty(
    fn: Callable,
    z: State,
    args: Sequence | None = None,
    vectors: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
) -> Tensor:
    """Estimate of ||J||_F^2 / numel(z) at z, a scalar with gradient to the parameters of fn and to args.

    fn         fn(z, *args) -> next state, structure of z; called once
    z          state (B, ...); detached here, so the penalty has no gradient with respect to z
    generator  None: torch's global one

    See `hutchinson`.
    """
    _check_positive_int("vectors", vectors)
    with torch.enable_grad():
        flat, image = _state_and_image(fn, z, args)
        return hutchinson(image, flat, vectors, generator, create_graph)


class JacobianPenalty:
    """weight * ||J||_F^2 / numel(z), at a random share of the training steps: `penalty` of common.deq.layer.DEQ.

    weight     factor, >= 0
    frequency  probability that a step is penalised, 0 to 1; the penalty is not divided by it
    vectors    random vectors of Hutchinson's estimate

    Bai et al. (arXiv 2106.14342), section 4: penalising a random part of the steps is enough and costs less.
    """

    def __init__(self, weight: float = 1.0, frequency: float = 1.0, vectors: int = 1):
        if not weight >= 0:
            raise UserError(f"weight must be at least 0, got {weight!r}. Set weight=0 to switch the penalty off.")
        if not 0 <= frequency <= 1:
            raise UserError(f"frequency must be between 0 and 1, got {frequency!r}. Set frequency=1 for every step.")
        _check_positive_int("vectors", vectors)
        self.weight, self.frequency, self.vectors = weight, frequency, vectors

    def __call__(
        self, fn: Callable, z: State, args: Sequence | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """The penalty, a scalar with gradient, or None if this step is not penalised.

        generator  draws the random vectors and, if it is a CPU generator, decides whether this step is penalised.
                   None: torch's global generators
        """
        if not self.weight or not self._is_penalised_step(z, generator):
            return None
        return self.weight * jacobian_penalty(fn, z, args, self.vectors, generator)

    def _is_penalised_step(self, z: State, generator: torch.Generator | None) -> bool:
        # The number is drawn on the CPU, so that the host need not wait for the device. Memory is planned with fake
        # tensors, always for a penalised step: that step needs more of it.
        if self.frequency in (0, 1) or any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(z)):
            return self.frequency > 0
        on_cpu = generator if generator is not None and generator.device.type == "cpu" else None
        return float(torch.rand((), generator=on_cpu)) < self.frequency


def spectral_radius(
    fn: Callable,
    z: State,
    args: Sequence | None = None,
    method: str = "arnoldi",
    iterations: int = 30,
    product: str = "vjp",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spectral radius of J at z per sample, (B,), without gradient: the largest modulus of its eigenvalues.

    Near an equilibrium with a spectral radius below 1, plain iteration converges.

    fn          fn(z, *args) -> next state; samples must not influence one another
    method      "arnoldi": eigenvalues of J projected on a Krylov space. More accurate; memory `iterations` + 1 states.
                "power": `power_iteration`. Memory of a few states, for many iterations
    iterations  number of Jacobian products; "arnoldi" needs at most D
    product     "vjp": one call of fn and `iterations` backward passes (J^T has the eigenvalues of J).
                "jvp": `iterations` forward-mode calls, no graph kept
    generator   draws the starting vector; None: torch's global one

    Works under no_grad and inference_mode. Both methods are correct for complex pairs of eigenvalues; a Rayleigh
    quotient is not.
    """
    for name, value, options in (("method", method, METHODS), ("product", product, PRODUCTS)):
        if value not in options:
            raise UserError(
                f"{name} must be one of {', '.join(options)}, got {value!r}. {nearest(str(value), options)}"
            )
    _check_positive_int("iterations", iterations)
    with torch.inference_mode(False), torch.enable_grad():
        z, args = pytree.tree_map(_without_inference_mode, (z, tuple(args or ())))
        if product == "vjp":
            flat, image = _state_and_image(fn, z, args)

            def multiply(v: Tensor) -> Tensor:
                return torch.autograd.grad(image, flat, v, retain_graph=True)[0]
        else:
            layout = Layout.of(z)
            flat = layout.pack(z).detach()

            def multiply(v: Tensor) -> Tensor:
                def packed(x: Tensor) -> Tensor:
                    return layout.pack_image(fn(layout.unpack(x), *args), len(x))

                return torch.func.jvp(packed, (flat,), (v,))[1].detach()

        with torch.no_grad():
            start = _standard_normal(flat, generator)
        if method == "arnoldi":
            return arnoldi(multiply, start, iterations)
        return power_iteration(multiply, start, iterations)[1]


def power_iteration(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(last vector, normalised, (B, ...); spectral radius (B,)) from `iterations` products J v, for each sample alone.

    product  v (B, ...) -> J v (B, ...)
    start    (B, ...) the starting vector

    If the last three vectors satisfy J^2 v = a J v + b v up to 1 %, the dominant eigenvalues are the roots of
    x^2 = a x + b: one real eigenvalue, two real ones or a complex pair. Otherwise more than two eigenvalues are still
    of similar size, and the estimate is the mean growth (||J^m v|| / ||v||)^(1/m) over the second half of the products.
    """
    _check_positive_int("iterations", iterations)
    shape = start.shape
    v = start.reshape(len(start), start.shape[1:].numel())
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(TINY)
    previous = before_previous = v  # the unit vectors one product and two products ago
    growths: list[Tensor] = []  # ||J v|| of each product
    for _ in range(iterations):
        image = product(v.reshape(shape)).reshape(v.shape)
        growths.append(torch.linalg.vector_norm(image, dim=1))
        before_previous, previous, v = previous, v, image / growths[-1].clamp_min(TINY)[:, None]
    second_half = torch.stack(growths[len(growths) // 2 :])
    radius = torch.where(second_half[-1] == 0, 0.0, second_half.clamp_min(TINY).log().mean(0).exp())
    if len(growths) > 1:
        # With u = before_previous: J u = growths[-2] previous and J^2 u = growths[-2] growths[-1] v
        ju, jju = previous * growths[-2][:, None], v * (growths[-1] * growths[-2])[:, None]
        root, misfit = _largest_root(before_previous, ju, jju)
        radius = torch.where(misfit < 0.01, root, radius)
    return v.reshape(shape), radius


def _largest_root(u: Tensor, ju: Tensor, jju: Tensor) -> tuple[Tensor, Tensor]:
    """Largest modulus of the eigenvalues of J projected on span(u, J u), and the misfit of that projection, (B,) each.

    u (B, D) of norm 1;  ju, jju (B, D): J u and J^2 u

    With q the unit vector of J u orthogonal to u, J acts on the orthonormal basis (u, q) as the matrix M:

        J u = m11 u + m21 q,    J q = m12 u + m22 q + rest,    M = [m11 m12; m21 m22]

    J^2 u = m11 J u + m21 J q, so the misfit is ||m21 rest|| / ||J^2 u||. It is 0 where J maps the span into itself.
    """
    m11 = (u * ju).sum(1)
    orthogonal = ju - m11[:, None] * u
    m21 = torch.linalg.vector_norm(orthogonal, dim=1)
    size = torch.linalg.vector_norm(ju, dim=1)
    eigenvector = m21 <= 1e-5 * size  # u is an eigenvector: q would be rounding
    q = orthogonal / m21.clamp_min(TINY)[:, None]
    jq = (jju - m11[:, None] * ju) / m21.clamp_min(TINY)[:, None]
    m12, m22 = (u * jq).sum(1), (q * jq).sum(1)
    rest = jq - m12[:, None] * u - m22[:, None] * q
    misfit = torch.linalg.vector_norm(rest, dim=1) * m21 / torch.linalg.vector_norm(jju, dim=1).clamp_min(TINY)
    # eigenvalues h +- sqrt(h^2 - det M) with h = trace(M) / 2; the modulus of a complex pair is sqrt(det M)
    half_trace, det = (m11 + m22) / 2, m11 * m22 - m12 * m21
    discriminant = half_trace.square() - det
    real = half_trace.abs() + discriminant.clamp_min(0).sqrt()
    root = torch.where(discriminant < 0, det.clamp_min(0).sqrt(), real)
    return torch.where(eigenvector, m11.abs(), root), torch.where(eigenvector, 0.0, misfit)


def arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """Spectral radius (B,) per sample: the largest modulus of the Ritz values after `iterations` products J v.

    product  v (B, ...) -> J v (B, ...)
    start    (B, ...) the starting vector

    With V an orthonormal basis of the Krylov space span(v, J v, J^2 v, ...), the Ritz values are the eigenvalues of the
    Hessenberg matrix H = V^T J V (Arnoldi 1951). The basis is orthogonalised by classical Gram-Schmidt done twice, and
    the eigenvalues of H are computed in double precision. Memory: iterations + 1 states.
    """
    _check_positive_int("iterations", iterations)
    shape, batch, width = start.shape, len(start), start.shape[1:].numel()
    size = min(iterations, width)
    if not batch or not size:
        return start.new_zeros(batch)
    basis = start.new_zeros(batch, size + 1, width)
    first = start.reshape(batch, width)
    basis[:, 0] = first / torch.linalg.vector_norm(first, dim=1, keepdim=True).clamp_min(TINY)
    hessenberg = torch.zeros(batch, size + 1, size, dtype=torch.float64, device=start.device)
    for k in range(size):
        image = product(basis[:, k].reshape(shape)).reshape(batch, width)
        scale = torch.linalg.vector_norm(image, dim=1)
        previous = basis[:, : k + 1]
        for _ in range(2):  # h_ik = v_i . J v_k; the second pass removes what rounding left in the first
            coefficients = torch.bmm(previous, image.unsqueeze(2))
            hessenberg[:, : k + 1, k] += coefficients.squeeze(2).double()
            image = image - torch.bmm(previous.transpose(1, 2), coefficients).squeeze(2)
        length = torch.linalg.vector_norm(image, dim=1)  # h_{k+1,k}
        # J maps the space into itself: the rest is rounding and would give spurious eigenvalues.
        length = torch.where(length <= 10 * torch.finfo(start.dtype).eps * scale, 0.0, length)
        hessenberg[:, k + 1, k] = length.double()
        basis[:, k + 1] = torch.where((length > 0)[:, None], image / length.clamp_min(TINY)[:, None], 0.0)
    square = hessenberg[:, :size]
    # LAPACK refuses the whole batch if one matrix is not finite. Only that sample's result becomes NaN.
    finite = square.isfinite().all(dim=(1, 2))
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], square, 0.0))
    return torch.where(finite, values.abs().amax(1), torch.nan).to(start.dtype)


def _state_and_image(fn: Callable, z: State, args: Sequence | None) -> tuple[Tensor, Tensor]:
    """(z as a constant matrix (B, D) that requires grad, fn(z) as a matrix (B, D) with its graph)."""
    layout = Layout.of(z)
    flat = layout.pack(z).detach().requires_grad_()
    image = layout.pack_image(fn(layout.unpack(flat), *(args or ())), len(flat))
    if not image.requires_grad:
        image = image + 0 * flat  # fn ignores z: J = 0
    return flat, image


def _standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if isinstance(like, FakeTensor):
        return torch.randn_like(like)  # a generator cannot be traced with fake tensors
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _without_inference_mode(leaf):
    """A copy that autograd accepts, if `leaf` is a tensor created under inference_mode; everything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _check_positive_int(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}. Set {name} to 1 or more.")
