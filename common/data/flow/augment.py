"""Augmentation of a pair of pictures with its flow, as in the released code of DEQ-Flow (arXiv 2204.08442), which names
RAFT (arXiv 2003.12039) as its origin: colours, then rectangles erased, then scale, stretch, mirror and crop.

A sample is a dict: first and second uint8 (3, H, W), flow float32 (2, H, W) in pixels, valid float32 (H, W) 0 or 1.
Every augmentation is a pure function of (random numbers, sample); `draw` is a `PositionDraws`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as colour

from common import limits
from common.data.draws import PositionDraws
from common.errors import UserError

Sample = dict[str, Tensor]
# largest change of brightness, contrast, saturation (factors 1 +- x) and hue (turns)
DENSE_COLOURS = (0.4, 0.4, 0.4, 0.5 / 3.14)
SPARSE_COLOURS = (0.3, 0.3, 0.3, 0.3 / 3.14)
ASYMMETRIC = 0.2  # probability that the two pictures change by numbers of their own
ERASE = 0.5  # probability that one or two rectangles of the second picture are erased
ERASED_SIDE = (50, 100)  # pixels, the upper end excluded
RESIZE = 0.8  # probability that a pair is resized at all
STRETCH, STRETCH_BY = 0.8, 0.2  # probability, and largest exponent of 2, of a factor of its own for each side
FLIP_X, FLIP_Y = 0.5, 0.1  # probabilities of mirroring; sparse ground truth is only mirrored left and right
UNKNOWN_ABOVE = 1000.0  # dense components of so many pixels are not valid
MARGIN_Y, MARGIN_X = 20, 50  # sparse crops are drawn beyond the border by so much and moved back: borders more often


@dataclass(frozen=True, kw_only=True)
class DenseAugment:
    """`augment(draw, sample)` for dense ground truth: FlyingChairs, FlyingThings3D, Sintel.

    crop        [height, width] of the result, pixels
    min_scale   a pair is resized by 2^s, s uniform in [min_scale, max_scale], with probability 0.8; but never below
    max_scale   (crop + 8) / size. With probability 0.8 each side has another factor 2^[-0.2, 0.2]. Bilinear
    flip        mirrors left and right with probability 1/2, up and down with 1/10
    photometric brightness, contrast, saturation +-40 %, hue +-0.159 turns, in random order; with probability 0.2 for
                each picture by itself, else for both alike
    eraser      with probability 1/2 one or two rectangles of 50..99 pixels of the second picture become its mean colour

    Pixels are valid where all that they are interpolated from are, and |u|, |v| < 1000. A pair no larger than the crop
    is always resized (the released code would stop). Raises UserError for numbers out of range.
    """

    crop: Sequence[int]
    min_scale: float = -0.2
    max_scale: float = 0.5
    flip: bool = True
    photometric: bool = True
    eraser: bool = True

    def __post_init__(self):
        _check(self)

    def __call__(self, draw: PositionDraws, sample: Sample) -> Sample:
        first, second = sample["first"], sample["second"]
        if self.photometric:
            first, second = jittered(first, second, draw, DENSE_COLOURS, ASYMMETRIC)
        if self.eraser:
            second = erased(second, draw)
        height, width = first.shape[1:]
        least = max((crop + 8) / side for crop, side in zip(self.crop, (height, width)))
        scale_x = scale_y = 2 ** draw.between(self.min_scale, self.max_scale)
        if draw.uniform() < STRETCH:
            scale_x *= 2 ** draw.between(-STRETCH_BY, STRETCH_BY)
            scale_y *= 2 ** draw.between(-STRETCH_BY, STRETCH_BY)
        scales = max(scale_y, least), max(scale_x, least)
        if draw.uniform() >= RESIZE and height > self.crop[0] and width > self.crop[1]:
            scales = (1.0, 1.0)
        flip_x = self.flip and draw.uniform() < FLIP_X
        flip_y = self.flip and draw.uniform() < FLIP_Y
        full = scaled_sides((height, width), scales)
        y = draw.below(max(full[0] - self.crop[0], 1))  # the last place is never drawn, as in the released code
        x = draw.below(max(full[1] - self.crop[1], 1))
        box = mirrored_box((y, x, *self.crop), full, flip_x, flip_y)
        flow = resample(sample["flow"], scales, box) * _factors(scales, flip_x, flip_y)
        valid = sample["valid"]
        if not bool(valid.all()):
            valid = (resample(valid[None], scales, box)[0] > 1 - 1e-4).float()
        else:
            valid = valid.new_ones(tuple(self.crop))
        result = {
            "first": resample(first, scales, box), "second": resample(second, scales, box),
            "flow": flow, "valid": valid * (flow.abs() < UNKNOWN_ABOVE).all(0),
        }  # fmt: skip
        return mirrored(result, flip_x, flip_y)


@dataclass(frozen=True, kw_only=True)
class SparseAugment:
    """`augment(draw, sample)` for sparse ground truth: KITTI, HD1K. Options as in `DenseAugment`, with differences:

    no stretching, never below (crop + 1) / size; mirroring left and right only; colours +-30 %, hue +-0.096 turns, for
    both pictures alike; crops at the border more often. Known pixels move one by one to the nearest pixel of the
    resized picture, except into its first row and column (as in the released code); where two meet the later in reading
    order stays.
    """

    crop: Sequence[int]
    min_scale: float = -0.2
    max_scale: float = 0.5
    flip: bool = False
    photometric: bool = True
    eraser: bool = True

    def __post_init__(self):
        _check(self)

    def __call__(self, draw: PositionDraws, sample: Sample) -> Sample:
        first, second = sample["first"], sample["second"]
        if self.photometric:
            first, second = jittered(first, second, draw, SPARSE_COLOURS, 0)
        if self.eraser:
            second = erased(second, draw)
        height, width = first.shape[1:]
        least = max((crop + 1) / side for crop, side in zip(self.crop, (height, width)))
        scale = max(2 ** draw.between(self.min_scale, self.max_scale), least)
        if draw.uniform() >= RESIZE and height > self.crop[0] and width > self.crop[1]:
            scale = 1.0
        scales = (scale, scale)
        flip_x = self.flip and draw.uniform() < FLIP_X
        full = scaled_sides((height, width), scales)
        most_y, most_x = full[0] - self.crop[0], full[1] - self.crop[1]
        y = min(draw.below(most_y + MARGIN_Y), most_y)
        x = min(max(draw.below(most_x + 2 * MARGIN_X) - MARGIN_X, 0), most_x)
        box = mirrored_box((y, x, *self.crop), full, flip_x, False)
        flow, valid = resample_sparse(sample["flow"], sample["valid"], scales, box, full)
        result = {
            "first": resample(first, scales, box), "second": resample(second, scales, box), "flow": flow, "valid": valid
        }  # fmt: skip
        result["flow"] = flow * _factors((1.0, 1.0), flip_x, False)
        return mirrored(result, flip_x, False)


@dataclass(frozen=True, kw_only=True)
class ColourAugment:
    """`augment(draw, sample)` that leaves the geometry alone: for generated pairs, which have their size already.

    photometric, eraser  as in `DenseAugment`
    erased_side          [shortest, longest) side of an erased rectangle, pixels
    """

    photometric: bool = True
    eraser: bool = True
    erased_side: Sequence[int] = ERASED_SIDE

    def __post_init__(self):
        if len(self.erased_side) != 2 or not 1 <= self.erased_side[0] < self.erased_side[1]:
            raise UserError(
                f"augment.erased_side must be [shortest, longest) in pixels, got {list(self.erased_side)}. "
                "Set [50,100]."
            )

    def __call__(self, draw: PositionDraws, sample: Sample) -> Sample:
        first, second = sample["first"], sample["second"]
        if self.photometric:
            first, second = jittered(first, second, draw, DENSE_COLOURS, ASYMMETRIC)
        if self.eraser:
            second = erased(second, draw, self.erased_side)
        return {**sample, "first": first, "second": second}


# The single steps ----------------------------------------------------------------------------------------------------


def jittered(
    first: Tensor, second: Tensor, draw: PositionDraws, most: Sequence[float], asymmetric: float
) -> tuple[Tensor, Tensor]:
    """Both pictures uint8 (3, H, W) with other colours; `most` as DENSE_COLOURS, `asymmetric` a probability."""
    if draw.uniform() < asymmetric:
        return _jitter(first, draw, most), _jitter(second, draw, most)
    both = _jitter(torch.cat([first, second], 1), draw, most)  # one picture: contrast pulls to the mean of both
    return both[:, : first.shape[1]], both[:, first.shape[1] :]


def _jitter(image: Tensor, draw: PositionDraws, most: Sequence[float]) -> Tensor:
    # Pillow's arithmetic, that of torchvision's ColorJitter on the pictures of the released code
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    steps = (colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation)
    changes = [(step, draw.between(1 - by, 1 + by)) for step, by in zip(steps, most)]
    changes.append((colour.adjust_hue, draw.between(-most[3], most[3])))
    for index in np.argsort(draw.uniforms(len(changes)), kind="stable"):
        change, amount = changes[index]
        picture = change(picture, amount)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def erased(image: Tensor, draw: PositionDraws, side: Sequence[int] = ERASED_SIDE) -> Tensor:
    """The picture uint8 (3, H, W) with, half of the time, one or two rectangles in its mean colour: occlusion."""
    if draw.uniform() >= ERASE:
        return image
    image = image.clone()
    mean = image.float().mean((1, 2)).to(torch.uint8)[:, None, None]
    for _ in range(1 + draw.below(2)):
        x, y = draw.below(image.shape[2]), draw.below(image.shape[1])
        width, height = (side[0] + draw.below(side[1] - side[0]) for _ in range(2))
        image[:, y : y + height, x : x + width] = mean
    return image


def scaled_sides(sides: Sequence[int], scales: Sequence[float]) -> tuple[int, int]:
    """(height, width) of a picture resized by `scales` (vertical, horizontal), to the nearest whole pixel."""
    return round(sides[0] * scales[0]), round(sides[1] * scales[1])


def mirrored_box(box: tuple, full: tuple[int, int], flip_x: bool, flip_y: bool) -> tuple[int, int, int, int]:
    """The part (top, left, height, width) that lies at `box` once the whole picture `full` is mirrored."""
    # column c of the mirrored picture is column W - 1 - c: [left, left + w) comes from [W - left - w, W - left)
    top, left, height, width = box
    if flip_y:
        top = full[0] - top - height
    if flip_x:
        left = full[1] - left - width
    return top, left, height, width


def mirrored(sample: Sample, flip_x: bool, flip_y: bool) -> Sample:
    """All maps mirrored; the signs of the flow are `_factors`'."""
    axes = [axis for axis, wanted in ((-1, flip_x), (-2, flip_y)) if wanted]
    return {name: value.flip(axes) if axes else value.contiguous() for name, value in sample.items()}


def resample(image: Tensor, scales: Sequence[float], box: tuple[int, int, int, int]) -> Tensor:
    """`box` (top, left, height, width) of (C, H, W) resized by `scales` (vertical, horizontal), of the same dtype.

    Bilinear without smoothing: output pixel i is taken at (i + 1/2) / scale - 1/2, borders repeated, as by OpenCV's
    resize with factors; flow times the factors is then exact. Costs what the box costs.
    """
    top, left, height, width = box
    if tuple(scales) == (1.0, 1.0):
        return image[:, top : top + height, left : left + width]
    y0, y1, wy = _neighbours(top, height, scales[0], image.shape[1])
    x0, x1, wx = _neighbours(left, width, scales[1], image.shape[2])
    first, last = int(x0[0]), int(x1[-1]) + 1
    part = image[:, :, first:last]  # columns outside are not looked at
    rows = torch.lerp(part.index_select(1, y0).float(), part.index_select(1, y1).float(), wy[:, None])
    made = torch.lerp(rows.index_select(2, x0 - first), rows.index_select(2, x1 - first), wx)
    return made.round_().to(torch.uint8) if image.dtype == torch.uint8 else made


def _neighbours(first: int, count: int, scale: float, source: int) -> tuple[Tensor, Tensor, Tensor]:
    # v(p) = (1 - w) v[floor p] + w v[floor p + 1],  p = (i + 1/2) / scale - 1/2 cut to the picture,  w = p - floor p
    place = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) / scale - 0.5
    place = place.clamp(0, source - 1)
    below = place.floor()
    return below.long(), (below + 1).clamp(max=source - 1).long(), (place - below).float()


def resample_sparse(
    flow: Tensor, valid: Tensor, scales: Sequence[float], box: tuple[int, int, int, int], full: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`box` of flow (2, H, W) and valid (H, W) resized by `scales`, see `SparseAugment`; `full`: the whole new size."""
    top, left, height, width = box
    if tuple(scales) == (1.0, 1.0):
        part = slice(top, top + height), slice(left, left + width)
        return flow[:, part[0], part[1]], valid[part]
    # the pixel at (y, x) with flow (u, v) moves to (round(s_y y), round(s_x x)) with flow (s_x u, s_y v)
    rows, columns = np.nonzero(valid.numpy() >= 0.5)
    y, x = (np.rint(places * scale).astype(np.int64) for places, scale in zip((rows, columns), scales))
    inside = (y > 0) & (y < full[0]) & (x > 0) & (x < full[1])
    inside &= (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    y, x = y[inside] - top, x[inside] - left
    made = np.zeros((2, height, width), np.float32)
    factors = np.array([scales[1], scales[0]], np.float32)[:, None]
    # numpy keeps the last of several values given to one place; torch promises nothing
    made[:, y, x] = flow.numpy()[:, rows[inside], columns[inside]] * factors
    known = np.zeros((height, width), np.float32)
    known[y, x] = 1
    return torch.from_numpy(made), torch.from_numpy(known)


def _factors(scales: Sequence[float], flip_x: bool, flip_y: bool) -> Tensor:
    """Factors of u and v (2, 1, 1): the horizontal scale and the vertical one, negative when mirrored."""
    return torch.tensor([-scales[1] if flip_x else scales[1], -scales[0] if flip_y else scales[0]]).view(2, 1, 1)


def _check(augment: DenseAugment | SparseAugment) -> None:
    if len(augment.crop) != 2 or min(augment.crop) < 8:
        raise UserError(f"data.crop must be [height, width], both >= 8, got {list(augment.crop)}. Set [368,496].")
    exponents = "It is at most augment.max_scale. Both are exponents of 2: set -0.2 and 0.5."
    limits.number("augment.min_scale", augment.min_scale, most=augment.max_scale, hint=exponents)
