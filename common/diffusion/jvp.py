"""The total derivative of a network along a path, by forward-mode differentiation: what MeanFlow's identity needs.

A pass in forward mode carries a tangent beside every activation. Done here so that it costs little:
  rows      only the samples that need the derivative take the pass
  no graph  the derivative is a constant of the loss, so neither it nor the activations are kept
  rules     PyTorch's own rule for a layer multiplies the tangent of the weights too, which is zero: a third of all
            products. `ForwardRules` leaves them out, and takes the derivative of a norm and of a softmax, whose
            Jacobians are symmetric, from their fused backward kernels
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from common.deq.structure import without_autocast
from common.errors import UserError
from common.tensors import append_dims, like_layout, only_shapes, select_rows


def total_derivative(
    u: Callable,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    tangents: tuple[Tensor, float, float],
    conditions: Mapping | None = None,
    *,
    skip_equal: bool = True,
) -> Tensor:
    """dz . grad_z u + dt du/dt + dr du/dr at (z, t, r): (B, ...), a constant (no graph), zero in the rows with r = t.

    u            (z, t, r, **conditions) -> (B, ...) of the shape of z; a module or a function that calls one
    z            (B, ...)
    t, r         (B,), r <= t, on any device. Give them on the CPU: the host then finds the rows without waiting
    tangents     (dz, dt, dr): dz (B, ...), the others numbers. MeanFlow: (v, 1, 0), the derivative by t along the path
    conditions   keyword arguments of u. Tensors with one row per sample, also inside tuples, follow their samples;
                 everything else is passed on. Masks of dropout belong here, so that both passes drop the same units
    skip_equal   False: all rows take the pass, which keeps every shape fixed. Same result either way

    Under autocast the pass runs in float32: (t - r) times a derivative in bfloat16 is mostly noise. A module compiled
    in place (`module.compile()`) takes this pass uncompiled; where the caller itself is compiled, so is this.
    """
    conditions = dict(conditions or {})
    dz, dt, dr = tangents
    if dz.shape != z.shape:
        raise UserError(f"the tangent of z must have its shape {tuple(z.shape)}, got {tuple(dz.shape)}.")
    live = r < t
    count = len(z)
    rows = None
    if skip_equal and not torch.compiler.is_compiling() and not only_shapes(t):
        rows = live.nonzero().flatten()
        if len(rows) == 0:
            return torch.zeros_like(z)
        rows = None if len(rows) == count else rows.to(z.device, non_blocking=True)
    with torch.no_grad(), without_autocast(z.device.type):
        dz = dz.detach().to(z.dtype)
        t, r = (time.detach().to(z.device, z.dtype, non_blocking=True).contiguous() for time in (t, r))
        if rows is None:
            found = _tangent(u, z.detach(), t, r, (dz, dt, dr), conditions)
            return torch.where(append_dims(live, z).to(z.device, non_blocking=True), found, 0.0)
        chosen = select_rows(conditions, rows, count)
        pick = lambda value: select_rows(value.detach(), rows, count)
        found = _tangent(u, pick(z), pick(t), pick(r), (pick(dz), dt, dr), chosen)
        return torch.zeros_like(z).index_copy_(0, rows, found.to(z.dtype))


def _tangent(u: Callable, z: Tensor, t: Tensor, r: Tensor, tangents, conditions: dict) -> Tensor:
    """The derivative of u for all rows given."""
    dz, dt, dr = tangents
    if not torch.compiler.is_compiling():
        _load_decompositions()
    if torch.compiler.is_compiling() or only_shapes(z):
        primals, directions = (z, t, r), (dz, torch.full_like(t, dt), torch.full_like(r, dr))
        return torch.func.jvp(lambda z, t, r: u(z, t, r, **conditions), primals, directions)[1]
    with ExitStack() as stack:
        for context in (torch.compiler.set_stance("force_eager"), ForwardRules(), forward_ad.dual_level()):
            stack.enter_context(context)
        if dz.stride() != z.stride():  # torch wants both in one layout
            dz = torch.empty_like(z).copy_(dz)
        moving = [forward_ad.make_dual(z, dz)]
        for time, speed in ((t, dt), (r, dr)):
            moving.append(forward_ad.make_dual(time, torch.full_like(time, speed)) if speed else time)
        value, tangent = forward_ad.unpack_dual(u(*moving, **conditions))
        return torch.zeros_like(value) if tangent is None else tangent


@cache
def _load_decompositions() -> None:
    """What torch loads with the first dual tensor, now and without its warning about its own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


# Rules ----------------------------------------------------------------------------------------------------------------


class ForwardRules(TorchFunctionMode):
    """Inside, layers of constant weights and a few functions take a cheaper forward-mode rule than PyTorch's own.

    Exact up to rounding; what has no rule here keeps PyTorch's. Only functions called from Python are seen.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = RULES.get(func)
        found = NotImplemented if rule is None else rule(func, *args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _split(value) -> tuple:
    """(value, tangent), the tangent None for what does not move."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value, None
    return forward_ad.unpack_dual(value)


def _moves(*values) -> bool:
    return any(_split(value)[1] is not None for value in values)


def _layer(func, input, weight, bias=None, *args, **kwargs):  # the names torch uses
    """Linear and convolutions: the tangent goes through the same layer without its bias."""
    x, dx = _split(input)
    if dx is None or _moves(weight, bias):
        return NotImplemented
    return forward_ad.make_dual(func(x, weight, bias, *args, **kwargs), func(dx, weight, None, *args, **kwargs))


def _product(func, input, other):
    """Matrix products of which only one factor moves."""
    (a, da), (b, db) = _split(input), _split(other)
    if (da is None) == (db is None):
        return NotImplemented
    # d(A B) = dA B + A dB, of which one term is zero
    return forward_ad.make_dual(func(a, b), func(a, db) if da is None else func(da, b))


def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5):
    x, dx = _split(input)
    if dx is None or x.dim() < 2 or _moves(weight, bias):
        return NotImplemented
    batch, channels = x.shape[:2]
    shape = (batch, channels, x.shape[2:].numel(), num_groups)
    x, dx = _same_layout(x, dx)
    # Without the affine part, the Jacobian of y = (x - mean) / std is (I - 1 1^T / n - y y^T / n) / std: symmetric, so
    # that the backward kernel applied to dx is the tangent.
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *shape, eps)
    ones = None if weight is None else torch.ones_like(weight)
    grad = torch.ops.aten.native_group_norm_backward
    dy = grad(dx, x, mean, rstd, ones, *shape, [True, False, False])[0]
    return forward_ad.make_dual(y, dy if weight is None else dy * append_dims(weight, x, dim=1))


def _layer_norm(func, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    x, dx = _split(input)
    if dx is None or _moves(weight, bias):
        return NotImplemented
    x, dx = x.contiguous(), dx.contiguous()
    # as in _group_norm: a symmetric Jacobian, then the weight
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    grad = torch.ops.aten.native_layer_norm_backward
    dy = grad(dx, x, normalized_shape, mean, rstd, None, None, [True, False, False])[0]
    return forward_ad.make_dual(y, dy if weight is None else dy * weight)


def _softmax(func, input, dim=None, *args, dtype=None, **kwargs):
    x, dx = _split(input)
    if dx is None or dim is None or args or kwargs:
        return NotImplemented
    x, dx = (x, dx) if dtype is None else (x.to(dtype), dx.to(dtype))
    y = torch.softmax(x, dim)
    # dy = y * (dx - sum(y * dx)), the Jacobian diag(y) - y y^T being symmetric
    return forward_ad.make_dual(y, torch._softmax_backward_data(dx, y, dim, y.dtype))


def _same_layout(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    return like_layout(x, x), like_layout(dx, x)


RULES: dict[Callable, Callable] = {
    **dict.fromkeys([F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d], _layer),
    **dict.fromkeys([torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm], _product),
    torch.Tensor.__matmul__: _product,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    **dict.fromkeys([torch.softmax, torch.Tensor.softmax], _softmax),
}
