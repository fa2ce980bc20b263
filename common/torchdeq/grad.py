"""torchdeq's gradient rules over common.deq.grads, and the form in which a solver sees the state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.deq.grads import Gradient, Unrolled, flatten_state, replace_gradient, replace_gradient_by_recomputing
from common.deq.structure import Layout, State
from common.errors import UserError
from common.torchdeq.solver import get_solver


class Map:
    """func on the state as the solver sees it: a tensor as it is, a list or tuple of tensors as one matrix (B, D).

    A list or tuple is handed to func as several arguments; what it returns may be a list or a tuple.
    """

    def __init__(self, func: Callable, z_init: State):
        self.func = func
        self.layout = None if isinstance(z_init, Tensor) else Layout.of(z_init)
        self.spread = isinstance(z_init, list | tuple)

    def list2vec(self, z: State) -> Tensor:
        return z if self.layout is None else self.layout.pack(z)

    def vec2list(self, z: Tensor) -> State:
        return z if self.layout is None else self.layout.unpack(z)

    def detach(self, z: Tensor) -> Tensor:
        return z.detach()

    def __call__(self, z: Tensor, tau: float = 1.0) -> Tensor:
        """tau func(z) + (1 - tau) z."""
        if self.layout is None:
            image = self.func(z)
        else:
            parts = self.layout.unpack(z)
            image = self.func(*parts) if self.spread else self.func(parts)
            if isinstance(image, list | tuple):
                leaves = pytree.tree_leaves(image)
                if len(leaves) == self.layout.spec.num_leaves:
                    image = pytree.tree_unflatten(leaves, self.layout.spec)
            image = self.layout.pack_image(image, len(z))
        return image if tau == 1 else tau * image + (1 - tau) * z


def deq_decorator(func: Callable, z_init: State, no_stat: bool | None = True) -> tuple[Map, Tensor]:
    """(func on the solver's form of the state, z_init in that form). no_stat is accepted for torchdeq's signature."""
    wrapped = Map(func, z_init)
    return wrapped, wrapped.list2vec(z_init)


def make_pair(target: Sequence, source: Sequence) -> list:
    """`source` with one entry per entry of `target`: a single one is repeated. Raises UserError for other lengths."""
    if len(source) not in (1, len(target)):
        raise UserError(
            f"grad lists {len(source)} phantom steps for {len(target)} states. Give one number, or one per state."
        )
    return list(source) * (len(target) if len(source) == 1 else 1)


@dataclass(frozen=True)
class _Phantom:
    """States along k damped differentiable steps: all in `at`, in order. `relax` above 1 is put into the map."""

    rule: Unrolled
    at: tuple[int, ...]
    relax: float = 1.0

    def __call__(self, trainer, func: Callable, z_pred: Tensor, writer: Callable | None = None, **kwargs):
        if self.relax != 1:
            plain, relax = func, self.relax
            func = lambda z: relax * plain(z) + (1 - relax) * z
        states = self.rule.attach(func, z_pred, None)
        steps = sorted({*self.rule.at, self.rule.steps})
        return [states[steps.index(step)] for step in self.at]


class _ByFunction(Gradient):
    """common.deq.grads.Implicit, its backward system solved by a function with torchdeq's signature."""

    def __init__(self, b_solver: Callable, options: dict, recompute: bool, writer: Callable | None):
        self.b_solver, self.options, self.recompute, self.writer = b_solver, options, recompute, writer

    def attach(self, fn, z, args, *, solution=None):
        problem, layout, flat = flatten_state(fn, z, args)
        replace = replace_gradient_by_recomputing if self.recompute else replace_gradient
        return [layout.unpack(replace(problem, flat, self._rows))]

    def _rows(self, vjp: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        y, _, info = self.b_solver(lambda y: vjp(y) + grad, torch.zeros_like(grad), **self.options)
        if self.writer is not None:
            self.writer(info)
        return y


@dataclass(frozen=True)
class _Ift:
    b_solver: Callable
    hook: bool
    options: dict = field(default_factory=dict)

    def __call__(self, trainer, func: Callable, z_pred: Tensor, writer: Callable | None = None, **kwargs):
        return _ByFunction(self.b_solver, self.options, not self.hook, writer).attach(func, z_pred, None)


def backward_factory(
    grad_type: str | int = "ift",
    hook_ift: bool = False,
    b_solver: Callable | None = None,
    b_solver_kwargs: dict | None = None,
    sup_gap: int = -1,
    sup_loc: Sequence[int] | None = None,
    tau: float = 1.0,
    **grad_factory_kwargs,
) -> Callable[..., list[Tensor]]:
    """A function (trainer, func, z_pred, writer=None) -> list of states with gradient, from a constant z_pred.

    grad_type  "ift": func(z_pred) with the exact gradient, its backward system y = y J + g solved by
               b_solver(map, zeros, **b_solver_kwargs), whose info goes to writer. Second derivatives raise (torchdeq's
               are silently wrong)
               k >= 1: k phantom steps z <- tau func(z) + (1 - tau) z, tau > 0; above 1 is over-relaxed
    hook_ift   keep the one graph of func (a hook) instead of evaluating func again in the backward pass
    sup_gap    > 0: the states after every sup_gap-th phantom step, and only those
    sup_loc    the states after these phantom steps, then the last one
    """
    if grad_type == "ift":
        return _Ift(b_solver or get_solver("fixed_point_iter"), bool(hook_ift), dict(b_solver_kwargs or {}))
    grad_type = int(grad_type) if isinstance(grad_type, np.integer) else grad_type
    if isinstance(grad_type, bool) or not isinstance(grad_type, int) or grad_type < 1:
        raise UserError(f"grad must be a whole number of at least 1, got {grad_type!r}. 1 is the one-step gradient.")
    if not tau > 0:
        raise UserError(f"tau must be > 0, got {tau}. 1 is undamped.")
    if sup_gap > grad_type:
        raise UserError(f"sup_gap={sup_gap} is more than the {grad_type} phantom steps of grad. Lower sup_gap.")
    if sup_gap > 0:
        at = tuple(range(sup_gap, grad_type + 1, sup_gap))
    else:
        at = (*sorted({step for step in sup_loc or () if 1 <= step <= grad_type}), grad_type)
    return _Phantom(Unrolled(steps=at[-1], tau=min(tau, 1.0), at=at), at, max(tau, 1.0))
