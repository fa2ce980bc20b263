"""Visual attention network (VAN, arXiv 2202.09741): a hierarchical backbone of large-kernel convolutional attention.

State-dict keys are those of the released ImageNet weights, so that they load as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from common import limits
from common.errors import UserError

# name -> widths, depths of the four stages (table 2 of the paper; tiny and small are its B0 and B1)
SIZES = {
    "tiny": ((32, 64, 160, 256), (3, 3, 5, 2)),
    "small": ((64, 128, 320, 512), (2, 2, 4, 2)),
    "base": ((64, 128, 320, 512), (3, 3, 12, 3)),
    "large": ((64, 128, 320, 512), (3, 5, 27, 3)),
    "huge": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
EXPANSIONS = (8, 8, 4, 4)  # width inside the feed-forward parts, in channels of the stage
STRIDES = (4, 2, 2, 2)


class VAN(nn.Module):
    """Images (B, 3, H, W) -> maps of `stages`, finest first.

    size       tiny, small, base, large, huge
    stages     of 0 .. 3, in rising order
    drop_path  of the last block, rising from 0 over the blocks; the segmentation models have 0.1, large 0.25, huge 0.3

    `channels` and `strides` describe the maps. Stages after the last one named are left out.
    """

    def __init__(self, size: str = "base", *, stages: Sequence[int] = (1, 2, 3), drop_path: float = 0.1):
        super().__init__()
        limits.choice("backbone.size", size, tuple(SIZES))
        stages = tuple(stages)
        if not stages or list(stages) != sorted(set(stages) & {0, 1, 2, 3}):
            raise UserError(f"backbone.stages must be rising numbers out of 0, 1, 2, 3, got {list(stages)}.")
        widths, depths = SIZES[size]
        self.stages = stages
        self.channels = tuple(widths[stage] for stage in stages)
        self.strides = tuple(4 * 2**stage for stage in stages)
        total, number = sum(depths), 0
        for stage in range(stages[-1] + 1):
            before, width = 3 if stage == 0 else widths[stage - 1], widths[stage]
            rates = [drop_path * (number + block) / (total - 1) for block in range(depths[stage])]
            number += depths[stage]
            setattr(self, f"patch_embed{stage + 1}", PatchEmbed(before, width, 7 if stage == 0 else 3, STRIDES[stage]))
            blocks = [VanBlock(width, EXPANSIONS[stage], rate) for rate in rates]
            setattr(self, f"block{stage + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(width, eps=1e-6))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in range(self.stages[-1] + 1):
            x = getattr(self, f"patch_embed{stage + 1}")(x)
            for block in getattr(self, f"block{stage + 1}"):
                x = block(x)
            x = getattr(self, f"norm{stage + 1}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if stage in self.stages:
                maps.append(x)
        return maps


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and batch normalisation."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class VanBlock(nn.Module):
    """Attention and feed-forward part, each on normalised input, scaled per channel and added."""

    def __init__(self, channels: int, expansion: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = SpatialAttention(channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = ConvMlp(channels, expansion * channels)
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class SpatialAttention(nn.Module):
    """x + proj(gate(gelu(proj(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.spatial_gating_unit = LargeKernelAttention(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class LargeKernelAttention(nn.Module):
    """x times a 21x21 convolution of x, taken apart: 5x5 and dilated 7x7 by channel, 1x1. Equation 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv_spatial = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class ConvMlp(nn.Module):
    """1x1 convolution, 3x3 by channel, GELU, 1x1 convolution."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv["dwconv"](self.fc1(x))))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):  # normal, variance 2 / (outputs a weight reaches)
        reached = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / reached) ** 0.5)
        nn.init.zeros_(module.bias)
