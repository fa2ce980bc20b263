"""Multiscale deep equilibrium network for images (Bai et al., arXiv 2006.08656), in the form of arXiv 2111.05177.

stem -> u;  z* = f(z*, u) over several resolutions at once;  head(z*) -> logits. Batch normalisation stands in stem and
head only: inside f the state of one image must not depend on the others.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.deq.dropout import VariationalDropout2d
from common.deq.layer import DEQ
from common.errors import UserError


class MDEQ(nn.Module):
    """Image classifier: (B, img_channels, R, R) normalised images -> (B, num_classes) logits, R = img_resolution.

    deq             equilibrium layer: solver and gradient rule
    img_resolution  R, pixels; a multiple of 2^(scales - 1 + downsample)
    channels        C_i of the state at scale i = 0, 1, ...; each scale has half the resolution of the one before
    head_channels   widths of the head's bottlenecks, one per scale (their outputs are EXPANSION times as wide)
    final_channels  width of the pooled feature
    downsample      0, 1 or 2 convolutions of the stem have stride 2
    expansion       the residual blocks of f are `expansion` x C_i wide inside
    groups          groups of f's normalisations (half as many after the fusion)
    dropout         probability of dropping a channel of a residual branch in f, one mask per image and forward
    norm            applied to f once: `common.deq.layers.apply_norm` with its options, or None. `skip` takes the parts
                    of f called `block`, `fuse` and `post`: arXiv 2111.05177 skips fuse

    State: list of (B, C_i, R_i, R_i), R_i = R / 2^(downsample + i), starting at zero. The injection u
    (B, C_0, R_0, R_0) enters the highest resolution. Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        deq: DEQ,
        img_channels: int = 3,
        img_resolution: int = 32,
        num_classes: int = 10,
        channels: Sequence[int] = (24, 24),
        head_channels: Sequence[int] = (8, 16),
        final_channels: int = 200,
        downsample: int = 0,
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.0,
        norm: Callable[[nn.Module], object] | None = None,
    ):
        super().__init__()
        limits.positive(img_channels=img_channels, img_resolution=img_resolution, num_classes=num_classes,
                       final_channels=final_channels, expansion=expansion)  # fmt: skip
        _check_scales(channels, head_channels, img_resolution, downsample, groups)
        self.img_channels = img_channels
        self.img_resolution = img_resolution
        self.num_classes = num_classes
        self.channels = tuple(channels)
        self.stem = Stem(
            in_channels=img_channels,
            channels=channels[0],
            downsample=downsample,
            project=downsample > 0 or len(channels) > 2,
        )
        self.cell = MDEQCell(channels=channels, expansion=expansion, groups=groups, dropout=dropout)
        self.head = Head(
            channels=channels, head_channels=head_channels, final_channels=final_channels, num_classes=num_classes
        )
        if norm is not None:
            norm(self.cell)
        self.deq = deq
        initialise(self)

    def state(self, u: Tensor) -> list[Tensor]:
        """The initial state, zeros of the sizes the injection u (B, C_0, H, W) asks for."""
        batch, _, height, width = u.shape
        return [u.new_zeros(batch, c, height >> i, width >> i) for i, c in enumerate(self.channels)]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Logits (B, num_classes) of each state the layer gives: several in training, one in evaluation."""
        if x.ndim != 4 or x.shape[1:] != (self.img_channels, self.img_resolution, self.img_resolution):
            raise UserError(
                f"this network takes images of shape (batch, {self.img_channels}, {self.img_resolution}, "
                f"{self.img_resolution}), got {tuple(x.shape)}. Set img_resolution and img_channels to the data's."
            )
        u = self.stem(x)
        z0 = self.state(u)
        return [self.head(z) for z in self.deq(self.cell, z0, (u, *self.cell.masks(z0)))]

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[-1]


class Stem(nn.Module):
    """u: two 3x3 convolutions, as many of stride 2 as `downsample`, and a 1x1 convolution when `project`.

    The official code leaves the projection out for at most two scales at full resolution.
    """

    def __init__(self, *, in_channels: int, channels: int, downsample: int, project: bool):
        super().__init__()
        self.conv1 = _conv3(in_channels, channels, stride=2 if downsample >= 1 else 1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3(channels, channels, stride=2 if downsample >= 2 else 1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, channels, 1, bias=False) if project else None
        self.norm3 = nn.BatchNorm2d(channels) if project else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        return x if self.project is None else F.relu(self.norm3(self.project(x)), inplace=True)


class MDEQCell(nn.Module):
    """f(z, u): a residual block at every scale, then every scale fused into every other.

    z  list of (B, C_i, H / 2^i, W / 2^i), u (B, C_0, H, W), dropout masks from `masks` -> list like z.
    Samples do not see each other, so rows of all arguments may leave the batch between two calls.
    """

    def __init__(self, *, channels: Sequence[int], expansion: int, groups: int, dropout: float):
        super().__init__()
        scales = range(len(channels))
        self.block = nn.ModuleList(
            ResidualBlock(channels=c, expansion=expansion, groups=groups, dropout=dropout) for c in channels
        )
        # fuse[i][j] carries scale j into scale i; nothing on the diagonal
        self.fuse = nn.ModuleList(
            nn.ModuleDict(
                {str(j): (Down if j < i else Up)(channels, j, i, groups) for j in scales if j != i}
            )
            for i in scales
        )  # fmt: skip
        self.post = nn.ModuleList(Post(c, groups // 2) for c in channels)

    def masks(self, z: Sequence[Tensor]) -> list[Tensor]:
        """Fresh dropout masks for one solve, one (B, C_i, 1, 1) per scale; [] when nothing is dropped."""
        drops = [(block.drop, zi) for block, zi in zip(self.block, z, strict=True) if block.drop is not None]
        return [drop.mask_for(zi) for drop, zi in drops] if self.training else []

    def forward(self, z: Sequence[Tensor], u: Tensor, *masks: Tensor) -> list[Tensor]:
        x = [
            block(zi, u if i == 0 else None, masks[i] if masks else None)
            for i, (block, zi) in enumerate(zip(self.block, z, strict=True))
        ]
        return [post(self._fused(x, i)) for i, post in enumerate(self.post)]

    def _fused(self, x: list[Tensor], i: int) -> Tensor:
        """Sum over j of scale j brought to scale i. Nearest upsampling is linear, so lower scales are added up on the
        way: two small additions and a doubling instead of an upsampling to full size each."""
        fuse, below = self.fuse[i], None
        for j in range(len(x) - 1, i, -1):
            up = fuse[str(j)](x[j])
            below = F.interpolate(up if below is None else below + up, scale_factor=2.0, mode="nearest")
        total = x[i] if below is None else x[i] + below
        for j in range(i):
            total = total + fuse[str(j)](x[j])
        return total


class ResidualBlock(nn.Module):
    """(B, C, H, W) -> the same: conv 3x3 to expansion x C and back, injection, residual; group-normalised thrice."""

    def __init__(self, *, channels: int, expansion: int, groups: int, dropout: float):
        super().__init__()
        self.conv1 = _conv3(channels, expansion * channels)
        self.norm1 = nn.GroupNorm(groups, expansion * channels)
        self.conv2 = _conv3(expansion * channels, channels)
        self.drop = VariationalDropout2d(dropout, token_first=False) if dropout else None
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, injection: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.conv2(F.relu(self.norm1(self.conv1(z)), inplace=True))
        if self.drop is not None:
            h = self.drop(h, mask)
        h = self.norm2(h if injection is None else h + injection)
        return self.norm3(F.relu(h + z, inplace=True))


class Down(nn.Sequential):
    """Scale j into the lower scale i: i - j times conv 3x3 of stride 2 and GroupNorm, ReLU between; width C_j until
    the last."""

    def __init__(self, channels: Sequence[int], j: int, i: int, groups: int):
        steps = []
        for k in range(j, i):
            width = channels[i] if k == i - 1 else channels[j]
            steps.append(DownStep(channels[j], width, groups, last=k == i - 1))
        super().__init__(*steps)


class DownStep(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int, last: bool):
        super().__init__()
        self.conv = _conv3(in_channels, out_channels, stride=2)
        self.norm = nn.GroupNorm(groups, out_channels)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.last else F.relu(x, inplace=True)


class Up(nn.Module):
    """Scale j into the higher scale i, before the upsampling: conv 1x1 and GroupNorm at the low resolution."""

    def __init__(self, channels: Sequence[int], j: int, i: int, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(channels[j], channels[i], 1, bias=False)
        self.norm = nn.GroupNorm(groups, channels[i])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Post(nn.Module):
    """After the fusion: ReLU, conv 1x1, GroupNorm; (B, C, H, W) -> the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(x)))


class Head(nn.Module):
    """List of states (B, C_i, H_i, W_i) -> logits (B, num_classes): a bottleneck per scale, added up downwards."""

    def __init__(self, *, channels: Sequence[int], head_channels: Sequence[int], final_channels: int, num_classes: int):
        super().__init__()
        wide = [Bottleneck.EXPANSION * width for width in head_channels]
        self.grow = nn.ModuleList(Bottleneck(c, width) for c, width in zip(channels, head_channels, strict=True))
        self.down = nn.ModuleList(
            nn.Sequential(_conv3(a, b, stride=2, bias=True), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in pairwise(wide)
        )
        self.final = nn.Sequential(
            nn.Conv2d(wide[-1], final_channels, 1), nn.BatchNorm2d(final_channels), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(final_channels, num_classes)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        y = self.grow[0](z[0])
        for down, grow, zi in zip(self.down, self.grow[1:], z[1:], strict=True):
            y = grow(zi) + down(y)
        return self.classifier(self.final(y).mean((2, 3)))


class Bottleneck(nn.Module):
    """(B, in_channels, H, W) -> (B, EXPANSION x width, H, W): 1x1, 3x3, 1x1 beside a 1x1 shortcut.

    The normalisations of the branch have no scale and shift, as in the official code. The shortcut has a convolution
    only where the width changes.
    """

    EXPANSION = 4

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        out = self.EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, affine=False)
        self.conv2 = _conv3(width, width)
        self.norm2 = nn.BatchNorm2d(width, affine=False)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out, affine=False)
        self.short = None
        if in_channels != out:
            self.short = nn.Sequential(nn.Conv2d(in_channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        h = F.relu(self.norm2(self.conv2(h)), inplace=True)
        h = self.norm3(self.conv3(h))
        return F.relu(h + (x if self.short is None else self.short(x)), inplace=True)


def initialise(net: MDEQ) -> None:
    """Convolutions N(0, 0.01^2), biases too; weight-normalised ones keep torch's initial distribution.

    The latter is what the official training did, though its code reads otherwise: it draws N(0, 0.01^2) for every
    convolution after weight normalisation has replaced their weights by g v / |v|, and the next reset discards them.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            if not torch.nn.utils.parametrize.is_parametrized(module):
                nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.01)


def _conv3(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def _check_scales(
    channels: Sequence[int], head_channels: Sequence[int], resolution: int, downsample: int, groups: int
) -> None:
    if len(channels) < 2:
        raise UserError(
            f"channels must name at least two scales, got {list(channels)}. Set channels to e.g. [24, 24], or use "
            "common.nets.conv_deq.ConvDEQ for one."
        )
    if len(head_channels) != len(channels):
        raise UserError(
            f"head_channels must hold one width per scale, got {len(head_channels)} for {len(channels)} scales of "
            "channels. Give both the same length."
        )
    limits.positive(**{f"channels[{i}]": c for i, c in enumerate(channels)})
    limits.positive(**{f"head_channels[{i}]": c for i, c in enumerate(head_channels)})
    limits.choice("downsample", downsample, (0, 1, 2))
    limits.multiple_of("groups", groups, 2, hint="Set groups to e.g. 8.")
    for index, width in enumerate(channels):
        limits.multiple_of(f"channels[{index}]", width, groups, "groups")
    limits.multiple_of(
        "img_resolution", resolution, 2 ** (len(channels) - 1 + downsample),
        f"{len(channels)} scales, downsample={downsample}", hint="Resize the images or drop a scale.",
    )  # fmt: skip


# Module names of the released code (Gsunshine/phantom_grad; locuslab/torchdeq, deq-zoo/mdeq) -> ours.
_OFFICIAL = (
    (r"^downsample\.0\.", "stem.conv1."),
    (r"^downsample\.1\.", "stem.norm1."),
    (r"^downsample\.3\.", "stem.conv2."),
    (r"^downsample\.4\.", "stem.norm2."),
    (r"^stage0\.0\.", "stem.project."),
    (r"^stage0\.1\.", "stem.norm3."),
    (r"^full_?stage\.branches\.(\d+)\.blocks\.0\.", r"cell.block.\1."),
    (r"^full_?stage\.fuse_layers\.(\d+)\.(\d+)\.net\.", r"cell.fuse.\1.\2."),
    (r"^full_?stage\.post_fuse_layers\.(\d+)\.", r"cell.post.\1."),
    (r"^incre_modules\.(\d+)\.0\.downsample\.", r"head.grow.\1.short."),
    (r"^incre_modules\.(\d+)\.0\.", r"head.grow.\1."),
    (r"^downsamp_modules\.", "head.down."),
    (r"^final_layer\.", "head.final."),
    (r"^classifier\.", "head.classifier."),
    (r"\.(?:gnorm|gn(?=\d)|bn(?=\d))", ".norm"),
)


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from one of the released MDEQ code: g and v of normalised layers as the released code has them.

    state_dict  of `MDEQClsNet` (phantom_grad) or `MDEQ` (TorchDEQ zoo), also with the prefix a parallel wrapper adds
    Load it into a network of the same sizes whose `norm` covers the same layers. Raises UserError for a name that is
    none of that code's.
    """
    found = {}
    for name, value in state_dict.items():
        name = name.removeprefix("module.")
        if name.startswith("deq."):
            continue  # the released wrapper holds f a second time
        ours = name
        for pattern, replacement in _OFFICIAL:
            ours = re.sub(pattern, replacement, ours)
        if not ours.startswith(("stem.", "cell.", "head.")):
            raise UserError(f"{name} is no tensor of the released MDEQ code. Give the state dict of its classifier.")
        ours = ours.replace("weight_g", "parametrizations.weight.original0")
        found[ours.replace("weight_v", "parametrizations.weight.original1")] = value
    return found
