"""torchdeq 0.1.0 in names, arguments, defaults and return shapes, over common.deq: change one import.

    from common.torchdeq import api as torchdeq
    from common.torchdeq.api import apply_norm, get_deq, reset_norm
    from common.torchdeq.api.norm import apply_norm                  # its sub-modules can be imported from, too

    deq = get_deq(f_solver="broyden", f_max_iter=18, grad=5, tau=0.5)
    z_out, info = deq(lambda z: cell(z, x), torch.zeros_like(x))

New code uses common.deq directly. Errors of torchdeq are corrected here; the docstring of each name states the
difference. Three remarks concern no single name. The default f_stop_mode "abs" depends on the width of the state and is
rarely met by convolutional ones: use "rel". Compile `func`, not the layer. A language model with f_max_iter 0 is an
unrolled network, not a root solve.

TorchDEQ: arXiv 2310.18605, released as torchdeq 0.1.0.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from common.deq.correction import const_weight, exp_weight, linear_weight, losses_of
from common.deq.dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
)
from common.deq.recompute import mem_gc
from common.deq.regular import hutchinson, power_iteration
from common.errors import UserError, nearest
from common.torchdeq import initial
from common.torchdeq.config import DEQConfig, add_deq_args, warn_unknown
from common.torchdeq.core import (
    DEQBase,
    DEQIndexing,
    DEQSliced,
    get_deq,
    register_deq,
)
from common.torchdeq.grad import backward_factory, deq_decorator, make_pair
from common.torchdeq.norm import (
    SpectralNorm,
    WeightNorm,
    apply_norm,
    from_torchdeq,
    register_norm,
    register_norm_module,
    remove_norm,
    reset_deq,
    reset_dropout,
    reset_norm,
)
from common.torchdeq.solver import (
    SolverStat,
    anderson_solver,
    batch_flatten,
    batch_masked_mixing,
    broyden_solver,
    fixed_point_iter,
    get_solver,
    init_solver_info,
    register_solver,
    simple_fixed_point_iter,
    solver_stat_from_final_step,
    solver_stat_from_info,
    update_state,
)

_weights: dict[str, Callable[..., float]] = {"exp": exp_weight, "linear": linear_weight, "const": const_weight}
_OWN_WEIGHTS = frozenset(_weights.values())


def register_weight_func(name: str, func: Callable[..., float]) -> None:
    """Let fp_correction(weight_func=name) weight state k = 0..n-1 of n by func(n, k, **kwargs)."""
    if not callable(func):
        raise UserError(f"func of register_weight_func must be a function of (n, k), got {func!r}. Pass the function.")
    _weights[name] = func


def fp_correction(
    crit: Callable[..., Tensor], args: Sequence, weight_func: str = "exp", return_loss_values: bool = False, **kwargs
) -> Tensor | tuple[Tensor, list[float]]:
    """Loss over the states of a solve, sum_k w(n, k) crit(*args_k): sparse fixed-point correction (2204.08442, Eq. 9).

    args         of crit: a list or tuple gives one entry per state, all else is repeated; a shorter list starts over,
                 as in torchdeq, with a warning
    weight_func  "exp": gamma^(n-k-1), gamma 0.8;  "linear": 1 - (n-k-1)/n gamma + bias, gamma 0.9, bias 0;
                 "const": c, 1, one number on any device (torchdeq: a vector, on CUDA only); or registered
    kwargs       gamma, bias, c, as far as the function takes them

    return_loss_values: also the n losses as numbers, which waits for the device.
    """
    if weight_func not in _weights:
        raise UserError(
            f"weight_func must be one of {', '.join(_weights)}, got {weight_func!r}. "
            f"{nearest(str(weight_func), _weights)}"
        )
    function = _weights[weight_func]
    if function in _OWN_WEIGHTS:
        warn_unknown(kwargs, ("gamma", "bias", "c"), "fp_correction")
        taken = inspect.signature(function).parameters
        kwargs = {name: value for name, value in kwargs.items() if name in taken}
    columns = [each if isinstance(each, list | tuple) else [each] for each in args]
    n = max((len(column) for column in columns), default=0)
    if any(len(column) not in (0, 1, n) for column in columns):
        warnings.warn(
            f"the lists in args hold {[len(c) for c in columns]} states: the shorter start over.", stacklevel=2
        )
        columns = [[column[k % len(column)] for k in range(n)] if column else column for column in columns]
    losses = losses_of(crit, columns)
    n = len(losses)
    loss = sum(function(n, k, **kwargs) * each for k, each in enumerate(losses))
    return (loss, [each.item() for each in losses]) if return_loss_values else loss


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Estimate of ||J||_F^2 / numel(z0), a scalar, from f0 = f(z0) with its graph, which stays usable.

    vecs  Gaussian probes; create_graph  the estimate has a gradient. See common.deq.regular.hutchinson.
    """
    _need_graph(f0, z0, "jac_reg")
    value = hutchinson(f0, z0, vecs)  # with create_graph=False it would free the graph of f0
    return value if create_graph else value.detach()


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """(vector of norm 1 per sample, shape of z0; spectral radius (B,)) of J = d f0 / d z0.

    Right for complex pairs, too (torchdeq's Rayleigh quotient gives .49 for a rotation scaled by .9).
    """
    _need_graph(f0, z0, "power_method")
    product = lambda v: torch.autograd.grad(f0, z0, v, retain_graph=True)[0]
    with torch.no_grad():
        return power_iteration(product, torch.randn_like(z0), n_iters)


def _need_graph(f0: Tensor, z0: Tensor, where: str) -> None:
    if not (f0.requires_grad and z0.requires_grad):
        raise UserError(
            f"{where} needs f0 = f(z0) with its graph. Call z0.requires_grad_() before f, with autograd on."
        )


def mixed_init(z_shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Entries N(0, 1) or 0, with probability 1/2 each (arXiv 2211.09961); see common.torchdeq.initial.mixed_init."""
    return initial.mixed_init(z_shape, device=device)


def _submodule(name: str, *members, **more) -> ModuleType:
    """A module under torchdeq's name, so that `from common.torchdeq.api.<name> import ...` works, too."""
    path = f"{__name__}.{name}"
    module = ModuleType(path, f"torchdeq.{name}, see {__name__}.")
    members = {member.__name__: member for member in members} | more
    vars(module).update(members, __all__=[each for each in members if not isinstance(members[each], ModuleType)])
    sys.modules[path] = module
    return module


_FIXED_POINT = (fixed_point_iter, simple_fixed_point_iter)
_HELPERS = (
    batch_flatten, batch_masked_mixing, init_solver_info, solver_stat_from_final_step, solver_stat_from_info,
    update_state,
)  # fmt: skip
core = _submodule(
    "core", DEQBase, DEQIndexing, DEQSliced, get_deq, register_deq, reset_deq, get_solver, make_pair, backward_factory,
    power_method, DEQConfig, deq_decorator, reset_norm, reset_dropout,
)  # fmt: skip
grad = _submodule("grad", backward_factory, make_pair)
solver = _submodule(
    "solver", *_FIXED_POINT, anderson_solver, broyden_solver, get_solver, register_solver, solver_stat_from_final_step,
    anderson=_submodule("solver.anderson", anderson_solver),
    broyden=_submodule("solver.broyden", broyden_solver),
    fp_iter=_submodule("solver.fp_iter", *_FIXED_POINT),
    stat=_submodule("solver.stat", SolverStat),
    utils=_submodule("solver.utils", *_HELPERS),
)  # fmt: skip
norm = _submodule(
    "norm", WeightNorm, SpectralNorm, apply_norm, from_torchdeq, register_norm, register_norm_module, remove_norm,
    reset_norm,
    base_norm=_submodule("norm.base_norm", apply_norm, register_norm, register_norm_module, remove_norm, reset_norm),
    weight_norm=_submodule("norm.weight_norm", WeightNorm),
    spectral_norm=_submodule("norm.spectral_norm", SpectralNorm),
)  # fmt: skip
dropout = _submodule(
    "dropout", VariationalDropout, VariationalDropout1d, VariationalDropout2d, VariationalDropout3d,
    VariationalDropToken1d, VariationalDropToken2d, VariationalDropToken3d, reset_dropout,
)  # fmt: skip
loss = _submodule(
    "loss", fp_correction, register_weight_func, jac_reg, power_method,
    correction=_submodule("loss.correction", fp_correction, register_weight_func),
    jacobian=_submodule("loss.jacobian", jac_reg, power_method),
)  # fmt: skip
utils = _submodule(
    "utils", add_deq_args, mem_gc, mixed_init,
    arg_utils=_submodule("utils.arg_utils", add_deq_args),
    config=_submodule("utils.config", DEQConfig),
    init=_submodule("utils.init", mixed_init),
    layer_utils=_submodule("utils.layer_utils", deq_decorator),
    mem=_submodule("utils.mem", mem_gc),
)  # fmt: skip
