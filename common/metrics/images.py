"""From generated images to the 8-bit images every metric sees, and from 8-bit images to network input."""

import torch
from torch import Tensor

from common import limits
from common.errors import UserError

ROUNDINGS = ("edm", "floor255", "nearest")


def to_uint8(x: Tensor, rule: str = "edm") -> Tensor:
    """8-bit images, the rounding that happens BEFORE features.

    x     (B, C, H, W) float in [-1, 1] (values outside are clipped); uint8 passes unchanged
    rule  "edm"       trunc(clip(127.5 x + 128, 0, 255)): EDM, EDM2, ECT, SiT (arXiv 2206.00364, official `generate.py`)
          "floor255"  trunc(255 clip((x+1)/2, 0, 1)): torchmetrics with normalize=True, torchvision `.mul(255).byte()`
          "nearest"   round(127.5 (x + 1)): half to even; the inverse of `from_uint8` up to rounding error

    Raises UserError on an unknown rule, on other integer types and on non-finite values.
    """
    limits.choice("rounding", rule, ROUNDINGS)
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise UserError(f"images must be uint8, or float in [-1, 1], got {x.dtype}. Convert them before the metric.")
    # bfloat16 has 8 bits of precision: scaling in it would lose grey levels
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise UserError(f"images hold {bad} non-finite values, so no metric is defined. Look at the samples first.")
    if rule == "edm":
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    if rule == "floor255":
        return (((x + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """images uint8 -> float32 in [-1, 1], x = v / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1
