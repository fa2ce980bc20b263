"""CIFAR residual networks (He et al., arXiv 1512.03385, section 4.2): 32x32 inputs, widths 16-32-64, 6n+2 layers.

Used frozen, as a feature extractor. State-dict keys are `conv1, bn1, layerX.Y.{conv1,bn1,conv2,bn2}, linear`.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut (option A): subsample, then zero channels on both sides."""

    def __init__(self, *, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        # F.pad counts from the last dimension: width, height, then channels.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images, n = `blocks`: 3 -> ResNet-20 (269,722 parameters), 9 -> ResNet-56 (853,018).

    blocks   residual blocks per stage, >= 1
    classes  width of the last linear layer
    """

    dim = 64  # width of the pooled features

    def __init__(self, *, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(self.dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) normalised image -> (B, 64) globally averaged activations of the last block."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, classes) logits."""
        return self.linear(self.features(x))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(in_channels=in_channels, out_channels=out_channels, stride=stride)
    rest = [Block(in_channels=out_channels, out_channels=out_channels, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
