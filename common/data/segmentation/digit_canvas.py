"""Canvases with several handwritten digits and a class for every pixel: a segmentation set that needs no download."""

import hashlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.data.images.digits import digits_split
from common.data.source import check_split

SIDE = 8  # pixels of a digit
CELL = 10  # a digit lies anywhere within its own square of so many pixels
INK = 96  # brightness 0..255 from which a pixel belongs to its digit
BACKGROUND, EVEN, ODD, TWIN = range(4)


class DigitCanvas:
    """Seven of scikit-learn's digits on a black canvas of 32x32; splits train and test from disjoint digits.

    One number stands on every canvas twice, five others once. The classes: background, even, odd, and twin for both
    digits of the number that stands there twice. What is twin cannot be seen from a digit alone: it takes the others.

    train_count, test_count  canvases of each split, >= 1
    seed                     of the digits and their places; canvas i of a split depends on (seed, i) alone

    A source of `common.data.segmentation.module.SegmentationDataModule`. Raises UserError for counts out of range.
    """

    name = "digit_canvas"
    class_names = ("background", "even", "odd", "twin")
    palette = ((40, 40, 40), (86, 180, 233), (230, 159, 0), (204, 51, 119))
    splits = ("train", "test")
    digits = 7
    resolution = 32

    def __init__(self, *, train_count: int = 4800, test_count: int = 256, seed: int = 0):
        for field, count in (("train_count", train_count), ("test_count", test_count)):
            limits.whole(f"data.source.{field}", count, least=1, hint="Set it to the canvases wanted.")
        self.counts = {"train": train_count, "test": test_count}
        self.seed = seed

    def check(self) -> None:
        """Nothing can be missing: the digits come with scikit-learn."""

    def load(self, split: str) -> "Canvases":
        check_split(split, self.splits, self.name)
        return Canvases(split=split, count=self.counts[split], seed=self.seed)


class Canvases:
    """The canvases of one split, made when read: in place of `common.data.segmentation.pairs.Pairs`."""

    def __init__(self, *, split: str, count: int, seed: int):
        self.split, self.count, self.seed = split, count, seed

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture uint8 (3, 32, 32) and mask uint8 (32, 32)."""
        image, mask = make_canvas(self.split, self.seed, index)
        return torch.from_numpy(np.repeat(image[None], 3, axis=0)), torch.from_numpy(mask)

    def mask(self, index: int) -> Tensor:
        return self.read(index)[1]

    def size(self, index: int) -> tuple[int, int]:
        return DigitCanvas.resolution, DigitCanvas.resolution

    def fingerprint(self) -> str:
        """16 hex digits of the recipe and of the first canvas."""
        digest = hashlib.sha256(f"{self.split} {self.count} {self.seed}".encode())
        for part in self.read(0):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]


def make_canvas(split: str, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture and mask, uint8 (32, 32) each, of canvas `index`."""
    # RandomState: numpy promises that its streams never change
    random = np.random.RandomState([seed, DigitCanvas.splits.index(split), index])
    numbers = random.permutation(10)[: DigitCanvas.digits - 1]
    numbers = np.append(numbers, numbers[0])  # the first one stands there twice
    side, digits = DigitCanvas.resolution, _digits(split)
    cells = side // CELL
    image, mask = np.zeros((2, side, side), np.uint8)
    for place, number in zip(random.permutation(cells * cells), numbers):
        choice = digits[number]
        digit = choice[random.randint(len(choice))]
        top, left = CELL * np.array(divmod(place, cells)) + random.randint(CELL - SIDE + 1, size=2)
        box = np.s_[top : top + SIDE, left : left + SIDE]
        image[box] = digit
        label = TWIN if number == numbers[0] else (ODD if number % 2 else EVEN)
        mask[box] = np.where(digit >= INK, label, BACKGROUND)
    return image, mask


@cache
def _digits(split: str) -> list[np.ndarray]:
    """The pictures uint8 (n, 8, 8) of every number 0..9 in a split."""
    train_x, train_y, test_x, test_y = digits_split()
    images, labels = (train_x, train_y) if split == "train" else (test_x, test_y)
    return [images[labels == number, 0] for number in range(10)]
