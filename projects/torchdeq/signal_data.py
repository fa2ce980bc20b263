"""A signal as training data: coordinates in [-1, 1] -> values in [-1, 1], full batch or random subsets, exact restart.

Which points a step sees depends on (seed, points seen so far) and on nothing else, as in `common.data.images.module`.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.data.restart import RestartingDataModule
from common.data.sampler import StatelessSampler, check_batch_size
from common.data.source import check_split
from projects.torchdeq.signals import Signal, SignalSource

Batch = dict[str, Tensor]


class SignalDataModule(RestartingDataModule):
    """Batches `coords` float32 (B, d) in [-1, 1], `value` float32 (B, C) in [-1, 1], `index` int64 (B,).

    index is the point's number in the split's own order, the last grid axis fastest.

    source           one signal: Photograph, ImageFile, Wav, Frames (`projects.torchdeq.signals`)
    batch_size       points per optimiser step over all processes and accumulated micro-batches, >= 1; the number of
                     training points makes it a full batch
    eval_batch_size  points per evaluation batch, >= 1
    stride           1: train and test are the whole grid (representation). s > 1: every s-th point along each axis
                     from 0 is train, from s // 2 is test (generalisation; the zoo uses 2)
    seed             seed of the order of the points
    shuffle          False takes the points in stored order; right for a full batch
    name             name in messages, None takes the source's
    root             data folder the source was given; kept for messages

    Raises UserError for a bad batch size or stride, and from `check` and `setup` for missing or damaged files.
    """

    holds = "signals"
    sampled = "points"
    splits = ("train", "test")
    num_classes = 0

    def __init__(
        self,
        *,
        source: SignalSource,
        batch_size: int = 65_536,
        eval_batch_size: int = 65_536,
        stride: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        name: str | None = None,
        root: str | None = None,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        limits.whole("data.stride", stride, least=1, hint="Set data.stride=1 to train on every point.")
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.stride = stride
        self.seed = seed
        self.shuffle = shuffle
        self.name = name or source.name
        self.root = root
        self._signal: Signal | None = None
        self._points: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self) -> None:
        """Cheap look whether the file is there, before any work. Raises UserError saying what to do."""
        self.source.check()

    @property
    def signal(self) -> Signal:
        """The whole signal, read on first use."""
        if self._signal is None:
            self._signal = self.source.load()
        return self._signal

    def points(self, split: str) -> tuple[Tensor, Tensor]:
        """`(coordinates (N, d), values (N, C))` of a split. Raises UserError for an unknown split or an empty one."""
        check_split(split, self.splits, self.name)
        if split not in self._points:
            first = 0 if split == "train" else self.stride // 2
            # an axis too short to be thinned is kept whole
            every = tuple(slice(first, None, self.stride) if n > first else slice(None) for n in self.signal.grid)
            coordinates, values = self.signal.coordinates()[every], self.signal.values[every]
            self._points[split] = (coordinates.flatten(0, -2), values.flatten(0, -2))
        return self._points[split]

    def fingerprint(self, split: str) -> str:
        """16 hex digits that change when the content of the split does."""
        coordinates, values = self.points(split)
        digest = hashlib.sha256(repr((split, tuple(coordinates.shape), tuple(values.shape))).encode())
        for part in (coordinates, values):
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()[:16]

    # Lightning --------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.points("train")
            self._check_shares()

    def train_dataloader(self) -> "PointBatches":
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        coordinates, values = self.points("train")
        return PointBatches(coordinates, values, self._train_sampler(len(values)))

    def val_dataloader(self) -> list:
        """None: signals are judged by `eval_batches`."""
        return []

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Every point of the split once, in stored order, in batches of `eval_batch_size`; each process its share."""
        coordinates, values = self.points(split)
        rank, world_size = self._world()
        for joint in torch.arange(len(values)).split(self.eval_batch_size):
            index = joint.tensor_split(world_size)[rank]
            if len(index):
                yield {"coords": coordinates[index], "value": values[index], "index": index}


class PointBatches:
    """Endless batches of points; positions are turned into points all at once, where a DataLoader would walk a list.

    coordinates (N, d), values (N, C)   the split
    sampler                             which point stands at a position of the run, and where the run stands
    """

    def __init__(self, coordinates: Tensor, values: Tensor, sampler: StatelessSampler):
        self.coordinates = coordinates
        self.values = values
        self.sampler = sampler

    def __iter__(self) -> Iterator[Batch]:
        sampler = self.sampler
        position = sampler.start() if callable(sampler.start) else sampler.start
        share = sampler.batch_size // sampler.world_size
        while True:
            places = np.arange(share, dtype=np.int64) + (position + sampler.rank * share)
            index = torch.from_numpy(sampler.index(places))
            yield {"coords": self.coordinates[index], "value": self.values[index], "index": index}
            position += sampler.batch_size
