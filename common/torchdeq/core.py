"""torchdeq's equilibrium layers over common.deq: `get_deq` and what it builds."""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.deq.correction import positions
from common.deq.regular import power_iteration
from common.deq.structure import State
from common.errors import UserError, nearest
from common.torchdeq.config import SETTINGS, DEQConfig, warn_unknown
from common.torchdeq.grad import Map, backward_factory, deq_decorator, make_pair
from common.torchdeq.solver import OPTIONS, OWN, STOP_MODES, SolverStat, get_solver


class DEQBase(nn.Module):
    """Abstract: the settings of all containers. Derive from it and write `forward` for another training graph.

    args             Namespace, dict, DEQConfig or object; what it holds comes before the keywords. Copied
    f_solver         name of the forward solver, b_solver of the backward solver of the ift rules
    no_stat          info holds the last residual only, no traces; None: True for simple_fixed_point_iter (torchdeq
                     ignores it)
    f_max_iter, f_tol, f_stop_mode  of the forward solver, b_... of the backward solver; a tol of 0 or less: all steps
    eval_f_max_iter  steps in evaluation; 0: int(f_max_iter * eval_factor)
    """

    def __init__(
        self,
        args: Any = None,
        f_solver: str = "fixed_point_iter",
        b_solver: str = "fixed_point_iter",
        no_stat: bool | None = None,
        f_max_iter: int = 40,
        b_max_iter: int = 40,
        f_tol: float = 1e-3,
        b_tol: float = 1e-6,
        f_stop_mode: str = "abs",
        b_stop_mode: str = "abs",
        eval_factor: float = 1.0,
        eval_f_max_iter: int = 0,
        **kwargs,
    ):
        super().__init__()
        self.args = DEQConfig(args)
        self.args.update(**kwargs)
        get = self.args.get
        name = get("f_solver", f_solver)
        self.f_solver, self.b_solver = get_solver(name), get_solver(get("b_solver", b_solver))
        no_stat = get("no_stat", no_stat)
        self.no_stat = name == "simple_fixed_point_iter" if no_stat is None else bool(no_stat)
        self.f_max_iter, self.b_max_iter = _whole(get("f_max_iter", f_max_iter)), _whole(get("b_max_iter", b_max_iter))
        self.f_tol, self.b_tol = get("f_tol", f_tol), get("b_tol", b_tol)
        self.f_stop_mode, self.b_stop_mode = get("f_stop_mode", f_stop_mode), get("b_stop_mode", b_stop_mode)
        steps = _whole(get("eval_f_max_iter", eval_f_max_iter))
        self.eval_f_max_iter = steps if steps > 0 else int(self.f_max_iter * get("eval_factor", eval_factor))
        self.hook = None
        self._check()

    def _check(self) -> None:
        for side in ("f", "b"):
            steps = getattr(self, f"{side}_max_iter")
            mode = getattr(self, f"{side}_stop_mode")
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise UserError(f"{side}_max_iter must be a whole number of at least 0, got {steps!r}. 40 is usual.")
            if mode not in STOP_MODES:
                raise UserError(f"{side}_stop_mode must be abs or rel, got {mode!r}. {nearest(str(mode), STOP_MODES)}")

    def _sradius(self, deq_func: Callable[[Tensor], Tensor], z_star: Tensor) -> Tensor:
        """(B,) spectral radius of the Jacobian at z_star by 100 steps of `power_method`."""
        with torch.enable_grad():
            point = z_star.detach().requires_grad_()
            image = deq_func(point)
        product = lambda v: torch.autograd.grad(image, point, v, retain_graph=True)[0]
        with torch.no_grad():
            return power_iteration(product, torch.randn_like(point), 100)[1]

    def _call_solver(
        self, deq_func: Callable, z: Tensor, f_max_iter: int, solver_kwargs: dict | None, **more
    ) -> tuple[Tensor, list[Tensor], dict]:
        """f_solver with the settings of this layer, without gradient; solver_kwargs come first."""
        given = {name: value for name, value in (solver_kwargs or {}).items() if name != "f_max_iter"}
        warn_unknown(given, (*OPTIONS, "f_max_iter"), "solver_kwargs", alike=True)
        if self.no_stat and self.f_solver in OWN:
            more["no_stat"] = True
        options = {"max_iter": int(f_max_iter), "tol": self.f_tol, "stop_mode": self.f_stop_mode, **more, **given}
        with torch.no_grad():
            return self.f_solver(deq_func, x0=z, **options)

    def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, solver_kwargs=None, **kwargs):
        raise NotImplementedError("Write _solve_fixed_point in the class derived from DEQBase.")

    def forward(self, func, z_init, solver_kwargs=None, sradius_mode=False, backward_writer=None, **kwargs):
        raise NotImplementedError("Write forward in the class derived from DEQBase.")

    def _evaluate(self, deq_func: Map, z: Tensor, info: dict, sradius_mode: bool) -> tuple[list[State], dict]:
        info["sradius"] = self._sradius(deq_func, z) if sradius_mode else torch.zeros(1, device=z.device)
        return [deq_func.vec2list(z)], info


def _whole(value: Any) -> Any:
    """A whole number of numpy or a tensor of one as Python's; anything else as it is."""
    if isinstance(value, np.integer) or (
        isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()
    ):
        return int(value)
    return value


def _listed(value: Any) -> list:
    """A number, or numbers in a tensor, an array or any sequence, as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [value] if isinstance(value, int | float) else [_whole(each) for each in value or ()]


class _Supervised(DEQBase):
    """What the two containers share: a gradient rule per returned state, the last one optionally exact.

    ift, hook_ift     exact gradient at the last state (see `backward_factory`)
    grad, tau         phantom steps, one number or one per state, and their damping
    sup_gap, sup_loc  phantom steps whose states are returned, too
    n_states          > 1: so many states, evenly spaced
    indexing          else: these steps, and the last one
    args, kwargs      see `DEQBase`
    """

    def __init__(
        self,
        args: Any = None,
        ift: bool = False,
        hook_ift: bool = False,
        grad: int | Sequence[int] = 1,
        tau: float = 1.0,
        sup_gap: int = -1,
        sup_loc: Sequence[int] | None = None,
        n_states: int = 1,
        indexing: Sequence[int] | None = None,
        **kwargs,
    ):
        super().__init__(args, **kwargs)
        get = self.args.get
        self.arg_n_states, self.arg_indexing = _whole(get("n_states", n_states)), _listed(get("indexing", indexing))
        if self.arg_n_states <= 1 and any(not 1 <= step <= self.f_max_iter for step in self.arg_indexing):
            raise UserError(f"indexing must list steps in 1 .. f_max_iter={self.f_max_iter}, got {self.arg_indexing}.")
        self.indexing = self._compute_f_iter(self.f_max_iter)
        steps = make_pair(self.indexing, _listed(get("grad", grad)))
        phantom = {"tau": get("tau", tau), "sup_gap": _whole(get("sup_gap", sup_gap))}
        phantom["sup_loc"] = _listed(get("sup_loc", sup_loc))
        self.produce_grad = [backward_factory(k, **phantom) for k in steps]
        hook_ift = get("hook_ift", hook_ift)
        if hook_ift or get("ift", ift):
            options = {"max_iter": self.b_max_iter, "tol": self.b_tol, "stop_mode": self.b_stop_mode}
            self.produce_grad[-1] = backward_factory("ift", hook_ift, self.b_solver, options)

    def forward(
        self,
        func: Callable,
        z_init: State,
        solver_kwargs: dict | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[[dict], None] | None = None,
        **kwargs,
    ) -> tuple[list[State], dict]:
        """(states, info); see `get_deq`."""
        warn_unknown(kwargs, CALL, "the call of the layer", alike=True)
        deq_func, z = deq_decorator(func, z_init)
        given = dict(solver_kwargs or {})
        if not self.training:
            steps = given.get("f_max_iter", self.eval_f_max_iter)
            z, *_, info = self._solve_fixed_point(deq_func, z, f_max_iter=steps, solver_kwargs=given)
            return self._evaluate(deq_func, z, info, sradius_mode)
        z_out, info = self._train(deq_func, z, given, backward_writer)
        return [deq_func.vec2list(z) for z in z_out], info

    def _train(self, deq_func: Map, z: Tensor, given: dict, writer: Callable | None) -> tuple[list[Tensor], dict]:
        """(states with gradient, info) of one training call with the solver options `given`."""
        raise NotImplementedError("Write _train in the class derived from _Supervised.")

    def _positions(self, f_max_iter: int) -> list[int]:
        """Steps of the states listed by `indexing`, then the end; those beyond a smaller budget fall on its end."""
        return [*(min(step, f_max_iter) for step in sorted(self.arg_indexing)), f_max_iter]

    def _compute_f_iter(self, f_max_iter: int) -> list[int]:
        raise NotImplementedError

    def _steps(self, solver_kwargs: dict) -> tuple[int, list[int]]:
        """Budget of a training call and what `_compute_f_iter` makes of it."""
        if "f_max_iter" not in solver_kwargs:
            return self.f_max_iter, self.indexing
        budget = int(solver_kwargs["f_max_iter"])
        return budget, self._compute_f_iter(budget)


class DEQIndexing(_Supervised):
    """One solve; the states at `indexing` and the last one get gradient branches. f_max_iter evaluations.

    As many states as requested, at any stopping step; the last is the solution and has the last rule (torchdeq
    drops states, and the ift rule with them, after an early stop). Evaluation: the solution alone.
    """

    def _compute_f_iter(self, f_max_iter: int) -> list[int]:
        """Steps after which states are taken, the last is f_max_iter."""
        return positions(f_max_iter, self.arg_n_states) if self.arg_n_states > 1 else self._positions(f_max_iter)

    def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, indexing=None, solver_kwargs=None, **kwargs):
        """(solution, states at `indexing` in training, info), constants."""
        return self._call_solver(
            deq_func, z_init, f_max_iter, solver_kwargs, indexing=indexing if self.training else None
        )

    def _train(self, deq_func: Map, z: Tensor, given: dict, writer: Callable | None) -> tuple[list[Tensor], dict]:
        steps, indexing = self._steps(given)
        z, trajectory, info = self._solve_fixed_point(
            deq_func, z, f_max_iter=steps, indexing=indexing, solver_kwargs=given
        )
        # a registered solver may have stopped early and returned fewer
        states = [*trajectory[: len(indexing) - 1], *[z] * (len(indexing) - 1 - len(trajectory)), z]
        z_out = []
        for state, produce_grad in zip(states, self.produce_grad, strict=True):
            z_out += produce_grad(self, deq_func, deq_func.detach(state), writer=writer)
        return z_out, info


class DEQSliced(_Supervised):
    """A solve per state, each starting from the last one after its gradient steps; then f_max_iter + n_states * grad
    evaluations.

    info covers all slices: residuals of the last one, traces one after another, nstep in total (torchdeq: the last
    slice alone). Evaluation: one solve, the solution alone.
    """

    def _compute_f_iter(self, f_max_iter: int) -> list[int]:
        """Steps of each slice; f_max_iter // n_states for n_states, so that a remainder is not used, as in torchdeq."""
        if self.arg_n_states > 1:
            return [f_max_iter // self.arg_n_states] * self.arg_n_states
        ends = [0, *self._positions(f_max_iter)]
        return [end - start for start, end in pairwise(ends)]

    def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, solver_kwargs=None, **kwargs):
        """(solution, info) of one slice, constants."""
        z, _, info = self._call_solver(deq_func, z_init, f_max_iter, solver_kwargs)
        return z, info

    def _train(self, deq_func: Map, z: Tensor, given: dict, writer: Callable | None) -> tuple[list[Tensor], dict]:
        z_out, infos = [], []
        for steps, produce_grad in zip(self._steps(given)[1], self.produce_grad, strict=True):
            z, info = self._solve_fixed_point(deq_func, z, f_max_iter=steps, solver_kwargs=given)
            infos.append(info)
            z_out += produce_grad(self, deq_func, deq_func.detach(z), writer=writer)
            z = z_out[-1]
        return z_out, self._joined(infos)

    def _joined(self, infos: list[dict]) -> dict:
        """One info of all slices; that of the last one when a registered solver filled it, in its own way."""
        if len(infos) == 1 or self.f_solver not in OWN:
            return infos[-1]
        joined = SolverStat(infos[-1])
        joined["nstep"] = sum(info["nstep"] for info in infos)
        if not self.no_stat:
            for key in ("abs_trace", "rel_trace"):
                joined[key] = torch.cat([info[key] for info in infos], dim=1)
        return joined


CALL = ("func", "z_init", "solver_kwargs", "sradius_mode", "backward_writer")
_cores: dict[str, type[DEQBase]] = {"indexing": DEQIndexing, "sliced": DEQSliced}


def register_deq(deq_type: str, core: type[DEQBase]) -> None:
    """Let get_deq(core=deq_type) build `core`, a class derived from DEQBase, with the settings as `args`."""
    if not callable(core):
        raise UserError(f"core of register_deq must be a class derived from DEQBase, got {core!r}. Pass the class.")
    _cores[deq_type] = core


def get_deq(args: Any = None, **kwargs) -> DEQBase:
    """The equilibrium layer that the settings describe; `z_out, info = deq(func, z_init)`.

    args    Namespace, dict, DEQConfig or object; foreign settings in it are ignored, itself never changed
    kwargs  settings that come before args; one warning names those that are none
    core    "sliced" (default, DEQSliced), "indexing" (DEQIndexing) or registered; for the other settings see `DEQBase`,
            `backward_factory` and the two classes

    The layer takes
    func             map of the state; z_init a tensor (B, ...), or a list or tuple of tensors: then func takes and
                     returns several, their shapes unchanged
    solver_kwargs    f_max_iter of this call, and options of the solver: m, lam, tau, ls, LBFGS_thres, return_final
    sradius_mode     evaluation: info["sradius"] (B,) is the spectral radius of the Jacobian, else zeros (1,)
    backward_writer  called with the info of the ift rules' backward solve
    and returns
    z_out            list of states of the structure of z_init. Training: with gradient, as many as asked for, the last
                     one is the solution. Evaluation: the solution alone, a constant
    info             `SolverStat`
    """
    config = DEQConfig(args)
    core = kwargs.get("core", config.get("core", "sliced"))
    if core not in _cores:
        raise UserError(f"core must be one of {', '.join(_cores)}, got {core!r}. {nearest(str(core), _cores)}")
    known = SETTINGS | set(inspect.signature(_cores[core]).parameters)
    warn_unknown(kwargs, known, "get_deq")
    config.update(**kwargs)
    return _cores[core](config)
