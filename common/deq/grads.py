"""Gradient rules: how an equilibrium is differentiated. The rule does not depend on the solver that found it.

J = df/dz and P = df/dtheta are taken at z*; g = dL/dz* is a row vector. The exact gradient of a fixed point is

    dL/dtheta = g (I - J)^-1 P                                   (implicit function theorem)

Each rule computes this product, or replaces (I - J)^-1 P by a matrix that costs less, as proposed in On Training
Implicit Models (phantom gradient, arXiv 2111.05177). All rules but `Backprop` treat the solution as a constant, so
their gradient with respect to z0 is zero.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensor

from common.deq.problem import Problem
from common.deq.recompute import RestoreHeldState, mem_gc
from common.deq.solution import Solution
from common.deq.solve import _iterate, solve
from common.deq.solvers import Broyden, Picard, Solver
from common.deq.structure import Layout, State
from common.errors import UserError

# Implicit, Neumann and Shine go backward through one graph of f several times. A compiled f with donated buffers frees
# its saved tensors in the first backward pass. The switch must be off before f is compiled and stay off, because torch
# reads it again in each backward pass.
functorch.donated_buffer = False


class Gradient(ABC):
    """Abstract base of the gradient rules: `attach` turns a constant solution into states with a gradient."""

    needs_solver_state = False  # True: the rule reads the forward solver's history, so samples must stay in the batch
    replaces_solver = False  # True: the rule's `run` is the forward pass; no solver runs

    @abstractmethod
    def attach(self, fn: Callable, z: State, args: Sequence | None, *, solution: Solution | None = None) -> list[State]:
        """States with a gradient; the last one is the output of the layer.

        fn, args  the map, called as fn(z, *args)
        z         the solution, structure of the state; used as a constant
        solution  the record of the forward solve, for rules with needs_solver_state
        """


def flatten_state(fn: Callable, z: State, args: Sequence | None) -> tuple[Problem, Layout, Tensor]:
    """(map on matrices (B, D), layout of z, z as a constant matrix (B, D))."""
    layout = Layout.of(z)
    return Problem(fn, layout, args), layout, layout.pack(z).detach()


def _check_steps(steps: int, tau: float) -> None:
    if steps < 1:
        raise UserError(f"grad.steps must be >= 1, got {steps}. Without a step no gradient reaches the parameters.")
    if not 0 < tau <= 1:
        raise UserError(f"grad.tau must lie in (0, 1], got {tau}. 1 is undamped; the paper uses 0.5 to 0.7 for MDEQ.")


def _damped_step(problem: Problem, z: Tensor, tau: float, recompute: bool) -> Tensor:
    """tau f(z) + (1 - tau) z. With `recompute` the graph stores z only, and the backward pass evaluates f again."""
    fz = mem_gc(problem, (z,), module=problem.fn) if recompute else problem(z)
    return fz if tau == 1 else torch.lerp(z, fz, tau)


@dataclass(frozen=True, kw_only=True)
class OneStep(Gradient):
    """One-step gradient: one differentiable evaluation of f at the solution. (I - J)^-1 is replaced by I.

        dL/dtheta = g P

    Also called Jacobian-free backpropagation (arXiv 2103.12803). It is Hamburger's one-step gradient (arXiv 2109.04553)
    and the phantom gradient with steps=1, tau=1.

    recompute  store only the state and evaluate f again in the backward pass. With several states, the activations of
               one state at a time are in memory
    """

    recompute: bool = False

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = flatten_state(fn, z, args)
        return [layout.unpack(_damped_step(problem, flat, 1, self.recompute))]


@dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Phantom gradient, unrolled (UPG): `steps` damped differentiable steps from the detached solution.

        z_0 = stop(z*),  z_{t+1} = tau f(z_t) + (1 - tau) z_t;   output z_k,  k = steps    (arXiv 2111.05177, section 4)

    Autograd through these k steps gives

        dL/dtheta = g tau sum_{t=0}^{k-1} B(z_{k-1}) ... B(z_{t+1}) P(z_t),   B(z) = tau J(z) + (1 - tau) I

    steps      k >= 1
    tau        damping in (0, 1]; it also scales the gradient: by tau when steps = 1
    gap        return every gap-th state as well, for losses on intermediate states (TorchDEQ's sup_gap). None: only the
               last state
    at         return the states after these steps as well, each in 1 .. steps (TorchDEQ's sup_loc); excludes gap
    recompute  store only the states and evaluate f again in the backward pass: activations of one step, not of all

    Memory: the graphs of `steps` evaluations of f.
    """

    steps: int = 5
    tau: float = 0.5
    gap: int | None = None
    at: tuple[int, ...] = ()
    recompute: bool = False

    def __post_init__(self):
        _check_steps(self.steps, self.tau)
        if self.gap is not None and not 1 <= self.gap <= self.steps:
            raise UserError(f"grad.gap must lie in 1 .. steps={self.steps} or be null, got {self.gap}.")
        if any(not 1 <= position <= self.steps for position in self.at):
            raise UserError(f"grad.at must list steps in 1 .. {self.steps}, got {list(self.at)}.")
        if self.gap is not None and self.at:
            raise UserError("grad.gap and grad.at exclude each other. Set one of them.")

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = flatten_state(fn, z, args)
        returned_steps = set(range(self.gap, self.steps + 1, self.gap)) if self.gap else set(self.at)
        states = []
        for step in range(1, self.steps + 1):
            flat = _damped_step(problem, flat, self.tau, self.recompute)
            if step in returned_steps or step == self.steps:
                states.append(layout.unpack(flat))
        return states


class _RefuseSecondDerivative(torch.autograd.Function):
    """Identity on `rows` whose backward raises: the rules below give first derivatives only.

    rows   (B, D) the gradient that the rule computed without autograd
    grad   (B, D) and
    image  (B, D): `rows` depends on the incoming gradient and, through f, on every parameter and input. Both are inputs
           of this Function, so a second differentiation with respect to any of these calls `backward`
    """

    @staticmethod
    def forward(ctx, rows, grad, image):
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        raise UserError(
            "Second derivatives through an implicit or Neumann gradient are not available (they would be wrong: the "
            "solution is a constant there). Use Unrolled or Backprop for a gradient penalty."
        )


def replace_gradient(problem: Problem, flat: Tensor, rule: Callable) -> Tensor:
    """f(flat), (B, D). The backward pass replaces the incoming gradient g by rule(vjp, g) and multiplies that by P.

    rule  (vjp, g) -> rows (B, D), with vjp: v (B, D) -> v J (B, D)

    f is evaluated once and its graph is kept for all products with J. Under autocast the products use the data types of
    that evaluation.
    """
    point = flat.requires_grad_()
    image = problem(point)
    if not image.requires_grad:
        return image

    def hook(grad):
        if grad is None:  # the loss does not depend on this output
            return None
        with torch.no_grad():
            rows = rule(lambda v: _vjp(image, point, v), grad)
        return _RefuseSecondDerivative.apply(rows, grad, image) if torch.is_grad_enabled() else rows

    # The hook is on a view of the image. Products with J inside the hook start at the image, so they do not call it.
    image = image.contiguous()
    output = image.view_as(image)
    output.register_hook(hook)
    return output


def _vjp(image: Tensor, point: Tensor, rows: Tensor) -> Tensor:
    """rows times J = d image / d point, (B, D); zeros where f ignores its state."""
    (product,) = torch.autograd.grad(image, point, rows, retain_graph=True, allow_unused=True)
    return torch.zeros_like(point) if product is None else product


@dataclass(frozen=True, kw_only=True)
class Neumann(Gradient):
    """Phantom gradient from a truncated, damped Neumann series (NPG). J and P are both taken at the solution.

        dL/dtheta = g tau (I + B + ... + B^{k-1}) P,  B = tau J + (1 - tau) I       (arXiv 2111.05177, section 4)

    I - B = tau (I - J). So tau (I + B + B^2 + ...) = (I - J)^-1 where the spectral radius of B is below 1.

    steps  k >= 1: k - 1 vector-Jacobian products and one product with P
    tau    damping in (0, 1]. The limit for large k is the exact gradient, whatever tau is

    Memory: the graph of one evaluation of f, independent of k. The output is f(z*).
    """

    steps: int = 5
    tau: float = 0.5

    def __post_init__(self):
        _check_steps(self.steps, self.tau)

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = flatten_state(fn, z, args)

        def series(vjp, grad):
            term, total = grad, grad  # g B^i and the sum of the terms so far
            for _ in range(self.steps - 1):
                product = vjp(term)  # g B^i J;  g B^{i+1} = tau (g B^i J) + (1 - tau) g B^i
                term = product if self.tau == 1 else torch.lerp(term, product, self.tau)
                total = total + term
            return self.tau * total

        return [layout.unpack(replace_gradient(problem, flat, series))]


BACKWARD_SOLVER = Picard(max_iter=40, tol=1e-6)


class Implicit(Gradient):
    """Exact gradient by the implicit function theorem. The backward pass solves a linear fixed-point system:

        y = y J + g,   that is y = g (I - J)^-1;      dL/dtheta = y P

    solver     solver of the backward system, any of `common.deq.solvers`, with its own max_iter and tolerance
    recompute  False: the graph of f(z*) is kept, and a hook on the output runs the backward solve. True: an autograd
               Function evaluates f again in the backward pass, one evaluation more; this also works for a compiled fn
    throw      raise NotConverged when the backward solve does not reach its tolerance

    report     attribute: Solution of the last backward solve
    on_report  attribute: if set, it is called with the Solution of each backward solve

    The gradient is exact when both solves converge. A backward solve that diverges warns, unless its solver has
    stop="never". Memory: the graph of one evaluation, whatever number of steps the two solvers take. Second derivatives
    raise UserError.
    """

    def __init__(self, *, solver: Solver = BACKWARD_SOLVER, recompute: bool = False, throw: bool = False):
        self.solver, self.recompute, self.throw = solver, recompute, throw
        self.report: Solution | None = None
        self.on_report: Callable[[Solution], None] | None = None

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = flatten_state(fn, z, args)
        if self.recompute:
            return [layout.unpack(replace_gradient_by_recomputing(problem, flat, self._solve_backward))]
        return [layout.unpack(replace_gradient(problem, flat, self._solve_backward))]

    def _solve_backward(self, vjp: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        # The solve starts at y = g, the first iterate from y = 0. Rows of g that are not finite are returned unchanged:
        # loss scaling (torch.amp.GradScaler) detects an overflow by them.
        finite = torch.isfinite(grad).all(dim=1, keepdim=True)
        start = torch.where(finite, grad, 0.0)
        solution = solve(lambda y: vjp(y) + start, start, solver=self.solver, throw=self.throw)
        self.report = solution.detached()
        self._warn_of_divergence(self.report)
        if self.on_report is not None:
            self.on_report(self.report)
        y = solution.z
        assert isinstance(y, Tensor)
        return torch.where(finite, y, grad)

    def _warn_of_divergence(self, report: Solution) -> None:
        # A solver with stop="never" does not wait for the device. Reading its residuals here would.
        if self.solver.stop == "never" or not self.solver.max_iter or isinstance(report.converged, FakeTensor):
            return
        if not bool(report.converged.all()) and report.diverged():
            warnings.warn(f"The backward solve failed: {report.message}", stacklevel=3)


class Shine(Gradient):
    """SHINE (arXiv 2106.00553): the backward pass reuses the inverse Jacobian that the forward Broyden solve estimated.

        y = g (I - J)^-1 = -g (J - I)^-1   is replaced by   -g H,   H = Broyden's estimate of (J - I)^-1

    refine  further steps y <- y J + g, starting from that y. 0: no product with J in the backward pass

    The forward solver must be `Broyden`. Its history, 2 x pairs states, is kept until the backward pass.
    """

    needs_solver_state = True

    def __init__(self, *, refine: int = 0):
        if refine < 0:
            raise UserError(f"grad.refine must be >= 0, got {refine}. 0 is SHINE as published.")
        self.refine = refine

    def attach(self, fn, z, args, *, solution=None):
        state = solution.solver_state if solution is not None else None
        if not state or "inverse" not in state:
            raise UserError("Shine reuses the inverse of a Broyden solve. Set solver to common.deq.solvers.Broyden.")
        problem, layout, flat = flatten_state(fn, z, args)
        history = {key: state[key] for key in ("s", "a", "inverse")}

        def rows(vjp, grad):
            with torch.autocast(grad.device.type, enabled=False):
                y = Broyden.left_inverse(history, grad)
            for _ in range(self.refine):
                y = vjp(y) + grad
            return y

        return [layout.unpack(replace_gradient(problem, flat, rows))]


class _RecomputeInBackward(torch.autograd.Function):
    """Identity on the image of f. Its backward evaluates f again, with a graph, to compute products with J."""

    @staticmethod
    def forward(ctx, image, point, problem, rule):
        ctx.problem, ctx.rule, ctx.autocast = problem, rule, _autocast_state(point.device.type)
        ctx.held_state = RestoreHeldState(problem.fn)
        ctx.save_for_backward(point)
        return image.view_as(image)

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        with ctx.held_state, torch.enable_grad(), torch.autocast(saved.device.type, **ctx.autocast):
            point = saved.detach().requires_grad_()
            image = ctx.problem(point)
        with torch.no_grad():
            rows = ctx.rule(lambda v: _vjp(image, point, v), grad.detach())
        return (_RefuseSecondDerivative.apply(rows, grad, image) if torch.is_grad_enabled() else rows), None, None, None


def _autocast_state(device: str) -> dict:
    return {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}


def replace_gradient_by_recomputing(problem: Problem, flat: Tensor, rule: Callable) -> Tensor:
    """As `replace_gradient`, but no graph of f is kept: the backward pass evaluates f again."""
    return _RecomputeInBackward.apply(problem(flat), flat, problem, rule)


@dataclass(frozen=True, kw_only=True)
class Backprop(Gradient):
    """Full unrolling: the forward pass is `steps` damped differentiable steps from z0, all of them in the graph.

        z_{t+1} = tau f(z_t) + (1 - tau) z_t,   t = 0 .. steps - 1

    steps      None: the solver's max_iter. The solver's own step is not used: this rule always takes plain damped steps
    tau        damping in (0, 1]
    recompute  store only the states and evaluate f again in the backward pass

    This is the only rule whose gradient reaches z0. Memory grows with the number of steps.
    """

    steps: int | None = None
    tau: float = 1.0
    recompute: bool = False

    replaces_solver = True

    def __post_init__(self):
        _check_steps(1 if self.steps is None else self.steps, self.tau)

    def attach(self, fn, z, args, *, solution=None):
        return Unrolled(steps=self.steps or 1, tau=self.tau, recompute=self.recompute).attach(fn, z, args)

    def run(
        self, fn: Callable, z0: State, args: Sequence | None, *, solver: Solver, states_at=(), trajectory: bool = False
    ) -> Solution:
        """The forward pass with its graph, as a Solution.

        Its residual is measured at z_{steps-1}, whose damped image is the answer, as for `Picard`. Arguments: `solve`.
        """
        layout = Layout.of(z0)
        problem, z = Problem(fn, layout, args), layout.pack(z0)
        steps = solver.max_iter if self.steps is None else self.steps
        if steps < 1:
            raise UserError("Backprop without steps unrolls solver.max_iter=0 steps. Set grad.steps or raise max_iter.")
        states = {0: z}
        for step in range(1, steps + 1):
            states[step] = z = _damped_step(problem, z, self.tau, self.recompute)
        measured_at = states[steps - 1]
        with torch.no_grad():
            one_step = Picard(max_iter=1, tol=solver.tol, stop=solver.stop)
            # z = tau f(y) + (1 - tau) y at y = measured_at, so f(y) = y + (z - y) / tau without another evaluation
            image = z if self.tau == 1 else measured_at + (z - measured_at) / self.tau
            found = _iterate(
                _KnownImage(layout, image), measured_at.detach(), one_step, states_at=(), trajectory=False, static=True,
                check_every=1, compact=False,
            )  # fmt: skip
        count = torch.full_like(found.steps, steps)
        output = layout.unpack(z)
        return replace(
            found, z=output, converged=found.residual <= solver.tol, steps=count, evaluations=count,
            calls=problem.calls, samples=problem.samples, max_iter=steps,
            states=[layout.unpack(states[p]) if p in states else output for p in states_at],
            trajectory=[layout.unpack(states[p].detach()) for p in range(steps)] if trajectory else None,
        )  # fmt: skip


class _KnownImage(Problem):
    """A map that is evaluated at one point only, where its image is already known."""

    def __init__(self, layout: Layout, image: Tensor):
        super().__init__(lambda z: z, layout, None, static=True)
        self.image = image.detach()

    def __call__(self, z: Tensor) -> Tensor:
        return self.image
