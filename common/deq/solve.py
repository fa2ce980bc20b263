"""The one loop behind every equilibrium: evaluate, measure, keep the best state, drop ended samples, step.

    z* = fn(z*, x)

A solver (`common.deq.solvers`) says how to start, take one step, decide to stop and finish; a gradient rule
(`common.deq.grads`) says how to differentiate the answer. The two are chosen independently. TorchDEQ (arXiv 2310.18605)
calls the residual f(z) - z and stops on its norm, absolute or relative to ||f(z)||; so does this file, per sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from common.deq.problem import Problem
from common.deq.rows import Rows
from common.deq.solution import Solution
from common.deq.structure import Layout, State
from common.errors import UserError, nearest

if TYPE_CHECKING:
    from common.deq.solvers import Solver

EPS = 1e-9  # added to ||f(z)|| in TorchDEQ's relative residual; used by common.torchdeq only
LEAVE_BELOW = 0.8  # rows are taken out once at most this share of them still runs: copying the rest pays off then


class NotConverged(UserError):
    """`solve(..., throw=True)` ended without a fixed point for every sample."""


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
    **unknown,
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
    throw        raise NotConverged, with the cause and what to change, unless every sample converged

    The solve itself runs without autograd. A sample's iterates do not depend on the other samples: a value that is not
    finite ends its own sample only. Deterministic: uses no random numbers.
    Memory besides fn: about five times the state, plus the solver's history (see the solver).
    Raises UserError for a z0 that is not finite, fn changing shape or structure, args of another batch size, a solver
    or gradient rule given by name, unknown keywords.
    """
    _check_objects(solver, grad, unknown)
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


def _check_objects(solver, grad, unknown: dict) -> None:
    if unknown:
        name = next(iter(unknown))
        known = [option for option in inspect.signature(solve).parameters if option != "unknown"]
        where = f"It is a setting of the solver: {type(solver).__name__}({name}=...). " if hasattr(solver, name) else ""
        raise UserError(f"solve has no argument {name!r}. {where or nearest(name, known)}It takes {', '.join(known)}.")
    _check_object("solver", solver, "step", "Anderson()")
    if grad is not None:
        _check_object("grad", grad, "attach", "OneStep()")


def _check_object(argument: str, value: object, method: str, example: str) -> None:
    if isinstance(value, type) or not hasattr(value, method):
        shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise UserError(
            f"{argument} must be an object of common.deq.{argument}s, got {shown}. Pass an object such as {example}."
        )


def _iterate(problem, z, solver, *, states_at, trajectory, static, check_every, compact) -> Solution:
    lead = 0 if solver.returns_image else 1  # a point is measured one evaluation after the step that made it
    last = solver.max_iter + lead if len(z) and solver.max_iter else 0
    untested = static or solver.stop == "never"
    rows, whole = Rows.at(z, solver.init(z)), None  # whole: results in input order, once rows have left
    trace, snapshots, points = [], [], []
    number = 0
    for number in range(1, last + 1):
        looks = not (untested or number % check_every)
        rows.evaluate(problem, solver)
        if not (looks and rows.all_go_on(solver.tol)):
            rows.measure_small_states(solver, ask=looks and check_every == 1)
            rows.keep_better()
            if not untested:
                rows.end(solver, number)
            if looks:
                rows.count()
        trace.append((rows.index, rows.absolute, rows.relative))
        if trajectory:
            points.append((rows.index, rows.z))
        if number - lead in states_at:
            snapshots.append((number - lead, rows.index, rows.best))
        if rows.going == 0 or number == last:
            break
        if compact and looks and rows.waiting and rows.going <= LEAVE_BELOW * len(rows.running):
            whole = rows.written_into(whole)
            keep = rows.running.nonzero().squeeze(1)
            rows = rows.take(keep)
            problem.take(keep)
        rows.step(problem, solver, number)
    rows.evaluations = torch.where(rows.running, number, rows.evaluations)
    return _solution(problem, solver, rows.written_into(whole), rows.state, trace, snapshots, states_at,
                     points if trajectory else None, lead)  # fmt: skip


def _solution(problem, solver, results, state, trace, snapshots, states_at, points, lead) -> Solution:
    """The record of a solve; snapshots [(position, rows, best)] and points [(rows, z)] as the loop kept them."""
    best, unpack = results["best"], problem.layout.unpack
    never = solver.stop == "never"
    spread = lambda rows, part: part if rows is None else best.index_copy(0, rows, part)
    states = {position: unpack(spread(rows, part)) for position, rows, part in snapshots}
    z = unpack(best)
    converged = results["best_rel"] <= solver.tol if never and len(best) else results["converged"]
    return Solution(
        z=z,
        converged=converged,
        residual_abs=results["best_abs"],
        residual_rel=results["best_rel"],
        steps=(results["evaluations"] - lead).clamp_(min=0),
        evaluations=results["evaluations"] + results.get("extra", 0),
        calls=problem.calls,
        samples=problem.samples,
        stop="rel" if never else solver.stop,
        tol=solver.tol,
        max_iter=solver.max_iter,
        states=[states.get(position, z) for position in states_at],
        trajectory=None if points is None else [unpack(spread(rows, part)) for rows, part in points],
        trace=trace,
        solver_state=state,
        z_is_image=solver.returns_image,
    )
