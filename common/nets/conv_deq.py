"""A small convolutional equilibrium network: one residual cell at one resolution, for seconds-long experiments.

The cell is the residual layer of the tutorial "Deep Implicit Layers" (Kolter, Duvenaud, Johnson, NeurIPS 2020, chapter
4): z* = GN(relu(z* + GN(u + conv(GN(relu(conv z*)))))). Batch normalisation stands in stem and head only.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.deq.layer import DEQ
from common.errors import UserError


class ConvDEQ(nn.Module):
    """Image classifier: (B, img_channels, R, R) normalised images -> (B, num_classes) logits, R = img_resolution.

    deq        equilibrium layer: solver and gradient rule
    channels   C of the state, a multiple of `groups`
    expansion  width inside the cell, in C
    groups     groups of the cell's normalisations
    pool       side of the squares averaged before the classifier; R is a multiple of it
    norm       applied to the cell once: `common.deq.layers.apply_norm` with its options, or None

    State z and injection u: (B, C, R, R), z starts at zero. Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        deq: DEQ,
        img_channels: int = 1,
        img_resolution: int = 8,
        num_classes: int = 10,
        channels: int = 24,
        expansion: int = 1,
        groups: int = 8,
        pool: int = 4,
        norm: Callable[[nn.Module], object] | None = None,
    ):
        super().__init__()
        limits.positive(img_channels=img_channels, img_resolution=img_resolution, num_classes=num_classes,
                       channels=channels, expansion=expansion, groups=groups, pool=pool)  # fmt: skip
        limits.multiple_of("channels", channels, groups, "groups")
        limits.multiple_of("img_resolution", img_resolution, pool, "pool", hint="Set pool=1.")
        self.img_channels = img_channels
        self.img_resolution = img_resolution
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(img_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cell = ConvCell(channels=channels, width=expansion * channels, groups=groups)
        side = img_resolution // pool
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels), nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(channels * side * side, num_classes)
        )
        if norm is not None:
            norm(self.cell)
        self.deq = deq

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Logits (B, num_classes) of each state the layer gives: several in training, one in evaluation."""
        if x.ndim != 4 or x.shape[1:] != (self.img_channels, self.img_resolution, self.img_resolution):
            raise UserError(
                f"this network takes images of shape (batch, {self.img_channels}, {self.img_resolution}, "
                f"{self.img_resolution}), got {tuple(x.shape)}. Set img_resolution and img_channels to the data's."
            )
        u = self.stem(x)
        return [self.head(z) for z in self.deq(self.cell, u.new_zeros(u.shape), (u,))]

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[-1]


class ConvCell(nn.Module):
    """f(z, u), both (B, channels, H, W) -> the same; `width` channels inside."""

    def __init__(self, *, channels: int, width: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        h = self.conv2(self.norm1(F.relu(self.conv1(z), inplace=True)))
        return self.norm3(F.relu(z + self.norm2(u + h), inplace=True))
