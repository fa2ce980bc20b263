"""The equilibrium layer of a network: a solver and a gradient rule in one module without weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.deq.correction import positions
from common.deq.grads import Gradient, OneStep
from common.deq.regular import JacobianPenalty
from common.deq.solve import Solution, solve
from common.deq.solvers import Anderson, Solver
from common.deq.structure import State
from common.errors import UserError
from common.tensors import detach


class DEQ(nn.Module):
    """The equilibrium z = fn(z, *args) as a layer: `states = deq(fn, z0, args)`.

    solver       solver of the forward pass (`common.deq.solvers`); None: Anderson()
    grad         gradient rule of each returned state (`common.deq.grads`); None: OneStep()
    eval_solver  solver in evaluation mode; None: `solver` with eval_factor times its max_iter
    eval_factor  > 0, max_iter in evaluation relative to training
    states       states returned in training: a number n of evenly spaced positions, or the positions themselves. The
                 last one is always the solution (sparse fixed-point correction, DEQ-Flow, arXiv 2204.08442)
    sliced       how several states are computed. TorchDEQ (arXiv 2310.18605) calls the first two indexing and sliced.
                 False: one solve; the gradient rule is attached to the state at each position.
                 True: one solve per slice. Each slice starts from the detached output of the gradient rule at the end
                 of the slice before, so the steps of the rule move the state, too.
                 "solver": one solve per slice, each from where the solver stopped (code.v.1.0 of DEQ-Flow).
                 Each of n slices has max_iter // n steps
    penalty      Jacobian regularisation at the solution in training, or None
    compact      samples that have converged leave the batch
    check_every  steps between two stop tests; each test synchronises with the device

    In training the call returns a list of the states asked for, each with its gradient; a rule with `gap` or `at`
    returns several entries per state. In evaluation mode, or without autograd, the list holds the solution only.

    solution       Solution of the last call, numbers only
    penalty_value  penalty of the last training call (scalar with gradient), or None
    generator      torch.Generator of the penalty; None: torch's global one
    last           (fn, z, args) of the last call if keep_last is set, for the spectral radius and for pictures
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
                "deq.sliced does not work with Backprop, which differentiates the forward pass. Set deq.sliced=false."
            )
        self.sliced, self.penalty, self.compact, self.check_every = sliced, penalty, compact, check_every
        self.solution: Solution | None = None
        self.penalty_value: Tensor | None = None
        self.generator: torch.Generator | None = None
        self.keep_last = False
        self.last: tuple[Callable, State, Sequence | None] | None = None

    def forward(self, fn: Callable, z0: State, args: Sequence | None = None) -> list[State]:
        """States of the equilibrium of z -> fn(z, *args), solved from z0. Arguments: see `common.deq.solve.solve`."""
        self.penalty_value = None
        if not (self.training and torch.is_grad_enabled()):
            states, found = self._solve_only(fn, z0, args, self.eval_solver if not self.training else self.solver)
        elif self.grad.replaces_solver:
            found = solve(fn, z0, args, solver=self.solver, grad=self.grad, states_at=self.positions)
            states = found.states
        elif self.sliced:
            states, found = self._states_of_slices(fn, z0, args)
        else:
            states, found = self._states_of_one_solve(fn, z0, args)
        if self.training and torch.is_grad_enabled() and self.penalty is not None:
            self.penalty_value = self.penalty(fn, detach(states[-1]), args, generator=self.generator)
        self.solution = found.detached()
        self.last = (fn, detach(states[-1]), args) if self.keep_last else None
        return states

    def __getstate__(self) -> dict:
        # Copies and pickles leave out the last call: its tensors belong to a graph and its fn may be a closure.
        return {**super().__getstate__(), "solution": None, "penalty_value": None, "last": None}

    def _options(self) -> dict:
        # A rule that reads the solver's history needs the history of every sample.
        return {"compact": self.compact and not self.grad.needs_solver_state, "check_every": self.check_every}

    def _solve_only(self, fn, z0, args, solver: Solver) -> tuple[list[State], Solution]:
        found = solve(fn, z0, args, solver=solver, compact=self.compact, check_every=self.check_every)
        return [found.z], found

    def _states_of_one_solve(self, fn, z0, args) -> tuple[list[State], Solution]:
        found = solve(fn, z0, args, solver=self.solver, states_at=self.positions[:-1], **self._options())
        states: list[State] = []
        for z in [*found.states, found.z]:
            states += self.grad.attach(fn, z, args, solution=found)
        return states, found

    def _states_of_slices(self, fn, z0, args) -> tuple[list[State], Solution]:
        states: list[State] = []
        z, start, records = z0, 0, []
        for position in self.positions:
            slice_solver = replace(self.solver, max_iter=position - start)
            found = solve(fn, z, args, solver=slice_solver, **self._options())
            records.append(found)
            states += self.grad.attach(fn, found.z, args, solution=found)
            z, start = found.z if self.sliced == "solver" else detach(states[-1]), position
        return states, _merged(records, self.solver)


def _positions(states: int | Sequence[int], max_iter: int) -> tuple[int, ...]:
    """The solver steps whose states are returned, in increasing order. The last is max_iter."""
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


def _merged(records: list[Solution], solver: Solver) -> Solution:
    """One Solution for all slices: the residuals of the last slice, the costs of all."""
    last = records[-1]
    return replace(
        last,
        steps=torch.stack([record.steps for record in records]).sum(0),
        evaluations=torch.stack([record.evaluations for record in records]).sum(0),
        calls=sum(record.calls for record in records),
        samples=sum(record.samples for record in records),
        trace=[row for record in records for row in record.trace],
        max_iter=solver.max_iter,
    )
