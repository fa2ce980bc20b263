"""Correlation of every pixel of one feature map with every pixel of another, looked up around a flow.

RAFT (arXiv 2003.12039), section 3.2: C[p, x] = <f1[p], f2[x]> / sqrt(D) over all pairs of pixels, a pyramid of it by
2x2 means over x, and bilinear samples of each level on a (2r+1)^2 grid around the pixel p points to. The grid's spacing
is one pixel of its level, so all samples of a pixel lie at the same fraction between pixels: they are mixes of a
(2r+2)^2 window of whole positions, fetched at once and mixed along x, then along y.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.deq.structure import without_autocast

CHUNK = 2**22  # correlations that OnDemand holds at once: 16 MB in float32
FAR = 2.0**20  # pixels; coordinates are limited to this before they become whole numbers

Pyramid = tuple[Tensor, ...]


class AllPairs:
    """The whole volume, computed once: the fastest lookup, memory 4/3 B T^2 for T = h w pixels.

    levels  of the pyramid, >= 1; the feature map needs 2^(levels-1) pixels a side
    radius  r in pixels of each level
    """

    def __init__(self, levels: int = 4, radius: int = 4):
        self.levels, self.radius = levels, radius

    def prepare(self, first: Tensor, second: Tensor) -> Pyramid:
        """Feature maps (B, D, h, w) -> level l of the volume as (B, h w, h_l, w_l), float32, h_l = floor(h / 2^l)."""
        with without_autocast(first.device.type):
            volume = _volume(_full(first).flatten(2), _full(second))
            levels = [volume]
            for _ in range(self.levels - 1):
                levels.append(F.avg_pool2d(levels[-1], 2))
            return tuple(levels)

    def __call__(self, pyramid: Pyramid, coords: Tensor) -> Tensor:
        """Samples around coords (B, 2, h, w), x then y in pixels -> (B, levels (2r+1)^2, h, w), float32.

        Channel (l, i, j): level l at x / 2^l + i - r, y / 2^l + j - r: x is the slow one, as in the released code.
        Zero outside the image. Differentiable in pyramid and coords.
        """
        with without_autocast(coords.device.type):
            points = _full(coords).flatten(2)
            found = [window(level, points / 2**i, self.radius) for i, level in enumerate(pyramid)]
            return torch.cat(found, dim=1).unflatten(2, coords.shape[2:])


class OnDemand:
    """The same numbers with memory linear in the number of pixels: rows of the volume are computed at each lookup.

    A lookup then costs 4/3 B T^2 D products, in pieces of `chunk` correlations that the backward pass computes again.
    Pays off where the volume does not fit: 90 GB for one pair of 4K frames.
    """

    def __init__(self, levels: int = 4, radius: int = 4, chunk: int = CHUNK):
        self.levels, self.radius, self.chunk = levels, radius, chunk

    def prepare(self, first: Tensor, second: Tensor) -> Pyramid:
        """(first, then second and its means over 2^l x 2^l pixels), all (B, D, h_l, w_l) in float32.

        The mean over x of <f1[p], f2[x]> is the product with the mean of f2.
        """
        with without_autocast(first.device.type):
            levels = [_full(second)]
            for _ in range(self.levels - 1):
                levels.append(F.avg_pool2d(levels[-1], 2))
            return (_full(first), *levels)

    def __call__(self, pyramid: Pyramid, coords: Tensor) -> Tensor:
        """As `AllPairs`, from what `prepare` gave."""
        first, *levels = pyramid
        with without_autocast(coords.device.type):
            batch, _, h, w = levels[0].shape
            rows = max(1, self.chunk // max(1, batch * h * w))
            grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*pyramid, coords))
            pieces = zip(first.flatten(2).split(rows, dim=2), _full(coords).flatten(2).split(rows, dim=2), strict=True)
            found = [
                checkpoint(self._rows, f, p, *levels, use_reentrant=False) if grad else self._rows(f, p, *levels)
                for f, p in pieces
            ]
            return torch.cat(found, dim=2).unflatten(2, coords.shape[2:])

    def _rows(self, features: Tensor, points: Tensor, *levels: Tensor) -> Tensor:
        found = [window(_volume(features, level), points / 2**i, self.radius) for i, level in enumerate(levels)]
        return torch.cat(found, dim=1)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _volume(first: Tensor, second: Tensor) -> Tensor:
    """(B, D, P), (B, D, H, W) -> (B, P, H, W): products over sqrt(D)."""
    volume = (first.transpose(1, 2) / math.sqrt(first.shape[1])) @ second.flatten(2)
    return volume.unflatten(2, second.shape[2:])


def window(volume: Tensor, points: Tensor, radius: int) -> Tensor:
    """Bilinear samples of image (b, p) of volume (B, P, H, W) around points (B, 2, P) -> (B, (2r+1)^2, P).

    Sample (i, j) lies at x + i - r, y + j - r; zero outside. A point that is not finite gives NaN.
    """
    batch, count, height, width = volume.shape
    # Narrow numbers where they suffice: the index is what the backward pass keeps, (2r+2)^2 of them per point.
    whole = torch.int32 if volume.numel() < 2**31 else torch.int64
    x, left, right = _axis(points[:, 0], width, radius, whole)
    y, above, below = _axis(points[:, 1], height, radius, whole)
    image = torch.arange(batch * count, device=volume.device, dtype=whole).view(batch, 1, count) * (height * width)
    index = x.unsqueeze(2) + (y * width + image).unsqueeze(1)  # (B, 2r+2, 2r+2, P): x, y, point
    values = volume.flatten().index_select(0, index.flatten()).view(index.shape)
    mixed = torch.addcmul(values[:, :-1] * left.unsqueeze(2), values[:, 1:], right.unsqueeze(2))
    mixed = torch.addcmul(mixed[:, :, :-1] * above.unsqueeze(1), mixed[:, :, 1:], below.unsqueeze(1))
    return mixed.flatten(1, 2)


def _axis(points: Tensor, size: int, radius: int, whole: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis of `size` pixels: window positions (B, 2r+2, P) brought inside, and the weights (B, 2r+1, P) of
    the lower and the upper neighbour of each sample, zero for a neighbour outside."""
    floor = points.detach().floor()
    fraction = (points - floor).unsqueeze(1)
    reach = torch.arange(-radius, radius + 2, device=points.device, dtype=whole).unsqueeze(1)
    position = floor.nan_to_num(FAR).clamp(-FAR, FAR).to(whole).unsqueeze(1) + reach
    inside = ((position >= 0) & (position < size)).to(points.dtype)
    return position.clamp(0, size - 1), (1 - fraction) * inside[:, :-1], fraction * inside[:, 1:]
