"""Augmentation of a picture together with its mask: scale, crop with padding, mirror, colours.

What is drawn for a sample depends on (seed, position in the run) alone, so that a run restarts exactly, two processes
augment as one does, and the number of workers does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

from common import limits
from common.data.draws import PositionDraws
from common.errors import UserError

IGNORE = 255  # label of pixels that count neither in the loss nor in a metric
IMAGENET_MEAN = (124, 116, 104)  # of pictures 0..255, rounded: (0.485, 0.456, 0.406) x 255
CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class PairedAugment:
    """`augment(image, mask, seed=, position=)`: uint8 (3, H, W) and uint8 (H, W) -> the same of the crop's size.

    crop             pixels of the result: width = height, or [height, width]
    scales           the pair is resized by one of these, drawn uniformly; the HamNet recipe by default
    continuous       True draws the scale uniformly between the first and the last of `scales`
    fit              [long, short]: scale 1 is the largest that keeps the long side <= long and the short side <= short
                     (mmseg's (2048, 512) for ADE20K); None: scale 1 is the picture as it is
    flip             probability of mirroring left and right
    max_class_share  another place is drawn, at most ten times, until no class fills this share or more of the crop's
                     pixels that are not void (mmseg's cat_max_ratio, 0.75); None: the first place
    photometric      brightness +-32, contrast, saturation x 0.5..1.5 and hue +-0.1 turns (36 degrees), each with
                     probability 1/2; contrast before or after the two others (SSD, arXiv 1512.02325; mmseg)
    fill             padding of the picture, 0..255 per channel; the mask is padded with 255

    Pictures are resized bilinearly without smoothing, masks by nearest neighbour, both with pixel centres at i + 1/2.
    (The authors resize pictures with corners aligned: the same up to half a pixel, but then picture and mask are not.)
    A pair smaller than the crop is padded at the right and at the bottom, then mirrored, as in the authors' code.

    Raises UserError for numbers out of range.
    """

    crop: int | Sequence[int] = 513
    scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    continuous: bool = False
    fit: Sequence[int] | None = None
    flip: float = 0.5
    max_class_share: float | None = None
    photometric: bool = False
    fill: Sequence[int] = IMAGENET_MEAN

    def __post_init__(self):
        if min(self.size) < 1 or len(self.size) != 2:
            raise UserError(f"data.augment.crop must be a width or [height, width] >= 1, got {self.crop}. Set 513.")
        if not len(self.scales):
            raise UserError("data.augment.scales is empty. Set data.augment.scales=[1.0] to keep the size.")
        for scale in self.scales:
            limits.number("each of data.augment.scales", scale, above=0, hint="Set [1.0] to keep the size.")
        if self.continuous and (len(self.scales) != 2 or self.scales[0] > self.scales[1]):
            raise UserError(
                f"data.augment.scales must be [lowest, highest] when continuous, got {list(self.scales)}. "
                "Set [0.5, 2.0], or data.augment.continuous=false."
            )
        check_fit(self.fit, "data.augment.fit")
        limits.number("data.augment.flip", self.flip, least=0, most=1, hint="It is a probability: set 0 for none.")
        share = self.max_class_share
        if share is not None:
            limits.number("data.augment.max_class_share", share, above=0, most=1, hint="Set null for any crop.")
        if len(self.fill) != 3:
            raise UserError(f"data.augment.fill must be three numbers, got {list(self.fill)}. Set [124,116,104].")
        for value in self.fill:
            limits.number("each of data.augment.fill", value, least=0, most=255, hint="Set [124,116,104].")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else tuple(self.crop)

    def __call__(self, image: Tensor, mask: Tensor, *, seed: int, position: int) -> tuple[Tensor, Tensor]:
        draw = PositionDraws(seed, position)
        full = self._scaled(mask.shape, draw)
        box, mask = self._place(mask, full, draw)
        image = resized(image, full, box)
        if self.photometric:
            image = distort(image, draw)
        down, right = self.size[0] - box[2], self.size[1] - box[3]
        if down or right:
            fill = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1)
            padded = fill.expand(3, *self.size).clone()
            padded[:, : box[2], : box[3]] = image
            image, mask = padded, F.pad(mask, (0, right, 0, down), value=IGNORE)
        if draw.uniform() < self.flip:
            image, mask = image.flip(2), mask.flip(1)
        return image, mask

    def _scaled(self, shape: Sequence[int], draw: PositionDraws) -> tuple[int, int]:
        """(height, width) of the whole picture after resizing."""
        if self.continuous:
            scale = self.scales[0] + (self.scales[1] - self.scales[0]) * draw.uniform()
        else:
            scale = self.scales[draw.below(len(self.scales))]
        return scaled_size(shape, scale, self.fit)

    def _place(self, mask: Tensor, full: tuple[int, int], draw: PositionDraws) -> tuple[tuple, Tensor]:
        """Box (top, left, height, width) within the resized pair, and the mask there."""
        height, width = (min(side, crop) for side, crop in zip(full, self.size))
        for _ in range(1 if self.max_class_share is None else CROP_ATTEMPTS):
            box = (draw.below(full[0] - height + 1), draw.below(full[1] - width + 1), height, width)
            part = resized_mask(mask, full, box)
            if self.max_class_share is None:
                break
            counts = torch.bincount(part.flatten(), minlength=256)[:IGNORE]
            if counts.max() < self.max_class_share * counts.sum():
                break
        return box, part


def check_fit(fit: Sequence[int] | None, field: str) -> None:
    """Raises UserError unless `fit` is None or [long, short] with long >= short >= 1."""
    if fit is not None and not (len(fit) == 2 and fit[0] >= fit[1] >= 1):
        raise UserError(f"{field} must be [long side, short side] in pixels, got {list(fit)}. Set [2048,512] or null.")


def scaled_size(shape: Sequence[int], scale: float, fit: Sequence[int] | None = None) -> tuple[int, int]:
    """(height, width) of a picture of `shape` (height, width) resized by `scale`; `fit` as in `PairedAugment`."""
    if fit is not None:
        scale *= min(fit[0] / max(shape), fit[1] / min(shape))
    return max(1, int(shape[0] * scale + 0.5)), max(1, int(shape[1] * scale + 0.5))


def resized(image: Tensor, full: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Tensor:
    """Picture uint8 (C, H, W) resized to `full` (height, width) bilinearly, of which `box` (top, left, height, width)
    is returned, uint8 (C, height, width). Costs what the box costs, whatever the size of the picture.

    Equals resizing everything with pixel centres at i + 1/2 and no smoothing, rounding, and cutting the box out.
    """
    top, left, height, width = box or (0, 0, *full)
    if full == tuple(image.shape[1:]):
        return image[:, top : top + height, left : left + width]
    y0, y1, wy = _neighbours(top, height, full[0], image.shape[1])
    x0, x1, wx = _neighbours(left, width, full[1], image.shape[2])
    first, last = int(x0[0]), int(x1[-1]) + 1
    image = image[:, :, first:last]  # columns outside are not looked at
    upper = image.index_select(1, y0).float()
    rows = upper.lerp_(image.index_select(1, y1).float(), wy[:, None])
    near = rows.index_select(2, x0 - first)
    return near.lerp_(rows.index_select(2, x1 - first), wx).round_().to(torch.uint8)


def resized_mask(mask: Tensor, full: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Tensor:
    """Mask (H, W) resized to `full` by nearest neighbour, of which `box` is returned; see `resized`."""
    top, left, height, width = box or (0, 0, *full)
    rows = _nearest(top, height, full[0], mask.shape[0])
    columns = _nearest(left, width, full[1], mask.shape[1])
    return mask[rows[:, None], columns]


def _neighbours(first: int, count: int, target: int, source: int) -> tuple[Tensor, Tensor, Tensor]:
    """For output pixels first..first+count-1 of `target`: the two input pixels and the weight of the second."""
    place = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    place = place.clamp(0, source - 1)
    below = place.floor()
    return below.long(), (below + 1).clamp(max=source - 1).long(), (place - below).float()


def _nearest(first: int, count: int, target: int, source: int) -> Tensor:
    # whole numbers: no rounding can move a label
    return ((2 * torch.arange(first, first + count) + 1) * source // (2 * target)).clamp(max=source - 1)


def distort(image: Tensor, draw: PositionDraws) -> Tensor:
    """`photometric` of `PairedAugment` on uint8 (3, H, W); float between the steps, clipped to 0..255 after each."""
    x = image.float()
    if draw.coin():
        x = (x + draw.between(-32, 32)).clamp_(0, 255)
    early = draw.coin()
    if early and draw.coin():
        x = (x * draw.between(0.5, 1.5)).clamp_(0, 255)
    if draw.coin():
        x = saturated(x, draw.between(0.5, 1.5))
    if draw.coin():
        x = adjust_hue(x / 255, draw.between(-0.1, 0.1)) * 255
    if not early and draw.coin():
        x = (x * draw.between(0.5, 1.5)).clamp_(0, 255)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def saturated(image: Tensor, factor: float) -> Tensor:
    """float (3, H, W) with the saturation of HSV times `factor`, at most 1; hue and value stay."""
    value, low = image.amax(0), image.amin(0)
    # c = V - (V - c) f scales S = (V - min) / V by f; f <= 1 / S keeps every channel >= 0
    most = torch.where(value > low, value / (value - low).clamp(min=1e-6), factor)
    return value - (value - image) * most.clamp(max=factor)
