"""The record of a solve: the states found, what they cost, how far they are from a fixed point."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from common.deq.structure import State


@dataclass(repr=False)
class Solution:
    """What `solve` found. All (B,) tensors are in input order, whatever order the samples converged in.

    z             state of the structure of z0: of each sample the one with the smallest residual that was finite
    converged     (B,) bool: the residual of the solver's stop mode reached its tolerance
    residual_abs  (B,) ||fn(y) - y|| at the point y that was measured: y = z, or the point whose (damped) image z is
    residual_rel  (B,) the same over ||fn(y)||; 0 where both are zero
    steps         (B,) int: steps taken by the sample
    evaluations   (B,) int: evaluations of fn the sample needed, Jacobian products and line searches included
    calls         int: how often fn was called, whatever the size of the batch
    samples       int: samples those calls evaluated; B * calls without compaction
    stop, tol     of the solver
    states        list of states at the positions asked for
    trajectory    list of the points fn was evaluated at (opt-in), else None
    trace         [(rows or None, abs, rel residual of those)] per evaluation; see `residual_trace`
    solver_state  the solver's own record, for gradient rules that read it
    backward      Solution of the last backward solve, set by gradient rules that have one
    z_is_image    True: z is the image of the point measured (Picard, Anderson); False: that point itself (Broyden,
                  NewtonKrylov)
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
    z_is_image: bool = True

    def __repr__(self) -> str:
        """One line. Reads the device."""
        rows = len(self.steps)
        if isinstance(self.steps, FakeTensor):
            return f"Solution(shapes only, {rows} samples)"
        if not rows:
            return "Solution(empty batch)"
        where = "the point the image of which is z" if self.z_is_image else "z"
        return (
            f"Solution({int(self.converged.sum())} of {rows} samples converged, {int(self.steps.min())} to "
            f"{int(self.steps.max())} steps, {self.stop} residual at {where} at most {float(self.residual.max()):.2g})"
        )

    @property
    def residual(self) -> Tensor:
        """(B,) residual of the stop mode."""
        return self.residual_abs if self.stop == "abs" else self.residual_rel

    @property
    def residual_trace(self) -> tuple[Tensor, Tensor]:
        """Absolute and relative residual after each evaluation, (B, N) each; samples that left keep the last value."""
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
            return f"All {rows} samples converged within {int(self.steps.max())} steps{self._growth()}."
        if self.max_iter == 0:
            return "No steps were asked for (max_iter=0): the initial state is returned unmeasured."
        worst = float(self.residual[~self.converged].max())
        if math.isinf(worst):
            return (
                f"{failed} of {rows} samples did not converge, some without ever having a finite residual: fn returns "
                f"NaN or overflows {str(self.residual_abs.dtype).removeprefix('torch.')}. Look at fn(z0), or scale the "
                f"state down."
            )
        if self.diverged():
            return (
                f"{failed} of {rows} samples diverged: the map is not a contraction along the path taken. Damp it "
                f"(tau < 1), normalise its weights (common.deq.layers), start nearer, or use Broyden or NewtonKrylov."
            )
        return (
            f"{failed} of {rows} samples did not reach {self.stop} residual {self.tol:g} in {self.max_iter} steps "
            f"(worst {worst:.2g}). Raise max_iter or tol, or use Anderson, Broyden or NewtonKrylov."
        )

    def _growth(self) -> str:
        """A remark where a relative residual fell only because the state grew; an empty string elsewhere."""
        if self.stop != "rel" or not self.trace:
            return ""
        first = self.residual_trace[0][:, 0]
        grown = int(((self.residual_abs > first) & (self.residual_rel > 0)).sum())
        if not grown:
            return ""
        return (
            f", but ||fn(z) - z|| of {grown} is larger than at the start and small only beside ||fn(z)||: "
            "the state may be running away. Test it with solver.stop=abs"
        )

    def diverged(self) -> bool:
        """A sample that did not converge ended non-finite or ten times above its first residual."""
        if not self.trace:
            return not bool(torch.isfinite(self.residual_abs).all())
        trace = self.residual_trace[0][~self.converged]
        last = trace[:, -1]
        return not bool((torch.isfinite(last) & (last <= 10 * trace[:, 0])).all())

    def detached(self) -> Solution:
        """The same record without z, states and solver state: numbers only, nothing that holds a graph."""
        return Solution(
            None,  # type: ignore[arg-type]
            self.converged, self.residual_abs, self.residual_rel, self.steps, self.evaluations, self.calls,
            self.samples, self.stop, self.tol, self.max_iter, trace=self.trace, backward=self.backward,
            z_is_image=self.z_is_image,
        )  # fmt: skip
