"""Colours of the classes of segmentation sets, (red, green, blue) 0..255."""

from collections.abc import Sequence

Palette = Sequence[tuple[int, int, int]]

CAMVID = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip


def bit_palette(count: int, first: int = 0) -> tuple[tuple[int, int, int], ...]:
    """Colours of classes first..first+count-1 by PASCAL VOC's rule: bits 0, 3, 6 of the number are red's bits from the
    top down, bits 1, 4, 7 green's, 2, 5 blue's. Class 0 is black. count + first <= 256, all different.
    """
    return tuple(
        tuple(sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
        for number in range(first, first + count)
    )
