"""torchdeq's solver functions, run by common.deq.solve: same names, arguments, defaults and returned triple.

    z, states, info = anderson_solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, m=6, ...)

What all four share:

func      x -> image of x, same shape as x; called with one argument
x0        (B, ...): rows are samples; a tensor of one or no dimension counts as (B, 1) or (1, 1)
max_iter  steps at most; 0 returns x0 unmeasured
tol       as in torchdeq all samples iterate until the residual of the last one meets tol (rows of x0 may be coupled, as
          the nodes of a graph are); one that is not finite is no longer waited for. 0 or less: all steps are taken
stop_mode "abs": ||func(x) - x||, "rel": the same over ||func(x)||; the first grows with the width of x
indexing  steps whose states are returned as well: as many as listed, also after an early stop (torchdeq drops those);
          the best state after that many steps, for broyden_solver too (torchdeq: one earlier)
return_final  take all steps and return the last finite state instead of that with the smallest residual
Keywords of the other solvers are ignored, as in torchdeq; one that looks misspelt is warned about.

z         per sample the state with the smallest residual; what is not finite is never taken (torchdeq: NaN as soon as
          one iterate is); a constant
info      `SolverStat`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.deq.solve import EPS, Solution, solve
from common.deq.solvers import Anderson, Broyden, Picard, Solver
from common.deq.structure import Layout, State
from common.errors import UserError, nearest
from common.torchdeq.config import warn_unknown

STOP_MODES = ("abs", "rel")
BUDGET = ("max_iter", "tol", "stop_mode", "indexing", "return_final")
OPTIONS = (*BUDGET, "tau", "m", "lam", "LBFGS_thres", "ls", "no_stat")  # of all solvers together


class SolverStat(dict):
    """Statistics of a solve; entries that were not measured are -1.

    abs_lowest, rel_lowest  (B,) residuals where the returned state was found; inf: never measured or never finite
    abs_trace, rel_trace    (B, N) residual after step 1, 2, ...; N = max_iter for every solver, filled up with the last
                            value after an early stop (torchdeq begins with a 1e8 and has lengths max_iter + 1 or, for
                            Anderson, max_iter - 1)
    nstep                   (B,) float: the step that found the returned state, from 1 for every solver; phantom steps
                            are not counted. DEQSliced: of all slices together, traces likewise (torchdeq: of the last
                            slice)
    sradius                 (B,) spectral radius, by a DEQ in evaluation with sradius_mode
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for key in ("abs_lowest", "rel_lowest", "nstep", "sradius"):
            self.setdefault(key, torch.tensor([-1.0]))
        for key in ("abs_trace", "rel_trace"):
            self.setdefault(key, torch.tensor([[-1.0]]))

    @classmethod
    def from_final_step(cls, z: State, fz: State, nstep: int = 0) -> "SolverStat":
        """See `solver_stat_from_final_step`."""
        layout = Layout.of(z)
        image = layout.pack(fz)
        lowest = torch.linalg.vector_norm(image - layout.pack(z), dim=1)
        relative = lowest / (torch.linalg.vector_norm(image, dim=1) + EPS)
        return cls._final(lowest, relative, torch.full_like(lowest, float(nstep)))

    @classmethod
    def from_solution(cls, found: Solution, mode: str, lead: int = 0, final: bool = False) -> "SolverStat":
        """Statistics of a Solution of common.deq.

        mode   "abs" or "rel", by which the state was chosen; "final": the last state was
        lead   evaluations before the first step
        final  leave the traces out: one column, the residual of the returned state
        """
        traces = found.residual_trace
        width = traces[0].shape[1]
        if width:
            chosen = traces[mode == "rel"]
            finite = torch.isfinite(chosen)
            if mode == "final":
                step = width - 1 - finite.flip(1).int().argmax(1)
            else:
                step = torch.where(finite, chosen, float("inf")).argmin(1)
            nstep = torch.where(finite.any(1), (step + 1 - lead).clamp_min(0), 0).to(found.residual_abs.dtype)
        else:
            nstep = torch.zeros_like(found.residual_abs)
        if final:
            return cls._final(found.residual_abs, found.residual_rel, nstep)
        length = max(found.max_iter, 1)
        columns = [_filled(trace[:, lead:] if width > lead else trace, length) for trace in traces]
        return cls(
            abs_lowest=found.residual_abs,
            rel_lowest=found.residual_rel,
            abs_trace=columns[0],
            rel_trace=columns[1],
            nstep=nstep,
        )

    @classmethod
    def _final(cls, absolute: Tensor, relative: Tensor, nstep: Tensor) -> "SolverStat":
        return cls(
            abs_lowest=absolute,
            rel_lowest=relative,
            abs_trace=absolute.unsqueeze(1),
            rel_trace=relative.unsqueeze(1),
            nstep=nstep,
        )


def _filled(trace: Tensor, length: int) -> Tensor:
    """(B, n) continued to (B, length) by its last column; inf where nothing was measured."""
    last = trace[:, -1:] if trace.shape[1] else trace.new_full((len(trace), 1), float("inf"))
    return torch.cat([trace, last.expand(-1, length - trace.shape[1])], dim=1)


def solver_stat_from_final_step(z: State, fz: State, nstep: int = 0) -> SolverStat:
    """Statistics of a last step from z to fz = f(z), tensors (B, ...) or lists of them; traces (B, 1), nstep (B,)."""
    return SolverStat.from_final_step(z, fz, nstep)


@dataclass(frozen=True, kw_only=True)
class _Together(Solver):
    """A solver all of whose samples stop at once, when the last one has met the tolerance or failed."""

    inner: Solver

    @property
    def returns_image(self) -> bool:
        return self.inner.returns_image

    def init(self, z):
        return self.inner.init(z)

    def step(self, problem, state, number, point):
        return self.inner.step(problem, state, number, point)

    def lost(self, residual, best):
        return self.inner.lost(residual, best)

    def finish(self, z, fz, gz):
        return self.inner.finish(z, fz, gz)

    def terminate(self, state, residual):
        ended, failed = self.inner.terminate(state, residual)
        return ended & (ended | failed).all(), failed


@dataclass(frozen=True, kw_only=True)
class _Anderson(Anderson):
    """With a tau above 1, too: over-relaxation, which torchdeq allows."""

    def __post_init__(self):
        tau = self.tau
        object.__setattr__(self, "tau", min(tau, 1.0))
        super().__post_init__()
        object.__setattr__(self, "tau", tau)


def _solve(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    build: Callable[..., Solver],
    *,
    max_iter: int,
    tol: float,
    stop_mode: str,
    indexing: Sequence[int] | None,
    return_final: bool,
    ignored: dict,
    final: bool = False,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    warn_unknown(ignored, OPTIONS, "the solver", alike=True)
    if stop_mode not in STOP_MODES:
        raise UserError(f"stop_mode must be abs or rel, got {stop_mode!r}. {nearest(str(stop_mode), STOP_MODES)}")
    if isinstance(max_iter, np.integer):
        max_iter = int(max_iter)
    if not isinstance(max_iter, int) or max_iter < 0:
        raise UserError(f"max_iter must be a whole number of at least 0, got {max_iter!r}. Set it to the steps wanted.")
    tol = max(float(tol), torch.finfo(torch.float64).tiny)  # 0 or less: met by no residual but 0 itself
    inner = build(max_iter=max_iter, tol=tol, stop="never" if return_final else stop_mode)
    solver = _Together(inner=inner, max_iter=max_iter, tol=tol, stop=inner.stop)
    wanted = () if indexing is None else indexing
    positions = [min(max(int(position), 1), max(max_iter, 1)) for position in wanted]
    found = solve(func, x0, solver=solver, states_at=positions)
    info = SolverStat.from_solution(
        found,
        "final" if return_final else stop_mode,
        lead=0 if inner.returns_image else 1,
        final=final or bool(ignored.get("no_stat")),
    )
    return found.z, found.states, info


def _damped(func: Callable[[Tensor], Tensor], tau: float) -> Callable[[Tensor], Tensor]:
    """x -> tau func(x) + (1 - tau) x: the map iterated, so that residuals are its own, as in torchdeq."""
    return func if tau == 1 else lambda x: tau * func(x) + (1 - tau) * x


def fixed_point_iter(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """x <- tau func(x) + (1 - tau) x. The residual is that of this damped map, as in torchdeq. See the module."""
    return _solve(
        _damped(func, tau), x0, Picard, max_iter=max_iter, tol=tol, stop_mode=stop_mode, indexing=indexing,
        return_final=return_final, ignored=kwargs,
    )  # fmt: skip


def simple_fixed_point_iter(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tau: float = 1.0,
    indexing: Sequence[int] | None = None,
    **kwargs,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """max_iter times x <- tau func(x) + (1 - tau) x: no stop test, no synchronisation; info of the last step only.

    Takes any callable and serves as backward solver, too (torchdeq passes a tau that raw callables refuse).
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in ("tol", "stop_mode", "return_final")}
    return _solve(
        _damped(func, tau), x0, Picard, max_iter=max_iter, tol=1e-3, stop_mode="abs", indexing=indexing,
        return_final=True, ignored=kwargs, final=True,
    )  # fmt: skip


def anderson_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    m: int = 6,
    lam: float = 1e-4,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """Anderson acceleration over the last m points, damped by tau. See the module.

    lam  ridge relative to the trace of the Gram matrix, so that it acts alike at every scale (torchdeq's is absolute
         and switches the acceleration off near the solution)
    Works from the first step, max_iter 1 and 2 included (torchdeq returns x0 for those).
    """
    return _solve(
        func, x0, lambda **budget: _Anderson(m=m, ridge=lam, tau=tau, **budget), max_iter=max_iter, tol=tol,
        stop_mode=stop_mode, indexing=indexing, return_final=return_final, ignored=kwargs,
    )  # fmt: skip


def broyden_solver(
    func: Callable[[Tensor], Tensor],
    x0: Tensor,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    LBFGS_thres: int | None = None,
    ls: bool = False,
    return_final: bool = False,
    **kwargs,
) -> tuple[Tensor, list[Tensor], SolverStat]:
    """Good Broyden from the inverse Jacobian -I; ls: line search per sample. One evaluation more than steps.

    LBFGS_thres  pairs remembered, None or 0: all; any number is a valid limited-memory update (torchdeq's overwriting
                 diverges once it is exceeded)
    """
    return _solve(
        func, x0, lambda **budget: Broyden(memory=LBFGS_thres or None, line_search=ls, **budget), max_iter=max_iter,
        tol=tol, stop_mode=stop_mode, indexing=indexing, return_final=return_final, ignored=kwargs,
    )  # fmt: skip


# What one needs to write a solver ------------------------------------------------------------------------------------


def batch_flatten(x: Tensor) -> Tensor:
    """x (B, ...) as (B, D); a tensor of one or no dimension as (numel, 1)."""
    return x.flatten(1) if x.ndim >= 2 else x.reshape(-1, 1)


def batch_masked_mixing(mask: Tensor, mask_var: Tensor | float, orig_var: Tensor | float) -> Tensor:
    """(B, ...): rows of `mask_var` where mask (B,) is true, of `orig_var` elsewhere; one of them may be a number.

    What is not chosen has no effect even where it is not finite (torchdeq multiplies by 0 and gets NaN).
    """
    like = mask_var if isinstance(mask_var, Tensor) else orig_var
    if not isinstance(like, Tensor):
        raise UserError("batch_masked_mixing needs a tensor as mask_var or orig_var, got two numbers.")
    return torch.where(mask.reshape(-1, *[1] * (like.ndim - 1)).bool(), mask_var, orig_var)


def init_solver_info(
    bsz: int, device: torch.device | str, init_loss: float = 1e8
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """(trace_dict, lowest_dict, lowest_step_dict), each with the keys abs and rel, for `update_state` to fill.

    Traces begin with init_loss (bsz,), as torchdeq's; lowest residuals are init_loss and their steps 0.
    """
    start = lambda value: {mode: torch.full((bsz,), value, device=device) for mode in STOP_MODES}
    return {mode: [value] for mode, value in start(init_loss).items()}, start(init_loss), start(0.0)


def update_state(
    lowest_xest: Tensor,
    x_est: Tensor,
    nstep: int,
    stop_mode: str,
    abs_diff: Tensor,
    rel_diff: Tensor,
    trace_dict: dict[str, list[Tensor]],
    lowest_dict: dict[str, Tensor],
    lowest_step_dict: dict[str, Tensor],
    return_final: bool = False,
) -> Tensor:
    """Records step `nstep` and returns the best states so far, (B, ...), constants.

    abs_diff, rel_diff  (B,) residuals of x_est; the dictionaries of `init_solver_info` are updated in place
    stop_mode           by which residual the best state is chosen;   return_final  the present one always is
    """
    for mode, diff in (("abs", abs_diff), ("rel", rel_diff)):
        trace_dict[mode].append(diff)
        better = (diff < lowest_dict[mode]) | return_final
        if mode == stop_mode:
            lowest_xest = batch_masked_mixing(better, x_est, lowest_xest).detach()
        lowest_dict[mode] = batch_masked_mixing(better, diff, lowest_dict[mode])
        lowest_step_dict[mode] = batch_masked_mixing(better, float(nstep), lowest_step_dict[mode])
    return lowest_xest


def solver_stat_from_info(
    stop_mode: str,
    lowest_dict: dict[str, Tensor],
    trace_dict: dict[str, list[Tensor]],
    lowest_step_dict: dict[str, Tensor],
) -> SolverStat:
    """`SolverStat` of what `update_state` recorded; traces with the entry of `init_solver_info` in front."""
    return SolverStat(
        abs_lowest=lowest_dict["abs"],
        rel_lowest=lowest_dict["rel"],
        abs_trace=torch.stack(trace_dict["abs"], dim=1),
        rel_trace=torch.stack(trace_dict["rel"], dim=1),
        nstep=lowest_step_dict[stop_mode],
    )


_solvers: dict[str, Callable] = {
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "fixed_point_iter": fixed_point_iter,
    "simple_fixed_point_iter": simple_fixed_point_iter,
}
OWN = frozenset(_solvers.values())  # those that know the keyword no_stat


def get_solver(key: str) -> Callable:
    """The solver function registered under this name. Raises UserError, with the nearest name, for an unknown one."""
    if key not in _solvers:
        raise UserError(f"solver must be one of {', '.join(_solvers)}, got {key!r}. {nearest(str(key), _solvers)}")
    return _solvers[key]


def register_solver(solver_type: str, solver: Callable) -> None:
    """Make `solver` available as f_solver and b_solver under the name `solver_type`.

    solver(func, x0, max_iter=, tol=, stop_mode=, indexing=, **solver_kwargs) -> (state, states at indexing, info)
    x0 is the state, for a list of tensors the matrix (B, D) of all of them side by side; func maps it to its shape.
    """
    if not callable(solver):
        raise UserError(f"solver of register_solver must be a function, got {solver!r}. Pass the function itself.")
    _solvers[solver_type] = solver
