"""What keeps an equilibrium stable, and how stable it is: Jacobian penalty and spectral radius.

J is the Jacobian of fn at z, one (D, D) block per sample; it is only used through products, never formed. A state of
several tensors is treated as one vector per sample (common.deq.structure.Layout).
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
TINY = 1e-30


def hutchinson(
    fz: Tensor, z: Tensor, vectors: int = 1, generator: torch.Generator | None = None, create_graph: bool = True
) -> Tensor:
    """Estimate of ||J||_F^2 / numel(z), a scalar: the mean over probes v ~ N(0, I) of ||v^T J||^2 / numel(z).

    fz            fn(z), with its graph back to z; same shape as z (B, ...)
    z             where J is taken, requires_grad
    vectors       number of probes, one vector-Jacobian product each
    create_graph  keep the graph for a gradient of the estimate (differentiates fn twice)

    Bai et al. (arXiv 2106.14342), Equation 6: E ||v^T J||^2 = ||J||_F^2.
    """
    total = fz.new_zeros(())
    for probe in range(vectors):
        v = _normal(fz, generator)
        keep = create_graph or probe < vectors - 1
        (product,) = torch.autograd.grad(fz, z, v, retain_graph=keep, create_graph=create_graph)
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
    z          state (B, ...); detached here, so the penalty does not pull at where it is measured
    generator  None: torch's global one

    See `hutchinson`.
    """
    _whole("vectors", vectors)
    with torch.enable_grad():
        flat, image = _image(fn, z, args)
        return hutchinson(image, flat, vectors, generator, create_graph)


class JacobianPenalty:
    """weight * ||J||_F^2 / numel(z) at a share of the training steps; made for the `penalty` of common.deq.layer.DEQ.

    weight     factor, >= 0
    frequency  probability that a step is penalised, 0 to 1; the value is not divided by it
    vectors    Hutchinson probes

    Bai et al. (arXiv 2106.14342), section 4: a random part of the steps is enough and keeps the cost small.
    """

    def __init__(self, weight: float = 1.0, frequency: float = 1.0, vectors: int = 1):
        if not weight >= 0:
            raise UserError(f"weight must be at least 0, got {weight!r}. Set weight=0 to switch the penalty off.")
        if not 0 <= frequency <= 1:
            raise UserError(f"frequency must be between 0 and 1, got {frequency!r}. Set frequency=1 for every step.")
        _whole("vectors", vectors)
        self.weight, self.frequency, self.vectors = weight, frequency, vectors

    def __call__(
        self, fn: Callable, z: State, args: Sequence | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """The penalty, a scalar with gradient; None at a step that is not penalised.

        generator  of the decision (where it is a CPU generator) and the probes; None: torch's global ones
        """
        if not self.weight or not self._drawn(z, generator):
            return None
        return self.weight * jacobian_penalty(fn, z, args, self.vectors, generator)

    def _drawn(self, z: State, generator: torch.Generator | None) -> bool:
        # On the CPU, so that no device is waited for. A planned step (fake tensors) is the expensive one.
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
    """Largest modulus of an eigenvalue of J at z per sample, (B,), without gradient. Below 1 plain iteration converges.

    fn          fn(z, *args) -> next state; samples must not influence one another
    method      "arnoldi": eigenvalues of the projection on a Krylov space, memory `iterations` + 1 states, most exact
                "power": `power_iteration`, memory a few states, for long runs
    iterations  Jacobian products, exactly; more than D are not needed by "arnoldi"
    product     "vjp": one call of fn and `iterations` backward passes (J^T has the eigenvalues of J);
                "jvp": `iterations` forward-mode calls, no graph kept
    generator   of the starting vector; None: torch's global one

    Works under no_grad and inference_mode. Right for complex pairs, where a Rayleigh quotient is not.
    """
    for name, value, options in (("method", method, METHODS), ("product", product, PRODUCTS)):
        if value not in options:
            raise UserError(
                f"{name} must be one of {', '.join(options)}, got {value!r}. {nearest(str(value), options)}"
            )
    _whole("iterations", iterations)
    with torch.inference_mode(False), torch.enable_grad():
        z, args = pytree.tree_map(_ordinary, (z, tuple(args or ())))
        if product == "vjp":
            flat, image = _image(fn, z, args)

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
            start = _normal(flat, generator)
        if method == "arnoldi":
            return arnoldi(multiply, start, iterations)
        return power_iteration(multiply, start, iterations)[1]


def power_iteration(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """(last vector of norm 1, spectral radius (B,)) from `iterations` products J v, each sample for itself.

    product  v (B, ...) -> J v (B, ...);   start (B, ...)

    Where the last three vectors obey one quadratic, J^2 v = a J v + b v up to 1 %, its roots are the eigenvalues in
    charge: one real, two real or a complex pair. Elsewhere many eigenvalues still compete, and the answer is the mean
    growth (||J^m v|| / ||v||)^(1/m) over the second half of the steps.
    """
    _whole("iterations", iterations)
    shape = start.shape
    v = start.reshape(len(start), start.shape[1:].numel())
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(TINY)
    before, history = v, []
    grown: tuple[Tensor, Tensor | None] = v, None  # direction and growth two products ago
    for _ in range(iterations):
        image = product(v.reshape(shape)).reshape(v.shape)
        growth = torch.linalg.vector_norm(image, dim=1)
        history.append(growth)
        before, grown, v = (
            v,
            (before, history[-2] if len(history) > 1 else None),
            image / growth.clamp_min(TINY)[:, None],
        )
    late = torch.stack(history[len(history) // 2 :])
    radius = torch.where(late[-1] == 0, 0.0, late.clamp_min(TINY).log().mean(0).exp())
    u, first = grown
    if first is not None:  # two products at least
        fitted, misfit = _quadratic(u, before * first[:, None], v * (late[-1] * first)[:, None])
        radius = torch.where(misfit < 0.01, fitted, radius)
    return v.reshape(shape), radius


def _quadratic(u: Tensor, ju: Tensor, jju: Tensor) -> tuple[Tensor, Tensor]:
    """Largest root of the quadratic that J obeys on span(u, J u), and how far J^2 u is from obeying it, (B,) each.

    u of norm 1, all (B, D). An orthonormal basis of the span makes it a (2, 2) eigenvalue problem.
    """
    along = (u * ju).sum(1)
    side = ju - along[:, None] * u
    height = torch.linalg.vector_norm(side, dim=1)
    size = torch.linalg.vector_norm(ju, dim=1)
    closed = height <= 1e-5 * size  # u is an eigenvector: the side direction is rounding
    q = side / height.clamp_min(TINY)[:, None]
    jq = (jju - along[:, None] * ju) / height.clamp_min(TINY)[:, None]
    upper, lower = (u * jq).sum(1), (q * jq).sum(1)
    left = jq - upper[:, None] * u - lower[:, None] * q
    misfit = torch.linalg.vector_norm(left, dim=1) * height / torch.linalg.vector_norm(jju, dim=1).clamp_min(TINY)
    half, det = (along + lower) / 2, along * lower - upper * height
    spread = half.square() - det
    root = torch.where(spread < 0, det.clamp_min(0).sqrt(), half.abs() + spread.clamp_min(0).sqrt())
    return torch.where(closed, along.abs(), root), torch.where(closed, 0.0, misfit)


def arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """Spectral radius (B,) as the largest Ritz value in the Krylov space of `iterations` products J v, per sample.

    product  v (B, ...) -> J v (B, ...);   start (B, ...)
    Memory: iterations + 1 states. Classical Gram-Schmidt done twice; the small eigenvalue problems in double.
    """
    _whole("iterations", iterations)
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
        known = basis[:, : k + 1]
        for _ in range(2):
            coefficients = torch.bmm(known, image.unsqueeze(2))
            hessenberg[:, : k + 1, k] += coefficients.squeeze(2).double()
            image = image - torch.bmm(known.transpose(1, 2), coefficients).squeeze(2)
        height = torch.linalg.vector_norm(image, dim=1)
        # The space is closed under J: what is left is rounding, and would bring spurious eigenvalues.
        height = torch.where(height <= 10 * torch.finfo(start.dtype).eps * scale, 0.0, height)
        hessenberg[:, k + 1, k] = height.double()
        basis[:, k + 1] = torch.where((height > 0)[:, None], image / height.clamp_min(TINY)[:, None], 0.0)
    square = hessenberg[:, :size]
    # LAPACK refuses a whole batch for one non-finite matrix; only that sample's answer is nan.
    finite = square.isfinite().all(dim=(1, 2))
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], square, 0.0))
    return torch.where(finite, values.abs().amax(1), torch.nan).to(start.dtype)


def _image(fn: Callable, z: State, args: Sequence | None) -> tuple[Tensor, Tensor]:
    """z detached as a matrix (B, D) that requires grad, and fn(z) as a matrix with its graph."""
    layout = Layout.of(z)
    flat = layout.pack(z).detach().requires_grad_()
    image = layout.pack_image(fn(layout.unpack(flat), *(args or ())), len(flat))
    if not image.requires_grad:
        image = image + 0 * flat  # fn ignores z: J = 0
    return flat, image


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if isinstance(like, FakeTensor):
        return torch.randn_like(like)  # planning: generators cannot be traced
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _ordinary(leaf):
    """A tensor made under inference_mode as one autograd accepts."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _whole(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}. Set {name} to 1 or more.")
