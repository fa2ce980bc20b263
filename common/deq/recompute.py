"""Gradient steps without stored activations: run forward, forget, run again in the backward pass."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import nn
from torch.utils.checkpoint import checkpoint

from common.deq.dropout import VariationalMask
from common.deq.layers import Held, Norm


def mem_gc(func: Callable, in_args: Sequence | None = None, module: Callable | None = None):
    """func(*in_args), keeping only in_args: what lies between is computed again in the backward pass.

    func     module or function of tensors; returns a tensor or a tuple
    in_args  its arguments; tensors among them may require gradients
    module   whose held weights and dropout masks belong to this call; None = func, when that is a module

    Gradients reach in_args, parameters, and anything else func reads, through hooks as usual (DDP works). The second
    run sees the held weights, variational masks and random numbers of the first, even when `reset` has come between.
    Memory: the arguments per call, and the activations of one call at a time in the backward pass.
    """
    held = func if module is None else module

    def contexts():
        return nullcontext(), AsBefore(held)

    return checkpoint(func, *(in_args or ()), use_reentrant=False, context_fn=contexts)


class AsBefore:
    """A context, to be entered any number of times: held weights and masks below `module` as when it was made.

    module  any callable; what is no module has nothing held, and the context does nothing

    That is before the first run: a mask not drawn by then is drawn again, from the restored random state, so that
    what is drawn after it in the same call is the same too.
    """

    def __init__(self, module: Callable):
        parts = module.modules() if isinstance(module, nn.Module) else ()
        self.parts = [part for part in parts if isinstance(part, Norm | VariationalMask)]
        self.entry = [part.current() if isinstance(part, Norm) else part.mask for part in self.parts]

    def __enter__(self) -> None:
        self.now = _state(self.parts)
        # A backward pass through the held weight may have begun already: it is part of this very one.
        fresh = [replace(s, spent=False) if isinstance(s, Held) else s for s in self.entry]
        _set(self.parts, fresh)

    def __exit__(self, *_) -> None:
        _set(self.parts, self.now)


def _state(parts: Sequence[nn.Module]) -> list:
    return [part.held if isinstance(part, Norm) else part.mask for part in parts]


def _set(parts: Sequence[nn.Module], state: list) -> None:
    for part, value in zip(parts, state, strict=True):
        setattr(part, "held" if isinstance(part, Norm) else "mask", value)
