"""Small operations on tensors and on structures of them (nested tuples, lists and dicts) that every part needs."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def append_dims(value: Tensor, like: Tensor, dim: int = 0) -> Tensor:
    """value (B,) as (B, 1, ..., 1), so that one number multiplies each sample of `like` (B, ...).

    dim  dimension of `like` that the numbers belong to; 1: value (C,) as (C, 1, ..., 1) for channels
    A value without dimensions comes back as it is.
    """
    return value.reshape(-1, *[1] * (like.dim() - dim - 1)) if value.dim() else value


def only_shapes(*values: Tensor) -> bool:
    """Whether tensors hold shapes but no numbers: one of `values` is on the meta device or fake, or a FakeTensorMode is
    active. Planning and tests of large networks run that way. Nothing may then depend on a value.
    """
    return any(value.device.type == "meta" for value in values) or torch._guards.detect_fake_mode(values) is not None


def known_to_host(value: Tensor) -> bool:
    """Whether Python may read numbers of `value` at no cost: it is on the CPU (an accelerator would have to be waited
    for), it has numbers, and torch.compile is not tracing.
    """
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not only_shapes(value)


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) lies in memory with the channels innermost; False where that is the same as contiguous."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def like_layout(x: Tensor, like: Tensor) -> Tensor:
    """x with the channels innermost if `like` has them so, else contiguous; a copy only where it is not yet."""
    return x.contiguous(memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)


def select_rows(tree, rows: Tensor, count: int | None = None):
    """The rows (n,) int64 of every tensor of a structure, along its first dimension and in its memory layout.

    count  size of the batch. Tensors with another first dimension (one row that serves all samples) and tensors without
           dimensions come back as they are; so does everything when the batch is a single sample. None: every tensor
           has a row per sample
    What is no tensor comes back as it is.
    """

    def pick(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        if count is not None and (count == 1 or leaf.dim() == 0 or leaf.shape[0] != count):
            return leaf
        picked = leaf.index_select(0, rows.to(leaf.device, non_blocking=True))
        return like_layout(picked, leaf) if is_channels_last(leaf) else picked

    return pytree.tree_map(pick, tree)


def detach(tree):
    """Every tensor of a structure as a constant, without the graph that made it; the rest as it is."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of `value` over the processes of a distributed run; `value` itself outside one.

    Every process must call it, with equal shapes. The storage of `value` is overwritten.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()
