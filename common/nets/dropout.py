"""Dropout with masks that can be drawn beforehand, kept, and used again.

Consistency training runs the network twice and needs the same units dropped both times. Saving and restoring the
random state does that, at the price of a second full-batch pass; an explicit mask per sample does it for any
sub-batch, on any device, in any order.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.tensors import is_channels_last


def dropout(x: Tensor, p: float, training: bool, mask: Tensor | None = None) -> Tensor:
    """`x` with a fraction `p` of its entries set to zero and the others divided by 1 - p.

    x         (B, ...)      any float dtype
    p         [0, 1)        0 returns x itself, so does training=False
    mask      (B, ...) bool True = keep; None draws a fresh one as torch does
    """
    if not training or p == 0:
        return x
    if mask is None:
        return F.dropout(x, p=p)
    # Autograd keeps the one-byte mask only; the product is a temporary, so scaling it in place is safe.
    return (x * mask).mul_(1 / (1 - p))


def unet_layers(net: nn.Module) -> list[tuple[float, tuple[int, ...]]]:
    """(probability, shape without batch) of every active dropout layer of a U-Net, in execution order.

    net  has module dictionaries `enc` and `dec`, whose names start with the resolution ("16x16_block0") and whose
         residual blocks have `dropout` and `out_channels`
    """
    layers = []
    for name, layer in [*net.enc.items(), *net.dec.items()]:
        if getattr(layer, "dropout", 0):
            res = int(name.partition("x")[0])
            layers.append((layer.dropout, (layer.out_channels, res, res)))
    return layers


def draw_masks(
    layers: Sequence[tuple[float, tuple[int, ...]]],
    x: Tensor,
    weight: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """One bool keep-mask (B, *shape) per (p, shape) of `layers`, on x's device, B = x.shape[0].

    Values come in the order, and on a CPU from the stream, of F.dropout. Where x or the convolution `weight` is
    channels_last the masks are laid out so too, to match the activations; their values do not change.
    """
    channels_last = is_channels_last(x) or is_channels_last(weight)
    masks = []
    for p, shape in layers:
        mask = torch.empty(x.shape[0], *shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
        masks.append(mask.contiguous(memory_format=torch.channels_last) if channels_last and mask.ndim == 4 else mask)
    return tuple(masks)


def feed_masks(masks: Sequence[Tensor] | None, count: int, batch: int) -> Iterator[Tensor] | None:
    """An iterator over `masks`, or None when masks is None. Raises UserError unless there are `count` of them, each
    with `batch` rows."""
    if masks is None:
        return None
    if len(masks) != count:
        raise UserError(
            f"dropout_masks holds {len(masks)} masks but this network has {count} active dropout layers. "
            "Take them from draw_dropout(x) of the same network."
        )
    for mask in masks:
        if mask.shape[0] != batch:
            raise UserError(
                f"dropout_masks are for {mask.shape[0]} samples but x holds {batch}. "
                "Select the same rows: tuple(m[rows] for m in masks)."
            )
    return iter(masks)
