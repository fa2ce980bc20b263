"""How an equilibrium is differentiated, chosen independently of the solver that found it.

With J = df/dz and P = df/dtheta at z* and g = dL/dz* (row vectors), the exact gradient of a fixed point is

    dL/dtheta = g (I - J)^-1 P                                   (implicit function theorem)

Every rule here replaces (I - J)^-1 P by something computable: On Training Implicit Models (arXiv 2111.05177).
The solution enters as a constant, so a gradient with respect to z0 is zero for every rule but `Backprop`.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from common.deq.problem import Problem
from common.deq.recompute import AsBefore, mem_gc
from common.deq.solution import Solution
from common.deq.solve import _iterate, solve
from common.deq.solvers import Broyden, Picard, Solver
from common.deq.structure import Layout, State
from common.errors import UserError

# Products with J walk one graph many times, so a compiled f must not give its buffers away in the first. Has to be off
# before f is compiled and stay off: torch looks at the switch again in each backward pass.
functorch.donated_buffer = False


class Gradient(ABC):
    """Abstract: `attach` turns a constant solution into states that autograd can differentiate."""

    needs_solver_state = False  # True: the forward solver's history is used, so samples must not leave the batch
    replaces_solver = False  # True: `run` is the forward pass, too

    @abstractmethod
    def attach(self, fn: Callable, z: State, args: Sequence | None, *, solution: Solution | None = None) -> list[State]:
        """States with gradient, the last one is the layer's output; z is the solution, a constant."""


def _detach(z: State) -> State:
    return pytree.tree_map(lambda leaf: leaf.detach(), z)


def _flat(fn: Callable, z: State, args: Sequence | None) -> tuple[Problem, Layout, Tensor]:
    layout = Layout.of(z)
    return Problem(fn, layout, args), layout, layout.pack(z).detach()


def _check_steps(steps: int, tau: float) -> None:
    if steps < 1:
        raise UserError(f"grad.steps must be >= 1, got {steps}. Without a step no gradient reaches the parameters.")
    if not 0 < tau <= 1:
        raise UserError(f"grad.tau must lie in (0, 1], got {tau}. 1 is undamped; the paper uses 0.5 to 0.7 for MDEQ.")


def _damped(problem: Problem, z: Tensor, tau: float, recompute: bool) -> Tensor:
    """tau f(z) + (1 - tau) z; with `recompute` only z is kept for the backward pass."""
    fz = mem_gc(problem, (z,), module=problem.fn) if recompute else problem(z)
    return fz if tau == 1 else torch.lerp(z, fz, tau)


@dataclass(frozen=True, kw_only=True)
class OneStep(Gradient):
    """One differentiable application at the solution: (I - J)^-1 replaced by I. Also known as Jacobian-free.

    Hamburger's one-step gradient (arXiv 2109.04553) and the phantom gradient with steps 1, tau 1.
    recompute  keep only the state and evaluate f again in the backward pass: with several states, the activations of
               one of them at a time
    """

    recompute: bool = False

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = _flat(fn, z, args)
        return [layout.unpack(_damped(problem, flat, 1, self.recompute))]


@dataclass(frozen=True, kw_only=True)
class Unrolled(Gradient):
    """Phantom gradient, unrolled (UPG): `steps` damped differentiable steps from the detached solution.

        z_0 = stop(z*),  z_{t+1} = tau f(z_t) + (1 - tau) z_t;   output z_steps      (2111.05177, section 4)

    steps      k >= 1
    tau        damping in (0, 1]; also scales the gradient: near tau for steps 1
    gap        also return every gap-th state, for supervision along the way (torchdeq's sup_gap); None: only the last
    at         also return these states, 1 .. steps (torchdeq's sup_loc); not together with gap
    recompute  keep only the states and evaluate f again in the backward pass: memory of one step instead of `steps`

    Memory: the graphs of `steps` evaluations.
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
        problem, layout, flat = _flat(fn, z, args)
        wanted = set(range(self.gap, self.steps + 1, self.gap)) if self.gap else set(self.at)
        states = []
        for step in range(1, self.steps + 1):
            flat = _damped(problem, flat, self.tau, self.recompute)
            if step in wanted or step == self.steps:
                states.append(layout.unpack(flat))
        return states


class _RefuseSecond(torch.autograd.Function):
    """rows, with a derivative that is refused: the rules below give first derivatives only.

    rows come from a solve without autograd. What they depend on, the incoming gradient and through f every parameter
    and input, is passed as inputs, so that a second differentiation by any of these calls `backward`.
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


def _replace_gradient(problem: Problem, flat: Tensor, rule: Callable) -> Tensor:
    """f(flat), whose incoming gradient g is replaced by rule(vjp, g) before it goes on to the parameters.

    rule  (v -> v J, g) -> rows (B, D)
    One evaluation of f and its graph, whatever the rule does. Under autocast the graph has the forward's types.
    """
    point = flat.requires_grad_()
    image = problem(point)
    if not image.requires_grad:
        return image

    def hook(grad):
        if grad is None:  # nothing came back along this output
            return None
        with torch.no_grad():
            rows = rule(lambda v: _vjp(image, point, v), grad)
        return _RefuseSecond.apply(rows, grad, image) if torch.is_grad_enabled() else rows

    # the hook sits behind the image: inside it, products with J start at the image itself and do not meet it again
    image = image.contiguous()
    output = image.view_as(image)
    output.register_hook(hook)
    return output


def _vjp(image: Tensor, point: Tensor, rows: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(image, point, rows, retain_graph=True, allow_unused=True)
    return torch.zeros_like(point) if product is None else product


@dataclass(frozen=True, kw_only=True)
class Neumann(Gradient):
    """Phantom gradient by a truncated damped Neumann series (NPG), everything at the solution.

        dL/dtheta = g tau (I + B + ... + B^{k-1}) P,  B = tau J + (1 - tau) I           (2111.05177, section 4)

    steps  k >= 1: k - 1 vector-Jacobian products and one product with P
    tau    damping in (0, 1]; as k grows the limit is the exact gradient for every tau

    Memory: the graph of one evaluation, independent of k. The output is f(z*).
    """

    steps: int = 5
    tau: float = 0.5

    def __post_init__(self):
        _check_steps(self.steps, self.tau)

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = _flat(fn, z, args)

        def series(vjp, grad):
            term, total = grad, grad
            for _ in range(self.steps - 1):
                product = vjp(term)
                term = product if self.tau == 1 else torch.lerp(term, product, self.tau)
                total = total + term
            return self.tau * total

        return [layout.unpack(_replace_gradient(problem, flat, series))]


BACKWARD = Picard(max_iter=40, tol=1e-6)


class Implicit(Gradient):
    """Exact gradient by the implicit function theorem: the backward pass solves y = y J + g, then goes through P.

    solver     of the backward system, any of `common.deq.solvers`, with its own budget and tolerance
    recompute  False: the graph of f(z*) is kept (a hook on the output); True: f is evaluated again in the backward pass
               (an autograd Function), which also serves a compiled fn and costs one evaluation more
    throw      raise NotConverged when the backward solve misses its tolerance

    report     Solution of the last backward solve; `on_report(solution)` is called with each when set

    Exact when both solves converge; a backward solve that diverges warns, unless its solver has stop=never. Memory: the
    graph of one evaluation, independent of both solvers' steps. Second derivatives are refused with an error.
    """

    def __init__(self, *, solver: Solver = BACKWARD, recompute: bool = False, throw: bool = False):
        self.solver, self.recompute, self.throw = solver, recompute, throw
        self.report: Solution | None = None
        self.on_report: Callable[[Solution], None] | None = None

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = _flat(fn, z, args)
        if self.recompute:
            return [layout.unpack(_recomputed(problem, flat, self._rows))]
        return [layout.unpack(_replace_gradient(problem, flat, self._rows))]

    def _rows(self, vjp: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        # From y = g, the first iterate from 0. A gradient that is not finite stays so: loss scaling looks for it.
        finite = torch.isfinite(grad).all(dim=1, keepdim=True)
        start = torch.where(finite, grad, 0.0)
        found = solve(lambda y: vjp(y) + start, start, solver=self.solver, throw=self.throw)
        self.report = found.detached()
        self._warn_of_divergence(self.report)
        if self.on_report is not None:
            self.on_report(self.report)
        rows = found.z
        assert isinstance(rows, Tensor)
        return torch.where(finite, rows, grad)

    def _warn_of_divergence(self, report: Solution) -> None:
        # a solver with stop="never" never synchronises, so nothing is read here either
        if self.solver.stop == "never" or not self.solver.max_iter or isinstance(report.converged, FakeTensor):
            return
        if not bool(report.converged.all()) and report.diverged():
            warnings.warn(f"The backward solve failed: {report.message}", stacklevel=3)


class Shine(Gradient):
    """SHINE (arXiv 2106.00553): the inverse estimated by the forward Broyden solve serves the backward pass.

        y = g (I - J)^-1  is replaced by  -g H,  H = Broyden's estimate of (J - I)^-1

    refine  steps of y <- y J + g from there; 0: none, so the backward pass needs no product with J at all

    Needs `Broyden` as forward solver. Its memory must outlive the forward pass: 2 x pairs states.
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
        problem, layout, flat = _flat(fn, z, args)
        history = {key: state[key] for key in ("s", "a", "inverse")}

        def rows(vjp, grad):
            with torch.autocast(grad.device.type, enabled=False):
                y = Broyden.left_inverse(history, grad)
            for _ in range(self.refine):
                y = vjp(y) + grad
            return y

        return [layout.unpack(_replace_gradient(problem, flat, rows))]


class _Recomputed(torch.autograd.Function):
    """The identity on the image of f; its backward evaluates f once more to get products with J."""

    @staticmethod
    def forward(ctx, image, point, problem, rule):
        ctx.problem, ctx.rule, ctx.autocast = problem, rule, _autocast_state(point.device.type)
        ctx.before = AsBefore(problem.fn)
        ctx.save_for_backward(point)
        return image.view_as(image)

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        with ctx.before, torch.enable_grad(), torch.autocast(saved.device.type, **ctx.autocast):
            point = saved.detach().requires_grad_()
            image = ctx.problem(point)
        with torch.no_grad():
            rows = ctx.rule(lambda v: _vjp(image, point, v), grad.detach())
        return (_RefuseSecond.apply(rows, grad, image) if torch.is_grad_enabled() else rows), None, None, None


def _autocast_state(device: str) -> dict:
    return {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}


def _recomputed(problem: Problem, flat: Tensor, rule: Callable) -> Tensor:
    return _Recomputed.apply(problem(flat), flat, problem, rule)


@dataclass(frozen=True, kw_only=True)
class Backprop(Gradient):
    """Full unroll: the solve itself is `steps` damped differentiable applications from z0, all kept in the graph.

    steps      None: the solver's max_iter. The solver's own rule is not used: its mixing is not worth differentiating
    tau        damping in (0, 1]
    recompute  keep only the states, evaluate f again in the backward pass

    The one rule whose gradient reaches z0. Memory grows with the steps.
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
        """The forward pass with its graph. The Solution is measured at the last point but one, as for `Picard`."""
        layout = Layout.of(z0)
        problem, z = Problem(fn, layout, args), layout.pack(z0)
        steps = solver.max_iter if self.steps is None else self.steps
        if steps < 1:
            raise UserError("Backprop without steps unrolls solver.max_iter=0 steps. Set grad.steps or raise max_iter.")
        states = {0: z}
        for step in range(1, steps + 1):
            states[step] = z = _damped(problem, z, self.tau, self.recompute)
        before = states[steps - 1]
        with torch.no_grad():
            measured = Picard(max_iter=1, tol=solver.tol, stop=solver.stop)
            image = z if self.tau == 1 else before + (z - before) / self.tau
            found = _iterate(
                _Known(layout, image), before.detach(), measured, states_at=(), trajectory=False, static=True,
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


class _Known(Problem):
    """A map whose one value is known."""

    def __init__(self, layout: Layout, image: Tensor):
        super().__init__(lambda z: z, layout, None, static=True)
        self.image = image.detach()

    def __call__(self, z: Tensor) -> Tensor:
        return self.image
