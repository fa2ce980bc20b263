"""A curve in a plane embedded in a space of D dimensions: data that vary in two dimensions only.

"Just image Transformers" and pMF (arXiv 2601.22158) show with it what a network narrower than its space can predict.
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.data.restart import RestartingDataModule
from common.data.sampler import check_batch_size
from common.data.source import check_split

CURVES = ("swiss_roll", "spiral")


def isometry(dimension: int, seed: int) -> Tensor:
    """(D, 2) float32 with orthonormal columns, drawn uniformly: lengths in the plane are lengths in the space.

    Raises UserError for fewer than 2 dimensions.
    """
    limits.whole("data.dimension", dimension, least=2, hint="Set it to the dimensions of the space.")
    drawn = np.random.RandomState(seed).standard_normal((dimension, 2))  # numpy promises that this stream never changes
    q, r = np.linalg.qr(drawn)
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))  # the signs make it uniform


def curve(u: np.ndarray, kind: str) -> np.ndarray:
    """Points (..., 2) of a curve at u (...) in [0, 1]; over uniform u each coordinate has mean 0 and deviation 1.

    kind  "swiss_roll": angles from 1.5 pi to 4.5 pi, radius equal to the angle; "spiral": angles from 0 to 6 pi with
          equally many points everywhere along its length, nearly
    Raises UserError for another word.
    """
    limits.choice("data.curve", kind, CURVES)

    def at(u):
        angle = 1.5 * math.pi * (1 + 2 * u) if kind == "swiss_roll" else 6 * math.pi * np.sqrt(u)
        return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=-1)

    middle = at((np.arange(100_000) + 0.5) / 100_000)
    return (at(u) - middle.mean(0)) / middle.std(0)


class EmbeddedCurve(RestartingDataModule):
    """Batches `image` float32 (B, D, 1, 1), `label` int64 (B,) zeros, `position` int64 (B,); train without end, test.

    image = A p, p = curve(u) + noise e in the plane, A = `isometry(dimension, plane_seed)`. Point i of a split depends
    on (seed, split, i) alone. Evaluation batches also hold `plane` (D, 2), which is A, and `other` (B, D, 1, 1), as
    many further points: two sets of real points show the least distance there is to measure.

    dimension        D, >= 2
    curve            "swiss_roll" or "spiral"
    noise            deviation in the plane around the curve, whose coordinates have deviation 1; >= 0
    plane_seed       of the isometry
    batch_size       points per optimiser step over all processes and accumulated micro-batches, >= 1
    eval_batch_size  points per evaluation batch, >= 2
    test_count       points of the test split, >= 1
    seed             of the points

    Raises UserError for numbers out of range and for another curve.
    """

    sampled = "points"
    splits = ("train", "test")
    num_classes = 0
    shuffle = False

    def __init__(
        self,
        *,
        dimension: int = 512,
        curve: str = "swiss_roll",
        noise: float = 0.0,
        plane_seed: int = 0,
        batch_size: int = 128,
        eval_batch_size: int = 2000,
        test_count: int = 4000,
        seed: int = 0,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        limits.whole("data.eval_batch_size", eval_batch_size, least=2)
        limits.number("data.noise", noise, least=0, hint="Set data.noise=0 for none.")
        limits.whole("data.test_count", test_count, least=1, hint="Set it to the points to measure.")
        self.plane = isometry(dimension, plane_seed)
        self._points_at(np.zeros((1, 4), dtype=np.uint64), curve, noise)
        self.dimension, self.curve, self.noise, self.plane_seed = dimension, curve, noise, plane_seed
        self.batch_size, self.eval_batch_size, self.test_count = batch_size, eval_batch_size, test_count
        self.seed = seed
        self.name = f"{curve}-{dimension}"

    def check(self) -> None:
        """Nothing can be missing: the points are generated."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_shares()

    def fingerprint(self, split: str) -> str:
        """16 hex digits of the recipe."""
        check_split(split, self.splits, self.name)
        facts = (split, self.dimension, self.curve, self.noise, self.plane_seed, self.test_count, self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    # Points -----------------------------------------------------------------------------------------------------------

    def flat(self, split: str, first: int, count: int) -> Tensor:
        """(count, 2) float32: the points numbered `first`, first + 1, ... of the split, in the plane."""
        # "lifted" was this data set's name: another word here would draw other points than recorded runs saw
        key = int.from_bytes(hashlib.sha256(f"lifted {self.seed} {split}".encode()).digest()[:16], "little")
        # a counter-based generator: four words per point, whatever was drawn before
        words = np.random.Philox(key=key, counter=first).random_raw(4 * count).reshape(count, 4)
        return torch.from_numpy(self._points_at(words, self.curve, self.noise).astype(np.float32))

    @staticmethod
    def _points_at(words: np.ndarray, kind: str, noise: float) -> np.ndarray:
        """Points (N, 2) from random words (N, 4): place on the curve, then a normal pair (Box and Muller)."""
        u = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
        radius, angle = np.sqrt(-2 * np.log(u[:, 1])), 2 * math.pi * u[:, 2]
        normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return curve(u[:, 0], kind) + noise * normal

    def embed(self, flat: Tensor) -> Tensor:
        """Points p (B, 2) of the plane -> A p (B, D, 1, 1)."""
        return (flat @ self.plane.T)[:, :, None, None]

    def points(self, split: str, first: int, count: int) -> dict[str, Tensor]:
        """One batch: `image`, `label`, `position`."""
        return {
            "image": self.embed(self.flat(split, first, count)),
            "label": torch.zeros(count, dtype=torch.int64),
            "position": torch.arange(first, first + count),
        }

    # Lightning --------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> "PointBatches":
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        self._check_shares()
        return PointBatches(self, self._start(), *self._world())

    def val_dataloader(self) -> list:
        """Empty: evaluation reads `eval_batches`."""
        return []

    def eval_batches(self, split: str) -> Iterator[dict[str, Tensor]]:
        """The first `test_count` points of the split, whole batches, one process after the other."""
        check_split(split, self.splits, self.name)
        rank, world_size = self._world()
        for first in range(rank * self.eval_batch_size, self.test_count, world_size * self.eval_batch_size):
            count = min(self.eval_batch_size, self.test_count - first)
            other = self.embed(self.flat(split, self.test_count + first, count))
            yield {**self.points(split, first, count), "other": other, "plane": self.plane}


class PointBatches:
    """Endless training batches of one process: its contiguous share of every `micro_batch_size` positions."""

    def __init__(self, data: EmbeddedCurve, start: int | Callable[[], int], rank: int, world_size: int):
        self.data, self.start, self.rank, self.world_size = data, start, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        position = self.start() if callable(self.start) else self.start
        share = self.data.micro_batch_size // self.world_size
        while True:
            yield self.data.points("train", position + self.rank * share, share)
            position += self.data.micro_batch_size
