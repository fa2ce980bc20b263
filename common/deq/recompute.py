"""Gradient steps without stored activations: the backward pass runs the step again (activation checkpointing)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import nn
from torch.utils.checkpoint import checkpoint

from common.deq.dropout import VariationalMask
from common.deq.layers import Held, Norm


def mem_gc(func: Callable, in_args: Sequence | None = None, module: Callable | None = None):
    """func(*in_args), storing only in_args. The backward pass computes the activations again.

    func     module or function of tensors; returns a tensor or a tuple
    in_args  its arguments; tensors among them may require gradients
    module   the module with the held weights and dropout masks that func uses. None: func itself, if it is a module

    Gradients reach in_args, the parameters and everything else that func reads; hooks run as usual, so DDP works. The
    second run uses the held weights, the variational masks and the random numbers of the first, even when `reset` was
    called in between.
    Memory: the arguments of each call, and in the backward pass the activations of one call at a time.
    """
    owner = func if module is None else module

    def contexts():
        return nullcontext(), RestoreHeldState(owner)

    return checkpoint(func, *(in_args or ()), use_reentrant=False, context_fn=contexts)


class RestoreHeldState:
    """Context manager: inside it, the held weights and masks below `module` are those of when it was created.

    module  any callable. A callable that is not a module holds nothing, and the context does nothing

    It is created before the first run. A mask that did not exist then is drawn again from the restored random state,
    so the random numbers drawn after it in the same call are the same, too. The context can be entered repeatedly.
    """

    def __init__(self, module: Callable):
        modules = module.modules() if isinstance(module, nn.Module) else ()
        self.layers = [layer for layer in modules if isinstance(layer, Norm | VariationalMask)]
        self.recorded = [layer.current() if isinstance(layer, Norm) else layer.mask for layer in self.layers]

    def __enter__(self) -> None:
        self.replaced = _held_state(self.layers)
        # A backward pass may have marked the held weight as spent. It is the pass that this second run belongs to, so
        # the weight may be used again.
        usable = [replace(held, spent=False) if isinstance(held, Held) else held for held in self.recorded]
        _set_held_state(self.layers, usable)

    def __exit__(self, *_) -> None:
        _set_held_state(self.layers, self.replaced)


def _held_state(layers: Sequence[nn.Module]) -> list:
    return [layer.held if isinstance(layer, Norm) else layer.mask for layer in layers]


def _set_held_state(layers: Sequence[nn.Module], state: list) -> None:
    for layer, value in zip(layers, state, strict=True):
        setattr(layer, "held" if isinstance(layer, Norm) else "mask", value)
