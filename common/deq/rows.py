"""The batch during a solve: its rows, what each evaluation measures of them, and which rows are still running."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from common.deq.structure import take_rows

if TYPE_CHECKING:
    from common.deq.problem import Problem
    from common.deq.solvers import Solver

LARGEST = 1e12  # relative residual where fn(z) = 0 and z is not: a number, since infinite ones mean a failure
# Norms below the first number are taken of vectors times the second: their squares would vanish otherwise.
SMALL = {torch.float32: (1e-10, 2.0**90), torch.float64: (1e-140, 2.0**900)}
UNMEASURED = torch.empty(0)  # stands for what no evaluation has measured yet


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


@dataclass(kw_only=True)
class Rows:
    """The samples still in the batch, a row of every tensor each, and what the last evaluation measured of them."""

    z: Tensor  # (B, D) the point to evaluate next, or evaluated last
    best: Tensor  # (B, D) what the sample would return if it ended now
    best_abs: Tensor  # (B,) absolute residual and
    best_rel: Tensor  # (B,) relative residual of the point `best` comes from
    floor: Tensor  # (B,) smallest absolute residual since the sample last went back to its best state
    evaluations: Tensor  # (B,) int: of the samples that have ended
    converged: Tensor  # (B,) bool
    running: Tensor  # (B,) bool: False for samples that have ended and wait for the others
    state: dict  # the solver's
    index: Tensor | None = None  # (B,) rows of the input batch; None: all of them
    going: int = 0  # how many were running at the last look
    waiting: bool = False  # some rows may have ended
    # of the last evaluation
    fz: Tensor = UNMEASURED  # (B, D)
    gz: Tensor = UNMEASURED  # (B, D) fz - z
    image: Tensor = UNMEASURED  # (B, D) the answer of a sample that ends here
    absolute: Tensor = UNMEASURED  # (B,)
    relative: Tensor = UNMEASURED  # (B,)
    size: Tensor = UNMEASURED  # (B,) ||fz||
    small: Tensor = UNMEASURED  # (B,) bool: the squares in the two norms may have vanished
    residual: Tensor = UNMEASURED  # (B,) in the solver's stop mode
    better: Tensor = UNMEASURED  # (B,) bool: `image` becomes the best state
    lost: Tensor | None = None  # (B,) bool: to be sent back to the best state; None: known to be none

    @classmethod
    def at(cls, z: Tensor, state: dict) -> Rows:
        """Every sample at its initial state z (B, D), unmeasured."""
        infinite = z.new_full((len(z),), float("inf"))
        none = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        return cls(
            z=z, best=z, best_abs=infinite, best_rel=infinite, floor=infinite, evaluations=none.long(), converged=none,
            running=~none, state=state, going=len(z),
        )  # fmt: skip

    def evaluate(self, problem: Problem, solver: Solver) -> None:
        """One evaluation of fn at z, measured."""
        self.fz = problem(self.z)
        self.gz = self.fz - self.z
        self.image = solver.finish(self.z, self.fz, self.gz)
        self.absolute = torch.linalg.vector_norm(self.gz, dim=1)
        self.size = torch.linalg.vector_norm(self.fz, dim=1)
        self.small = self.size < SMALL[self.z.dtype][0]
        self.lost = None
        self._compare(solver)

    def _compare(self, solver: Solver) -> None:
        self.relative = _ratio(self.absolute, self.size)
        by_size = solver.stop != "abs"
        self.residual, before = (self.relative, self.best_rel) if by_size else (self.absolute, self.best_abs)
        self.better = torch.isfinite(self.residual) if solver.stop == "never" else self.residual < before

    def measure_small_states(self, solver: Solver, ask: bool) -> None:
        """Norms again where squares of the entries may have vanished, so that residuals are right at every scale.

        ask  on a CPU, first whether there are any
        """
        if ask and self.z.device.type == "cpu" and not bool(self.small.any()):
            return  # elsewhere asking costs more than computing
        least, factor = SMALL[self.z.dtype]
        enlarged = [torch.linalg.vector_norm(part * factor, dim=1) / factor for part in (self.gz, self.fz)]
        self.absolute = torch.where(self.absolute < least, enlarged[0], self.absolute)
        self.size = torch.where(self.small, enlarged[1], self.size)
        self._compare(solver)

    def all_go_on(self, tol: float) -> bool:
        """The usual step: every sample is better than before and none has converged. Synchronises."""
        if self.waiting or not bool((self.better & (self.residual > tol) & ~self.small).all()):
            return False
        self.best, self.best_abs, self.best_rel, self.floor = self.image, self.absolute, self.relative, self.absolute
        return True

    def keep_better(self) -> None:
        self.best = torch.where(self.better[:, None], self.image, self.best)
        self.best_abs = torch.where(self.better, self.absolute, self.best_abs)
        self.best_rel = torch.where(self.better, self.relative, self.best_rel)

    def end(self, solver: Solver, number: int) -> None:
        """Ends the samples that have converged or failed, and marks the lost ones."""
        reached, failed = solver.terminate(self.state, self.residual)
        stopping = self.running & (reached | failed)
        self.converged = self.converged | (reached & self.running)
        self.evaluations = torch.where(stopping, number, self.evaluations)
        self.running = self.running & ~stopping
        self.waiting = True
        self.lost = solver.lost(self.absolute, self.floor)
        if self.lost is not None:
            self.floor = torch.where(self.lost, float("inf"), torch.minimum(self.floor, self.absolute))

    def count(self) -> None:
        """How many samples are running, and whether any of them is lost. Synchronises, once."""
        lost = self.running if self.lost is None else self.lost & self.running
        self.going, astray = torch.stack([self.running, lost]).sum(1).tolist()
        self.waiting = self.going < len(self.running)
        if not astray:
            self.lost = None

    def step(self, problem: Problem, solver: Solver, number: int) -> None:
        """The next point; samples that have ended stay where they are."""
        point = Point(
            self.z, self.fz, self.gz, self.residual, self.relative, self.size, self.best, self.running, self.lost
        )
        moved = solver.step(problem, self.state, number, point)
        if self.waiting and not (problem.known and problem.known[0] is moved):  # a line search keeps them there itself
            moved = torch.where(self.running[:, None], moved, self.z)
        self.z = moved

    def results(self) -> dict[str, Tensor]:
        """What is returned of every sample: (B, ...) each."""
        names = ("best", "best_abs", "best_rel", "evaluations", "converged")
        extra = {"extra": self.state["extra"]} if "extra" in self.state else {}
        return {name: getattr(self, name) for name in names} | extra

    def written_into(self, whole: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The results of the whole batch: `whole`, those of the last compaction, with the rows still here renewed."""
        own = self.results()
        if self.index is None or whole is None:
            return own
        return {name: whole[name].index_copy(0, self.index, part) for name, part in own.items()}

    def take(self, keep: Tensor) -> Rows:
        """The rows (n,) `keep` alone."""
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        taken = take_rows({**parts, "waiting": False}, keep)
        return Rows(**{**taken, "index": keep if self.index is None else taken["index"]})


def _ratio(absolute: Tensor, size: Tensor) -> Tensor:
    """absolute / size, at most LARGEST; 0 / 0 is 0, and where the size overflows the result is NaN, not 0."""
    quotient = absolute / torch.maximum(size, absolute / LARGEST)
    return torch.where(absolute == 0, 0.0, torch.add(quotient, size, alpha=0))
