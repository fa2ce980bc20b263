"""The one loop behind every equilibrium: evaluate, measure, remember the best, let finished samples go, step.

    z* = fn(z*, x)

A solver (`common.deq.solvers`) says how to start, take one step, decide to stop and finish; a gradient rule
(`common.deq.grads`) says how to differentiate the answer. The two are chosen independently. TorchDEQ (arXiv 2310.18605)
calls the residual f(z) - z and stops on its norm, absolute or relative to ||f(z)||; so does this file, per sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from common.deq.structure import Layout, State, take_rows
from common.errors import UserError

if TYPE_CHECKING:
    from common.deq.solvers import Solver

EPS = 1e-9  # keeps the relative residual defined where fn(z) = 0
LEAVE_BELOW = 0.8  # rows are taken out once at most this share of them still runs: copying the rest pays off then


class NotConverged(UserError):
    """`solve(..., throw=True)` ended without a fixed point for every sample."""


class Point(NamedTuple):
    """What a solver's step sees; all (B, D) or (B,), rows = samples still in the batch."""

    z: Tensor
    fz: Tensor
    gz: Tensor  # fn(z) - z
    residual: Tensor  # (B,) in the solver's stop mode
    relative: Tensor  # (B,) ||gz|| / ||fz||, whatever the stop mode
    size: Tensor  # (B,) ||fz||
    best: Tensor  # value the sample would return if it ended now
    running: Tensor  # (B,) bool: False for samples that have ended and only wait for the others
    lost: Tensor | None  # (B,) bool: samples to be sent back to their best state; None: known to be none


class Problem:
    """The map on matrices (B, D): `problem(z)`, `problem.jvp(z, v)`. Counts its calls; rows can leave."""

    def __init__(self, fn: Callable, layout: Layout, args: Sequence | None, static: bool = False):
        self.fn, self.layout, self.args = fn, layout, tuple(args or ())
        self.static = static  # shapes only: no value may be looked at
        self.known: tuple[Tensor, Tensor] | None = None  # (z, fn(z)) a solver's step has evaluated already
        self.calls = 0  # of fn, whatever the batch
        self.samples = 0  # samples those calls evaluated
        self.autocast: Callable | None = None  # makes the context fn runs in, where it is not the one around

    def __call__(self, z: Tensor) -> Tensor:
        if self.known is not None and self.known[0] is z:
            fz, self.known = self.known[1], None
            return fz
        self.calls += 1
        self.samples += len(z)
        version = None if z.is_inference() else z._version
        if self.autocast is None:
            image = self.fn(self.layout.unpack(z), *self.args)
        else:
            with self.autocast():
                image = self.fn(self.layout.unpack(z), *self.args)
        if version is not None and z._version != version:
            raise UserError("fn wrote into its state in place. Return a new tensor: z * 0.5 instead of z.mul_(0.5).")
        return self.layout.pack_image(image, len(z))

    @contextmanager
    def only_fn_autocast(self, device: str) -> Iterator[None]:
        """Under autocast: fn runs in the lower precision, the solver's own products around it do not."""
        if not torch.is_autocast_enabled(device):
            yield
            return
        dtype, cache = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        self.autocast = lambda: torch.autocast(device, dtype=dtype, cache_enabled=cache)
        with torch.autocast(device, enabled=False):
            yield
        self.autocast = None

    def jvp(self, z: Tensor, v: Tensor) -> Tensor:
        """J(z) v by forward-mode differentiation, (B, D). Counts as one call."""
        if z.is_inference():  # in inference mode forward-mode derivatives are silently zero before torch 2.12
            with torch.inference_mode(False):
                return self.jvp(z.clone(), v.clone())
        with warnings.catch_warnings():  # torch's own forward rules use a deprecated compiler
            warnings.simplefilter("ignore", FutureWarning)
            return torch.func.jvp(self, (z,), (v,))[1].to(v.dtype)  # without dimensions, torch may widen it

    def take(self, rows: Tensor) -> None:
        self.args = take_rows(self.args, rows)


@dataclass
class Solution:
    """What `solve` found. All (B,) tensors are in the order of the batch, whoever left it first.

    z             state of the structure of z0: of each sample the one with the smallest residual that was finite
    converged     (B,) bool: the residual of the solver's stop mode reached its tolerance
    residual_abs  (B,) ||fn(z) - z||, measured where z was found
    residual_rel  (B,) the same over ||fn(z)||
    steps         (B,) int: steps taken by the sample
    evaluations   (B,) int: evaluations of fn the sample needed, Jacobian products and line searches included
    calls         int: how often fn was called, whatever the size of the batch
    samples       int: samples those calls evaluated; B * calls without compaction
    states        list of states at the positions asked for
    trajectory    list of the points fn was evaluated at (opt-in), else None
    stop, tol     of the solver
    trace         [(rows or None, abs, rel residual of those)] per evaluation; see `residual_trace`
    backward      Solution of the last backward solve, set by gradient rules that have one
    """

    z: State
    converged: Tensor
    residual_abs: Tensor
    residual_rel: Tensor
    steps: Tensor
    evaluations: Tensor
    calls: int
    samples: int
    stop: str
    tol: float
    max_iter: int
    states: list[State] = field(default_factory=list)
    trajectory: list[State] | None = None
    trace: list[tuple[Tensor | None, Tensor, Tensor]] = field(default_factory=list)
    solver_state: dict | None = None
    backward: Solution | None = None

    @property
    def residual(self) -> Tensor:
        """(B,) residual of the stop mode."""
        return self.residual_abs if self.stop == "abs" else self.residual_rel

    @property
    def residual_trace(self) -> tuple[Tensor, Tensor]:
        """Absolute and relative residual after each evaluation, (B, N) each; who left keeps the last value."""
        rows = len(self.steps)
        filled = [torch.full((2, rows), float("nan"), dtype=self.residual_abs.dtype, device=self.steps.device)]
        for index, absolute, relative in self.trace:
            measured = torch.stack([absolute, relative])
            filled.append(measured if index is None else filled[-1].index_copy(1, index, measured))
        if len(filled) == 1:
            empty = self.residual_abs.new_empty(rows, 0)
            return empty, empty
        both = torch.stack(filled[1:], dim=2)
        return both[0], both[1]

    @property
    def message(self) -> str:
        """One sentence: how it ended, and what to change when it did not converge. Reads the device."""
        rows = len(self.steps)
        if rows == 0:
            return "The batch is empty."
        failed = rows - int(self.converged.sum())
        if not failed:
            return f"All {rows} samples converged within {int(self.steps.max())} steps."
        if self.max_iter == 0:
            return "No steps were asked for (max_iter=0): the initial state is returned unmeasured."
        worst = self.residual[~self.converged]
        if self._diverged():
            return (
                f"{failed} of {rows} samples diverged: the map is no contraction along the path taken. Damp it (tau < 1"
                f"), normalise its weights (common.deq.layers), start nearer, or use Broyden or NewtonKrylov."
            )
        return (
            f"{failed} of {rows} samples did not reach {self.stop} residual {self.tol:g} in {self.max_iter} steps "
            f"(worst {float(worst.max()):.2g}). Raise max_iter or tol, or use Anderson, Broyden or NewtonKrylov."
        )

    def _diverged(self) -> bool:
        """A sample that did not converge ended non-finite or ten times above its first residual."""
        if not self.trace:
            return not bool(torch.isfinite(self.residual_abs).all())
        trace = self.residual_trace[0][~self.converged]
        return not bool((trace[:, -1] <= 10 * trace[:, 0]).all())

    def detached(self) -> Solution:
        """The same record without z, states and solver state: numbers only, nothing that holds a graph."""
        return Solution(
            None, self.converged, self.residual_abs, self.residual_rel, self.steps, self.evaluations, self.calls,
            self.samples, self.stop, self.tol, self.max_iter, trace=self.trace, backward=self.backward,
        )  # fmt: skip


def solve(
    fn: Callable,
    z0: State,
    args: Sequence | None = None,
    *,
    solver: Solver,
    grad=None,
    states_at: Sequence[int] = (),
    trajectory: bool = False,
    compact: bool = True,
    check_every: int = 1,
    throw: bool = False,
) -> Solution:
    """A fixed point z = fn(z, *args) per sample, from z0.

    fn           map of the state, called as fn(z, *args); a plain function or module
    z0           initial state: a tensor (B, ...) or nested tuples, lists, dicts of them; any floating dtype, any device
    args         per-sample inputs, every tensor (B, ...): rows follow their sample when it leaves the batch. None: fn
                 is a closure over the whole batch, so finished samples stay in it, frozen
    solver       `common.deq.solvers`
    grad         `common.deq.grads`: attached to the solution. None: the solution is a constant
    states_at    positions p (steps, 1 .. max_iter) whose states are returned too: the best state after p steps. As many
                 as asked for, whenever the solver stopped: samples that had ended by then give their solution
    trajectory   also keep every point fn was evaluated at (memory: one state per step)
    compact      samples that have ended leave the batch (needs args): easy samples stop costing while hard ones run
    check_every  steps between two looks at the residual, each one synchronisation with the device; a sample that has
                 converged in between is frozen at once, only the batch goes on
    throw        raise NotConverged, naming cause and remedy, unless every sample converged

    The solve itself runs without autograd. A sample's path does not depend on the others: what is not finite in one
    never reaches another, and ends that sample alone. Deterministic: draws nothing.
    Memory beside fn: the state about five times, plus the solver's history (see the solver).
    Raises UserError for a z0 that is not finite, fn changing shape or structure, args of another batch size.
    """
    layout = Layout.of(z0)
    z = layout.pack(z0).detach()
    static = isinstance(z, FakeTensor)  # shapes only: nothing can be tested, every step is taken
    steps = (grad.steps if grad is not None and grad.replaces_solver else None) or solver.max_iter
    _check(z, args, states_at, check_every, steps, static)
    if grad is not None and grad.replaces_solver:
        found = grad.run(fn, z0, args, solver=solver, states_at=states_at, trajectory=trajectory)
        if throw and not bool(found.converged.all()):
            raise NotConverged(found.message)
        return found
    problem = Problem(fn, layout, args, static)
    with torch.no_grad(), problem.only_fn_autocast(z.device.type):
        found = _iterate(
            problem, z, solver, states_at=states_at, trajectory=trajectory, static=static, check_every=check_every,
            compact=compact and args is not None and not (grad is not None and grad.needs_solver_state),
        )  # fmt: skip
    if throw and not bool(found.converged.all()):
        raise NotConverged(found.message)
    if grad is not None:
        found.z = grad.attach(fn, found.z, args, solution=found)[-1]
    return found


def _check(z: Tensor, args, states_at, check_every: int, steps: int, static: bool) -> None:
    for leaf in torch.utils._pytree.tree_leaves(tuple(args or ())):
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != len(z)):
            raise UserError(
                f"args of solve must be per-sample tensors with {len(z)} rows like z0, got shape {tuple(leaf.shape)}. "
                f"Close over what all samples share: lambda z, x: fn(z, x, shared)."
            )
    if check_every < 1:
        raise UserError(f"check_every must be >= 1, got {check_every}. Set check_every=1 to stop as early as possible.")
    for position in states_at:
        if not 1 <= position <= max(steps, 1):
            raise UserError(f"states_at must lie in 1 .. max_iter={steps}, got {position}. Change the position.")
    if not static and len(z) and not bool(torch.isfinite(z).all()):
        raise UserError("z0 is not finite. Start from a finite state, for example zeros.")


def _iterate(problem, z, solver, *, states_at, trajectory, static, check_every, compact) -> Solution:
    batch, device = len(z), z.device
    by_size, never = solver.stop != "abs", solver.stop == "never"
    best, best_abs = z, z.new_full((batch,), float("inf"))
    best_rel = floor = best_abs  # floor: smallest absolute one since the sample last went back
    evaluations = torch.zeros(batch, dtype=torch.int64, device=device)  # of the samples that have ended
    converged = torch.zeros(batch, dtype=torch.bool, device=device)
    running = ~converged
    index = None  # rows of the whole batch still here; None: all
    whole = None  # the parts (see below) of the whole batch, once rows have left it
    state = solver.init(z)
    trace, snapshots, points = [], [], []
    lead = 0 if solver.returns_image else 1  # a point is measured one evaluation after the step that made it
    last = solver.max_iter + lead if batch and solver.max_iter else 0
    number, frozen, left = 0, False, batch  # frozen: some rows have ended and wait

    for number in range(1, last + 1):
        fz = problem(z)
        gz = fz - z
        absolute, relative, size = _measure(fz, gz)
        residual, before = (relative, best_rel) if by_size else (absolute, best_abs)
        image = solver.finish(z, fz, gz)
        better = torch.isfinite(residual) if never else residual < before
        looks = not (never or static or number % check_every)
        lost = None
        if looks and not frozen and bool((better & (residual > solver.tol)).all()):
            # the usual step: everybody improves and goes on
            best, best_abs, best_rel, floor = image, absolute, relative, absolute
        else:
            best = torch.where(better[:, None], image, best)
            best_abs = torch.where(better, absolute, best_abs)
            best_rel = torch.where(better, relative, best_rel)
            if not (never or static):
                ended, failed = solver.terminate(state, residual)
                stopping = running & (ended | failed)
                converged = converged | (ended & running)
                evaluations = torch.where(stopping, number, evaluations)
                running = running & ~stopping
                lost, frozen = solver.lost(absolute, floor), True
                if lost is not None:
                    floor = torch.where(lost, float("inf"), torch.minimum(floor, absolute))
            if looks:
                left, astray = torch.stack([running, running if lost is None else lost & running]).sum(1).tolist()
                lost, frozen = lost if lost is not None and astray else None, left < len(running)
        trace.append((index, absolute, relative))
        if trajectory:
            points.append((index, z))
        if number - lead in states_at:
            snapshots.append((number - lead, index, best))
        if left == 0 or number == last:
            break
        if compact and frozen and looks and left <= LEAVE_BELOW * len(running):
            whole = _write_back(whole, index, (best, best_abs, best_rel, evaluations, converged, state.get("extra")))
            keep = running.nonzero().squeeze(1)
            index = keep if index is None else index[keep]
            moving = (
                z, fz, gz, best, best_abs, best_rel, floor, residual, relative, size, evaluations, converged, running,
                lost,
            )  # fmt: skip
            *moving, state = take_rows((*moving, state), keep)
            (z, fz, gz, best, best_abs, best_rel, floor, residual, relative, size, evaluations, converged, running,
             lost) = moving  # fmt: skip
            problem.take(keep)
            frozen = False
        moved = solver.step(problem, state, number, Point(z, fz, gz, residual, relative, size, best, running, lost))
        if frozen and not (problem.known and problem.known[0] is moved):  # a search leaves them where they are
            moved = torch.where(running[:, None], moved, z)
        z = moved

    evaluations = torch.where(running, number, evaluations)
    parts = (best, best_abs, best_rel, evaluations, converged, state.get("extra"))
    best, best_abs, best_rel, evaluations, converged, extra = _write_back(whole, index, parts)
    if never and batch:
        converged = best_rel <= solver.tol
    layout = problem.layout
    spread = lambda rows, part: part if rows is None else best.index_copy(0, rows, part)
    states = {position: layout.unpack(spread(rows, part)) for position, rows, part in snapshots}
    z_best = layout.unpack(best)
    return Solution(
        z=z_best,
        converged=converged,
        residual_abs=best_abs,
        residual_rel=best_rel,
        steps=(evaluations - lead).clamp_(min=0),
        evaluations=evaluations if extra is None else evaluations + extra,
        calls=problem.calls,
        samples=problem.samples,
        stop="rel" if never else solver.stop,
        tol=solver.tol,
        max_iter=solver.max_iter,
        states=[states.get(position, z_best) for position in states_at],
        trajectory=[layout.unpack(spread(rows, part)) for rows, part in points] if trajectory else None,
        trace=trace,
        solver_state=state,
    )


def _measure(fz: Tensor, gz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Absolute residual, relative residual, norm of the image, (B,) each."""
    absolute = torch.linalg.vector_norm(gz, dim=1)
    size = torch.linalg.vector_norm(fz, dim=1)
    # 0 * size is not a number where the norm overflows, which must not look like a residual of 0
    return absolute, torch.add(absolute / (size + EPS), size, alpha=0), size


def _write_back(whole, index: Tensor | None, parts: tuple) -> tuple:
    """The parts of the rows still here put into their places of the whole batch."""
    if index is None:
        return parts
    return tuple(
        None if part is None else old.index_copy(0, index, part) for old, part in zip(whole, parts, strict=True)
    )
