"""Padding of pictures to sizes that a network takes, and cropping of its outputs."""

import torch.nn.functional as F
from torch import Tensor

from common import limits
from common.errors import UserError

MODES = ("sintel", "kitti")


class Padder:
    """Padding of pictures (B, C, h, w) until both sides are multiples of `multiple`, by repeating the border.

    least  sides are at least so long after padding; itself a multiple
    mode  sintel: half left, half right, half top, half bottom (an odd pixel goes right or down); kitti: half left,
          half right, all vertical padding at the bottom, as the authors' code does (which notes RAFT as its origin)

    `unpad(pad(x)[0])` is x exactly. Raises UserError for another mode or a size below 1.
    """

    def __init__(self, h: int, w: int, multiple: int = 8, mode: str = "sintel", least: int = 0):
        limits.choice("mode", mode, MODES)
        for name, value in (("h", h), ("w", w), ("multiple", multiple)):
            limits.whole(name, value, least=1)
        self.h, self.w = h, w
        down, right = (max(-side % multiple, least - side) for side in (h, w))
        top = down // 2 if mode == "sintel" else 0
        self.left, self.right, self.top, self.bottom = right // 2, right - right // 2, top, down - top

    def pad(self, *pictures: Tensor) -> list[Tensor]:
        """Each picture float (B, C, h, w) padded. Raises UserError for one of another size."""
        for picture in pictures:
            if tuple(picture.shape[-2:]) != (self.h, self.w):
                raise UserError(f"the padding is for {self.h}x{self.w}, got a picture of {tuple(picture.shape[-2:])}.")
        return [F.pad(x, (self.left, self.right, self.top, self.bottom), mode="replicate") for x in pictures]

    def unpad(self, x: Tensor) -> Tensor:
        """(..., padded h, padded w) -> (..., h, w): what `pad` added is cut off."""
        return x[..., self.top : self.top + self.h, self.left : self.left + self.w]
