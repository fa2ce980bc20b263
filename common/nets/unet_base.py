"""What the U-Nets of the EDM family share: checks, dropout masks, and the loops that build encoder and decoder.

Module names (`16x16_block0`, ...) and the order of construction, which is that of the random draws, are those of the
official release.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from common import limits
from common.nets.dropout import draw_masks, feed_masks, unet_layers
from common.nets.inputs import check_label_dims
from common.nets.layers import Conv2d, UNetBlock


class UNetBase(nn.Module):
    """What both U-Nets share: the sizes others read, and dropout masks. Subclasses fill `enc` and `dec`."""

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int,
        augment_dim: int,
        label_dropout: float,
        dropout: float,
    ):
        super().__init__()
        limits.positive(img_resolution=img_resolution, in_channels=in_channels, out_channels=out_channels)
        limits.probability("dropout", dropout)
        check_label_dims(label_dim=label_dim, augment_dim=augment_dim)
        self.img_resolution = img_resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.label_dropout = limits.probability("label_dropout", label_dropout) if label_dim else 0

    def _build_encoder(
        self,
        block: Callable[..., UNetBlock],
        widths: Sequence[int],
        *,
        stem: Conv2d,
        num_blocks: int,
        attention: Collection[int],
        image_input: Callable[[str, int], None] | None = None,
    ) -> list[int]:
        """Fills `enc` from the full resolution down; returns the channels of every skip connection in order.

        block        makes a residual block from in_channels, out_channels and options
        widths       channels of each level;   attention  resolutions whose blocks attend
        stem         convolution of the image
        image_input  (level's name, channels) adds layers that bring the image in again below the first level
        """
        self.enc = nn.ModuleDict()
        width = stem.out_channels
        skips = [width]
        for level, level_width in enumerate(widths):
            res = self.img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                self.enc[f"{name}_conv"] = stem
            else:
                self.enc[f"{name}_down"] = block(in_channels=width, out_channels=width, down=True)
                skips.append(width)
                if image_input is not None:
                    image_input(name, width)
            for idx in range(num_blocks):
                self.enc[f"{name}_block{idx}"] = block(
                    in_channels=width, out_channels=level_width, attention=res in attention
                )
                width = level_width
                skips.append(width)
        return skips

    def _build_decoder(
        self,
        block: Callable[..., UNetBlock],
        widths: Sequence[int],
        *,
        skips: list[int],
        num_blocks: int,
        attention: Collection[int],
        attend_in_last: bool,
        image_output: Callable[[str, int], None] | None = None,
    ) -> None:
        """Fills `dec` from the lowest resolution up; every block but the first of a level takes one skip connection.

        skips           as `_build_encoder` returns them
        attend_in_last  attention in the last block of a level alone, not in all of them
        image_output    (level's name, channels) adds layers that read an image at the end of a level
        """
        self.dec = nn.ModuleDict()
        width, skips = skips[-1], list(skips)
        for level in reversed(range(len(widths))):
            res = self.img_resolution >> level
            name = f"{res}x{res}"
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(in_channels=width, out_channels=width, attention=True)
                self.dec[f"{name}_in1"] = block(in_channels=width, out_channels=width)
            else:
                self.dec[f"{name}_up"] = block(in_channels=width, out_channels=width, up=True)
            for idx in range(num_blocks + 1):
                attends = res in attention and (idx == num_blocks or not attend_in_last)
                self.dec[f"{name}_block{idx}"] = block(
                    in_channels=width + skips.pop(), out_channels=widths[level], attention=attends
                )
                width = widths[level]
            if image_output is not None:
                image_output(name, width)

    def _dropout_layers(self) -> list[tuple[float, tuple[int, ...]]]:
        # The label dropout comes first: it too must agree between two passes.
        return [(self.label_dropout, (1,))] * bool(self.label_dropout) + unet_layers(self)

    def draw_dropout(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Bool keep-masks for one training pass over x (B, C, H, W), one row per sample; () when nothing drops."""
        first = self.enc[f"{self.img_resolution}x{self.img_resolution}_conv"].weight
        return draw_masks(self._dropout_layers(), x, first, generator)

    def _feed(self, masks: Sequence[Tensor] | None, batch: int):
        return feed_masks(masks, len(self._dropout_layers()), batch) if self.training else None

    def _drop_labels(self, labels: Tensor, masks, batch: int) -> Tensor:
        """Zero the class of a random fraction label_dropout of the samples, in training."""
        if not self.training or not self.label_dropout:
            return labels
        if masks is not None:
            return labels * next(masks).to(labels.dtype)
        keep = torch.rand([batch, 1], device=labels.device) >= self.label_dropout
        return labels * keep.to(labels.dtype)

    def _block(self, layer: UNetBlock, x: Tensor, emb: Tensor, masks) -> Tensor:
        return layer(x, emb, next(masks) if masks is not None and layer.dropout else None)
