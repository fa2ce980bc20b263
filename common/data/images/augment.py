"""Augmentation, batched on the images' device and drawn for the joint batch of all processes.

For generators, augmentation that does not leak into the samples: the network is conditioned on what was done to each
image. The pipe of EDM (arXiv 2206.00364, app. F.2), after "Training GANs with Limited Data" (arXiv 2006.06676, app. B):
each transformation acts on an image with its own probability and reports its parameters in the label; images that no
warp was drawn for are not resampled. For classifiers, `CropFlip` and `RandomResizedCrop`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from common import limits
from common.errors import UserError

# Low-pass analysis filter of the Sym6 wavelet (Daubechies): orthonormal to its even shifts, so doubling the resolution
# with it and halving again gives the image back.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
MARGIN = len(SYM6) // 4  # pixels of the original grid that the filter reaches beyond the picture


@dataclass(frozen=True, kw_only=True)
class EdmAugment:
    """`augment(images, generator)` -> `(images, labels)`, images float (B, C, H, W), labels float32 (B, label_dim).

    A transformation is applied to an image with probability min(1, p * multiplier); multiplier 0 leaves it out of the
    label altogether. The defaults are EDM's choice for CIFAR-10 (label_dim 9); use p=0.15 for FFHQ and AFHQ.

    p                   overall probability, >= 0
    xflip, yflip        multipliers; label 1 column each, 1 = mirrored (the drawn coin decides after the probability)
    rotate_int          multiplier of quarter turns; 2 columns
    translate_int       multiplier of whole-pixel shifts up to translate_int_max of the width; 2 columns in [-1, 1]
    scale               multiplier of zoom by 2^(scale_std n), n normal; column n
    rotate_frac         multiplier of rotation by a uniform angle up to rotate_frac_max half turns; cos - 1, sin
    aniso               multiplier of stretching by 2^(aniso_std n) along an axis turned with probability
                        aniso_rotate_prob; n cos, n sin
    translate_frac      multiplier of shifts by translate_frac_std n of the width; 2 columns n
    brightness .. saturation   multipliers of the colour transformations (images of 1 or 3 channels); brightness n,
                        contrast n, luma flip 0/1, hue cos - 1 and sin, saturation n

    Column order is the order of this list. Raises UserError for a negative probability or multiplier.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1
    rotate_int: float = 0
    translate_int: float = 0
    translate_int_max: float = 0.125
    scale: float = 1
    rotate_frac: float = 1
    aniso: float = 1
    translate_frac: float = 1
    scale_std: float = 0.2
    rotate_frac_max: float = 1
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0
    hue: float = 0
    saturation: float = 0
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1
    saturation_std: float = 1

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            limits.number(f"augment.{field.name}", value, least=0, hint="Set it to 0 to switch it off.")

    @property
    def label_dim(self) -> int:
        """Columns of the label, 9 with the defaults."""
        one = (self.xflip, self.yflip, self.scale, self.brightness, self.contrast, self.lumaflip, self.saturation)
        two = (self.rotate_int, self.translate_int, self.rotate_frac, self.aniso, self.translate_frac, self.hue)
        return sum(m > 0 for m in one) + 2 * sum(m > 0 for m in two)

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """See the class. With world_size > 1 every process draws for the joint batch from an equal generator and keeps
        the rows of its rank, so that the joint result does not depend on the number of processes."""
        draw = _Draw(
            joint=len(images) * world_size,
            rows=slice(len(images) * rank, len(images) * (rank + 1)),
            p=self.p,
            device=images.device,
            generator=generator,
        )
        images, blit_labels = self._blit(images, draw)
        images, warp_labels = self._warp(images, draw)
        images, color_labels = self._recolor(images, draw)
        columns = [*blit_labels, *warp_labels, *color_labels]
        if not columns:
            return images, images.new_zeros(len(images), 0, dtype=torch.float32)
        return images, torch.stack([column.to(torch.float32) for column in columns], dim=1)

    def _blit(self, images: Tensor, draw: "_Draw") -> tuple[Tensor, list[Tensor]]:
        """Flips, quarter turns and whole-pixel shifts: pixels move, none is interpolated."""
        labels = []
        height, width = images.shape[2:]
        for multiplier, axis in ((self.xflip, 3), (self.yflip, 2)):
            if multiplier > 0:
                coin = draw.gate(multiplier, draw.integer(2))
                images = _choose(coin == 1, images.flip(axis), images)
                labels.append(coin)
        if self.rotate_int > 0:
            if height != width:
                raise ValueError(f"quarter turns need square images, got {height}x{width}")
            turns = draw.gate(self.rotate_int, draw.integer(4))
            # A quarter turn is a mirroring followed by a transposition, a half turn two mirrorings.
            mirrored_x, mirrored_y = (turns == 1) | (turns == 2), (turns == 2) | (turns == 3)
            images = _choose(mirrored_x, images.flip(3), images)
            images = _choose(mirrored_y, images.flip(2), images)
            images = _choose((turns == 1) | (turns == 3), images.transpose(2, 3), images)
            labels += [mirrored_x, mirrored_y]
        if self.translate_int > 0:
            shift = draw.gate(self.translate_int, draw.uniform(2) * 2 - 1)
            reach = self.translate_int_max
            dx, dy = (shift[0] * (width * reach)).round().long(), (shift[1] * (height * reach)).round().long()
            columns = _reflect(torch.arange(width, device=images.device) - dx[:, None], width)
            rows = _reflect(torch.arange(height, device=images.device) + dy[:, None], height)
            batch = torch.arange(len(images), device=images.device)
            images = images.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
            images = images.permute(0, 3, 1, 2)
            labels += [dx / (width * reach), dy / (height * reach)]
        return images, labels

    def _warp(self, images: Tensor, draw: "_Draw") -> tuple[Tensor, list[Tensor]]:
        """Zoom, rotation, stretching and shifts as one affine map, applied to the images that drew any of them."""
        # output pixel x shows the input at M^-1 x; M = ... M2 M1 has the inverse M1^-1 M2^-1 ...: factors on the right
        labels, drawn = [], []
        height, width = images.shape[2:]
        inverse = torch.eye(3, device=images.device).expand(len(images), 3, 3)  # where an output pixel comes from
        if self.scale > 0:
            n = draw.gate(self.scale, draw.normal())
            zoom = torch.exp2(-self.scale_std * n)
            inverse = inverse @ _matrix2(zoom, 0, 0, zoom)
            labels, drawn = [*labels, n], [*drawn, n]
        if self.rotate_frac > 0:
            angle = draw.gate(self.rotate_frac, (draw.uniform() * 2 - 1) * (math.pi * self.rotate_frac_max))
            inverse = inverse @ _rotation(angle)
            labels, drawn = [*labels, angle.cos() - 1, angle.sin()], [*drawn, angle]
        if self.aniso > 0:
            n, axis = draw.normal(), (draw.uniform() * 2 - 1) * math.pi
            n = draw.gate(self.aniso, n)
            axis = torch.where(draw.uniform() < self.aniso_rotate_prob, axis, 0)
            # inverse of stretching by s along the axis at angle -a and by 1/s across it: R(-a) diag(1/s, s) R(a)
            stretch = torch.exp2(self.aniso_std * n)
            inverse = inverse @ _rotation(-axis) @ _matrix2(1 / stretch, 0, 0, stretch) @ _rotation(axis)
            labels, drawn = [*labels, n * axis.cos(), n * axis.sin()], [*drawn, n]
        if self.translate_frac > 0:
            n = draw.gate(self.translate_frac, draw.normal(2))
            reach = self.translate_frac_std
            inverse = inverse @ _shift(-n[0] * (width * reach), -n[1] * (height * reach))
            labels, drawn = [*labels, n[0], n[1]], [*drawn, n[0], n[1]]
        if drawn:
            rows = torch.stack(drawn).ne(0).any(dim=0).nonzero()[:, 0]
            if len(rows):
                images = images.index_copy(0, rows, resample(images[rows], inverse[rows]))
        return images, labels

    def _recolor(self, images: Tensor, draw: "_Draw") -> tuple[Tensor, list[Tensor]]:
        """Brightness, contrast, luma flip, hue and saturation as one affine map of the colour."""
        # colour c -> linear c + offset; a further step c -> A c multiplies both from the left. With P = v v^T, the
        # projection on the luma axis v: luma flip A = I - 2 P, hue A = rotation about v, saturation A = P + s (I - P)
        labels = []
        device, (count, channels) = images.device, images.shape[:2]
        identity = torch.eye(3, device=device)
        grey = torch.full((3, 3), 1 / 3, device=device)  # projection on the luma axis (1, 1, 1) / sqrt(3)
        linear, offset = identity.expand(count, 3, 3), torch.zeros(count, 3, 1, device=device)
        if self.brightness > 0:
            n = draw.gate(self.brightness, draw.normal())
            offset = offset + _column(n * self.brightness_std)
            labels.append(n)
        if self.contrast > 0:
            n = draw.gate(self.contrast, draw.normal())
            gain = _column(torch.exp2(n * self.contrast_std))
            linear, offset = gain * linear, gain * offset
            labels.append(n)
        if self.lumaflip > 0:
            coin = draw.gate(self.lumaflip, draw.integer(2))
            flip = identity - 2 * grey * _column(coin)
            linear, offset = flip @ linear, flip @ offset
            labels.append(coin)
        if self.hue > 0:
            angle = draw.gate(self.hue, (draw.uniform() * 2 - 1) * (math.pi * self.hue_max))
            turn = _luma_rotation(angle)
            linear, offset = turn @ linear, turn @ offset
            labels += [angle.cos() - 1, angle.sin()]
        if self.saturation > 0:
            n = draw.gate(self.saturation, draw.normal())
            strength = grey + (identity - grey) * _column(torch.exp2(n * self.saturation_std))
            linear, offset = strength @ linear, strength @ offset
            labels.append(n)
        if not labels:
            return images, labels
        linear, offset = linear.to(images.dtype), offset.to(images.dtype)
        if channels == 3:
            return torch.einsum("bij,bjhw->bihw", linear, images) + offset[..., None], labels
        if channels != 1:
            raise ValueError(f"colour transformations need 1 or 3 channels, got {channels}")
        # a grey picture g (1, 1, 1) becomes the mean of its three channels: g (1/3) sum_ij L_ij + mean of the offset
        gain, lift = linear.mean(dim=1).sum(dim=1), offset.mean(dim=(1, 2))
        return images * gain[:, None, None, None] + lift[:, None, None, None], labels


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """`augment(images, generator)` -> `(images, labels)`: the CIFAR recipe of ResNets (arXiv 1512.03385, 4.2).

    Every image, float (B, C, H, W) in [-1, 1], is surrounded by `padding` pixels of value `fill` (-1 is black), cut
    back to its size at a uniform place and mirrored with probability `flip`. The network is conditioned on
    nothing: labels are (B, 0). Several processes draw as in `EdmAugment`.
    Raises UserError for a negative padding or a probability outside [0, 1].
    """

    padding: int = 4
    flip: float = 0.5
    fill: float = -1.0

    def __post_init__(self):
        limits.whole("augment.padding", self.padding, hint="Set it to 0 for no shift.")
        _check_probability(self.flip)

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        draw = _joint_draw(images, generator, rank, world_size)
        (count, _, height, width), device = images.shape, images.device
        across, down = torch.arange(width, device=device), torch.arange(height, device=device)
        left, top = draw.integer(2 * self.padding + 1), draw.integer(2 * self.padding + 1)
        mirrored = draw.uniform() < self.flip
        # column j shows column left + j of the padded picture, mirrored left + W - 1 - j
        columns = left[:, None] + torch.where(mirrored[:, None], width - 1 - across, across)
        rows = top[:, None] + down
        batch = torch.arange(count, device=device)
        padded = F.pad(images, [self.padding] * 4, value=self.fill).permute(0, 2, 3, 1)
        images = padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return images, images.new_zeros(count, 0)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """`augment(images, generator)` -> `(images, labels)`: the ImageNet recipe (arXiv 1409.4842, section 6).

    A box of a uniform fraction `area` of the picture and a log-uniform width : height `ratio`, at a uniform place, is
    resized bilinearly to size x size and mirrored with probability `flip`; images float (B, C, H, W) in [-1, 1],
    labels (B, 0). A box that fits is looked for among `attempts` draws, else the whole picture is taken. Works on
    batches of one size, so it sees what the data source left of each picture (`fit`), not the file, and does not
    smooth when it shrinks: keep the pictures below twice `size`.
    Raises UserError for ranges that are empty or outside (0, 1] (area) or above 0 (ratio).
    """

    size: int
    area: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    attempts: int = 10

    def __post_init__(self):
        limits.positive(**{"augment.size": self.size, "augment.attempts": self.attempts})
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(f"augment.area must be two rising numbers in (0, 1], got {list(self.area)}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"augment.ratio must be two rising numbers above 0, got {list(self.ratio)}.")
        _check_probability(self.flip)

    def __call__(
        self, images: Tensor, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        draw = _joint_draw(images, generator, rank, world_size)
        height, width = images.shape[2:]
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        area = self.area[0] + (self.area[1] - self.area[0]) * draw.uniform(self.attempts)
        shape = torch.exp(low + (high - low) * draw.uniform(self.attempts))
        # sides as fractions of the picture's: w h = area W H and w / h = shape give w / W = sqrt(area shape H / W)
        across = (area * shape * height / width).sqrt()
        down = (area / shape * width / height).sqrt()
        fits = (across <= 1) & (down <= 1)
        first = fits.to(torch.int8).argmax(dim=0, keepdim=True)  # the first that fits
        across, down = (torch.where(fits.any(0), side.gather(0, first)[0], 1.0) for side in (across, down))
        # the box's centre in grid coordinates, where the picture reaches from -1 to 1
        x, y = (draw.uniform() * 2 - 1) * (1 - across), (draw.uniform() * 2 - 1) * (1 - down)
        across = torch.where(draw.uniform() < self.flip, -across, across)
        theta = images.new_zeros(len(images), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2] = across, down, x, y
        grid = F.affine_grid(theta, [*images.shape[:2], self.size, self.size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return images, images.new_zeros(len(images), 0)


def _check_probability(flip: float) -> None:
    limits.number("augment.flip", flip, least=0, most=1, hint="It is a probability: set 0 for no mirroring.")


def _joint_draw(images: Tensor, generator: torch.Generator | None, rank: int, world_size: int) -> "_Draw":
    """Draws for the joint batch, of which this process keeps the rows of its rank."""
    count = len(images)
    rows = slice(count * rank, count * (rank + 1))
    return _Draw(joint=count * world_size, rows=rows, p=1, device=images.device, generator=generator)


def resample(images: Tensor, inverse: Tensor) -> Tensor:
    """Images (B, C, H, W) warped without aliasing: output pixel x shows the input at `inverse` x.

    inverse (B, 3, 3) acts on (x, y, 1), pixels from the picture's centre. The surroundings are the reflected picture up
    to one picture width, zero beyond. Resolution is doubled with the Sym6 low-pass, the affine map looks up bilinearly,
    and the same filter halves it again (arXiv 2006.06676, appendix B.3).
    """
    batch, channels, height, width = images.shape
    left, top, right, bottom = _borders(inverse, height, width)
    images = F.pad(images, (left, right, top, bottom), mode="reflect")
    images = images.reshape(batch * channels, 1, *images.shape[2:])
    images = _double(_double(images, 3), 2)
    # Same map in the new coordinates: origin at the padded picture's centre, two samples to a pixel, and the even
    # filter puts samples half a step off the pixels they belong to.
    # x' = 2 x + h with h = -1/2: the source L x + b becomes 2 (L (x' - h) / 2 + b) + h = L x' + 2 b + h - L h.
    half = torch.tensor([-0.5, -0.5], device=inverse.device)
    shifted = _shift(torch.tensor((left - right) / 2), torch.tensor((top - bottom) / 2)).to(inverse) @ inverse
    linear, offset = shifted[:, :2, :2], 2 * shifted[:, :2, 2] + half - shifted[:, :2, :2] @ half
    out_height, out_width = 2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN)
    source = torch.tensor([images.shape[3], images.shape[2]], device=inverse.device)
    target = torch.tensor([out_width, out_height], device=inverse.device)
    # affine_grid's coordinates reach from -1 to 1: x' = (size / 2) n, of the source and of the target
    theta = torch.cat([linear * (target / source[:, None]), (offset * 2 / source)[:, :, None]], dim=2)
    shape = [batch, channels, out_height, out_width]
    grid = F.affine_grid(theta.to(images.dtype), shape, align_corners=False)
    images = images.reshape(batch, channels, *images.shape[2:])
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    images = images.reshape(batch * channels, 1, out_height, out_width)
    return _halve(_halve(images, 3), 2).reshape(batch, channels, height, width)


def _borders(inverse: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Reflected pixels needed left, top, right, bottom so that no image of the batch looks beyond them (at most one
    picture size, which is as far as a reflection can reach)."""
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=inverse.device)
    signs = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, 1.0]], device=inverse.device)
    corners = inverse[:, :2, :2] @ (signs * half[:, None]) + inverse[:, :2, 2:]
    reach = torch.cat([(-corners).amax(dim=(0, 2)), corners.amax(dim=(0, 2))])
    need = (reach + 2 * MARGIN - half.repeat(2)).ceil().long().tolist()
    limit = (width - 1, height - 1, width - 1, height - 1)
    left, top, right, bottom = (max(0, min(n, most)) for n, most in zip(need, limit))
    return left, top, right, bottom


def _double(images: Tensor, axis: int) -> Tensor:
    """(N, 1, H, W) with twice the samples along `axis` (2 or 3): zeros between the pixels, then the filter."""
    shape = list(images.shape)
    shape[axis] = 2 * shape[axis] - 1
    spread = images.new_zeros(shape)
    (spread[:, :, :, ::2] if axis == 3 else spread[:, :, ::2]).copy_(images)
    # torch's conv2d correlates, hence the mirrored filter for a convolution
    return F.conv2d(spread, _filter(images, axis, mirrored=True), padding=_along(axis, len(SYM6) // 2))


def _halve(images: Tensor, axis: int) -> Tensor:
    """(N, 1, H, W) filtered and halved along `axis`, less MARGIN pixels at either end."""
    stride = (1, 2) if axis == 3 else (2, 1)
    padding = _along(axis, (len(SYM6) - 1) // 2)
    halved = F.conv2d(images, _filter(images, axis, mirrored=False), stride=stride, padding=padding)
    return halved.narrow(axis, MARGIN, halved.shape[axis] - 2 * MARGIN)


def _filter(like: Tensor, axis: int, mirrored: bool) -> Tensor:
    taps = torch.tensor(SYM6[::-1] if mirrored else SYM6, dtype=like.dtype, device=like.device)
    return taps.view(1, 1, 1, -1) if axis == 3 else taps.view(1, 1, -1, 1)


def _along(axis: int, amount: int) -> tuple[int, int]:
    return (0, amount) if axis == 3 else (amount, 0)


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """Random parameters for the joint batch, of which this process keeps `rows`."""

    joint: int
    rows: slice
    p: float
    device: torch.device
    generator: torch.Generator | None

    def uniform(self, *lead: int) -> Tensor:
        return torch.rand(*lead, self.joint, device=self.device, generator=self.generator)[..., self.rows]

    def normal(self, *lead: int) -> Tensor:
        return torch.randn(*lead, self.joint, device=self.device, generator=self.generator)[..., self.rows]

    def integer(self, high: int) -> Tensor:
        return torch.randint(high, [self.joint], device=self.device, generator=self.generator)[self.rows]

    def gate(self, multiplier: float, value: Tensor) -> Tensor:
        """`value` (..., B) with probability p * multiplier for each image, else 0."""
        return torch.where(self.uniform() < multiplier * self.p, value, torch.zeros_like(value))


def _choose(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows[:, None, None, None], yes, no)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Any integer index folded into 0..size-1 by reflection at the first and last pixel."""
    period = 2 * (size - 1)
    folded = index.remainder(period) if period else torch.zeros_like(index)
    return torch.minimum(folded, period - folded)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _matrix2(a: Tensor, b: Tensor | float, c: Tensor | float, d: Tensor) -> Tensor:
    """(B, 3, 3) of [[a, b], [c, d]] on (x, y), no shift."""
    matrix = torch.zeros(len(a), 3, 3, device=a.device)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 2, 2] = a, b, c, d, 1
    return matrix


def _rotation(angle: Tensor) -> Tensor:
    return _matrix2(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _shift(dx: Tensor, dy: Tensor) -> Tensor:
    """(..., 3, 3) that adds (dx, dy) to (x, y)."""
    matrix = torch.eye(3, device=dx.device).repeat(*dx.shape, 1, 1)
    matrix[..., 0, 2], matrix[..., 1, 2] = dx, dy
    return matrix


def _luma_rotation(angle: Tensor) -> Tensor:
    """(B, 3, 3): rotation of colour space about the axis (1, 1, 1) / sqrt(3) (Rodrigues' formula)."""
    k = 1 / math.sqrt(3)
    cross = torch.tensor([[0, -k, k], [k, 0, -k], [-k, k, 0]], device=angle.device)
    grey = torch.full((3, 3), 1 / 3, device=angle.device)
    cos, sin = _column(angle.cos()), _column(angle.sin())
    return cos * torch.eye(3, device=angle.device) + sin * cross + (1 - cos) * grey
