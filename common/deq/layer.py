"""The equilibrium layer of a network: a solver, a gradient rule and what is recorded, as one module without weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from common.deq.correction import positions
from common.deq.grads import Gradient, OneStep
from common.deq.regular import JacobianPenalty
from common.deq.solve import Solution, solve
from common.deq.solvers import Anderson, Solver
from common.deq.structure import State
from common.errors import UserError


class DEQ(nn.Module):
    """z = fn(z, *args) as a layer: `states = deq(fn, z0, args)`.

    solver       of the forward pass (`common.deq.solvers`)
    grad         how each returned state is differentiated (`common.deq.grads`)
    eval_solver  solver in evaluation mode; None: `solver` with eval_factor times its steps
    eval_factor  > 0, budget of evaluation relative to training
    states       states returned in training: a number n of evenly spaced positions, or the positions themselves; the
                 last one is always the solution (sparse fixed-point correction, DEQ-Flow arXiv 2204.08442)
    sliced       how several states are made. False: one solve, a gradient branch at each position. True: a solve per
                 slice, each going on from the differentiated (then detached) state of the one before, which therefore
                 is a step or more further; TorchDEQ calls the two graphs indexing and sliced. "solver": each slice goes
                 on from where the solver stopped (code.v.1.0 of DEQ-Flow). Each of n slices has max_iter // n steps
    penalty      Jacobian regularisation at the solution in training, or None
    compact      samples that have converged leave the batch
    check_every  steps between two stop tests (each one synchronises with the device)

    Training: a list of as many states as asked for (times those of a rule with `gap` or `at`), with gradient.
    Evaluation, or where autograd is off: a list of the solution alone.

    solution       record of the last call, numbers only
    penalty_value  penalty of the last training call (scalar with gradient), or None
    generator      torch.Generator the penalty draws from, None: torch's global one
    last           (fn, z, args) of the last call when keep_last is set: for spectral radius and pictures
    """

    def __init__(
        self,
        *,
        solver: Solver | None = None,
        grad: Gradient | None = None,
        eval_solver: Solver | None = None,
        eval_factor: float = 1.0,
        states: int | Sequence[int] = 1,
        sliced: bool | str = False,
        penalty: JacobianPenalty | None = None,
        compact: bool = True,
        check_every: int = 1,
    ):
        super().__init__()
        if not eval_factor > 0:
            raise UserError(f"deq.eval_factor must be > 0, got {eval_factor}. 1 gives evaluation the training budget.")
        self.solver = solver if solver is not None else Anderson()
        self.grad = grad if grad is not None else OneStep()
        self.eval_solver = eval_solver or replace(self.solver, max_iter=int(self.solver.max_iter * eval_factor))
        steps = (self.grad.replaces_solver and getattr(self.grad, "steps", None)) or self.solver.max_iter
        if self.grad.replaces_solver and steps < 1:
            raise UserError("Backprop unrolls solver.max_iter steps, got 0. Set deq.grad.steps to the steps to unroll.")
        self.positions = _positions(states, steps)
        if sliced not in (False, True, "solver"):
            raise UserError(f"deq.sliced must be true, false or solver, got {sliced!r}. Set it to false for one solve.")
        if sliced and isinstance(states, int):
            self.positions = tuple(steps // states * number for number in range(1, states + 1))
        if sliced and self.grad.replaces_solver:
            raise UserError(
                "deq.sliced needs a gradient rule beside the solve; Backprop is the solve. Set sliced=false."
            )
        self.sliced, self.penalty, self.compact, self.check_every = sliced, penalty, compact, check_every
        self.solution: Solution | None = None
        self.penalty_value: Tensor | None = None
        self.generator: torch.Generator | None = None
        self.keep_last = False
        self.last: tuple[Callable, State, Sequence | None] | None = None

    def forward(self, fn: Callable, z0: State, args: Sequence | None = None) -> list[State]:
        """States of the equilibrium of z -> fn(z, *args) from z0; see `common.deq.solve.solve` for the arguments."""
        self.penalty_value = None
        if not (self.training and torch.is_grad_enabled()):
            states, found = self._solution(fn, z0, args, self.eval_solver if not self.training else self.solver)
        elif self.grad.replaces_solver:
            found = solve(fn, z0, args, solver=self.solver, grad=self.grad, states_at=self.positions)
            states = found.states
        elif self.sliced:
            states, found = self._sliced(fn, z0, args)
        else:
            states, found = self._indexed(fn, z0, args)
        if self.training and torch.is_grad_enabled() and self.penalty is not None:
            self.penalty_value = self.penalty(fn, _constant(states[-1]), args, generator=self.generator)
        self.solution = found.detached()
        self.last = (fn, _constant(states[-1]), args) if self.keep_last else None
        return states

    def __getstate__(self) -> dict:
        # a copy or a pickle starts without the last call: its tensors hang in a graph, its fn may be a closure
        return {**super().__getstate__(), "solution": None, "penalty_value": None, "last": None}

    def _options(self) -> dict:
        # a rule that reads the solver's history needs every row of it
        return {"compact": self.compact and not self.grad.needs_solver_state, "check_every": self.check_every}

    def _solution(self, fn, z0, args, solver: Solver) -> tuple[list[State], Solution]:
        found = solve(fn, z0, args, solver=solver, compact=self.compact, check_every=self.check_every)
        return [found.z], found

    def _indexed(self, fn, z0, args) -> tuple[list[State], Solution]:
        found = solve(fn, z0, args, solver=self.solver, states_at=self.positions[:-1], **self._options())
        states: list[State] = []
        for z in [*found.states, found.z]:
            states += self.grad.attach(fn, z, args, solution=found)
        return states, found

    def _sliced(self, fn, z0, args) -> tuple[list[State], Solution]:
        states: list[State] = []
        z, start, parts = z0, 0, []
        for position in self.positions:
            part = replace(self.solver, max_iter=position - start)
            found = solve(fn, z, args, solver=part, **self._options())
            parts.append(found)
            states += self.grad.attach(fn, found.z, args, solution=found)
            z, start = found.z if self.sliced == "solver" else _constant(states[-1]), position
        return states, _joined(parts, self.solver)


def _positions(states: int | Sequence[int], max_iter: int) -> tuple[int, ...]:
    """Increasing positions; the last is the end of the solve."""
    if isinstance(states, int):
        if states < 1:
            raise UserError(f"deq.states must be >= 1, got {states}. 1 returns the solution alone.")
        if states > max(max_iter, 1):
            raise UserError(
                f"deq.states={states} is more than solver.max_iter={max_iter}. Lower states, or allow more steps."
            )
        return tuple(positions(max_iter, states)) if states > 1 else (max_iter,)
    chosen = tuple(states)
    if not chosen or list(chosen) != sorted(set(chosen)) or not 1 <= chosen[0] <= chosen[-1] <= max_iter:
        raise UserError(
            f"deq.states must list increasing steps in 1 .. solver.max_iter={max_iter}, got {list(chosen)}."
        )
    return chosen if chosen[-1] == max_iter else (*chosen, max_iter)


def _constant(z: State) -> State:
    return pytree.tree_map(lambda leaf: leaf.detach(), z)


def _joined(parts: list[Solution], solver: Solver) -> Solution:
    """One record of the slices: residuals of the last, costs of all."""
    last = parts[-1]
    return replace(
        last,
        steps=torch.stack([p.steps for p in parts]).sum(0),
        evaluations=torch.stack([p.evaluations for p in parts]).sum(0),
        calls=sum(p.calls for p in parts),
        samples=sum(p.samples for p in parts),
        trace=[row for p in parts for row in p.trace],
        max_iter=solver.max_iter,
    )
