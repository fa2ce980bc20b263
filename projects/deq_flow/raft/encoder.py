"""The convolutional encoder of RAFT (arXiv 2003.12039), used for features and for context."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, out_channels, H/8, W/8): a 7x7 convolution, six residual blocks, a 1x1 convolution.

    channels  of the three stages at 1/2, 1/4 and 1/8 of the resolution; the first convolution has the first width
    norm      "instance": without parameters; "batch"
    """

    def __init__(self, out_channels: int, *, norm: str, channels: Sequence[int] = (64, 96, 128)):
        super().__init__()
        self.conv = nn.Conv2d(3, channels[0], 7, stride=2, padding=3)
        self.norm = NORMS[norm](channels[0])
        widths, blocks = [channels[0], *channels], []
        for i, (before, width) in enumerate(zip(widths, channels)):
            blocks += [ResidualBlock(before, width, norm, stride=2 if i else 1), ResidualBlock(width, width, norm)]
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Conv2d(channels[-1], out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(F.relu(self.norm(self.conv(x)), inplace=True)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each normalised; a normalised 1x1 shortcut where the stride is 2."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm1 = NORMS[norm](out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = NORMS[norm](out_channels)
        self.short = None
        if stride != 1:
            self.short = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride), NORMS[norm](out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu(y + (x if self.short is None else self.short(x)), inplace=True)
