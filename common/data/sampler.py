"""Which image comes next, as a function of (seed, images drawn so far) alone: nothing to save or to fast-forward."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from common import limits
from common.errors import UserError


def check_batch_size(batch_size: int, parts: int, meaning: str, field: str = "data.batch_size") -> None:
    """Raises UserError unless `batch_size` >= 1 and divides into `parts` equal shares; `meaning` says what they are."""
    limits.whole(field, batch_size, least=1)
    smaller = max(parts, batch_size - batch_size % parts)  # rounded down: a larger batch may not fit in memory
    hint = f"Set {field}={smaller}, or change the number of parts."
    limits.multiple_of(field, batch_size, parts, meaning, hint)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Order of the images in epoch `epoch`: a permutation of 0..size-1, int64 (size,), keyed by (seed, epoch).

    Built from raw Philox words and a stable sort, because numpy promises those never change between versions, while
    `Generator.permutation` may: a checkpoint must find the same order years later.
    """
    key = int.from_bytes(hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


class StatelessSampler(Sampler):
    """Endless batch sampler: yields this rank's list of (index, position) for one micro-batch after the other.

    position p counts the images drawn in the whole run, over all ranks; its epoch is p // dataset_size and its index
    is entry p % dataset_size of that epoch's own permutation (no permutation when `shuffle` is false). A micro-batch is
    the next `batch_size` positions, and may cross an epoch's end; rank k of W takes the k-th contiguous W-th of it.
    The joint batch of W ranks is therefore the batch of one process, whatever W.

    dataset_size  number of indices, >= 1
    batch_size    images per micro-batch over ALL ranks, >= 1 and divisible by world_size
    start         images drawn before the first batch, or a function giving that number, called at every `iter()`

    It has no `__len__`: Lightning then takes it for endless. Raises UserError for an empty set or a bad batch size.
    """

    def __init__(
        self,
        *,
        dataset_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int | Callable[[], int] = 0,
        seed: int = 0,
        shuffle: bool = True,
    ):
        if dataset_size < 1:
            raise UserError(f"the training set must hold at least 1 image, got {dataset_size}. Check data.root.")
        check_batch_size(batch_size, world_size, "the number of processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Indices (B,) int64 in 0..dataset_size-1 of the draws at `positions` (B,) int64."""
        epochs, offsets = np.divmod(positions, self.dataset_size)
        if not self.shuffle:
            return offsets
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            indices[rows] = self._order(epoch)[offsets[rows]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= 2:  # a batch that crosses an epoch's end needs two; older ones never return
                self._orders.pop(min(self._orders))
            self._orders[epoch] = epoch_order(self.seed, epoch, self.dataset_size)
        return self._orders[epoch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start() if callable(self.start) else self.start
        share = self.batch_size // self.world_size
        while True:
            positions = np.arange(share, dtype=np.int64) + (position + self.rank * share)
            yield list(zip(self.index(positions).tolist(), positions.tolist()))
            position += self.batch_size


class EvalSampler(Sampler):
    """Every index once, in order: yields this rank's list of (index, index) for one batch after the other.

    `batch_size` counts images over all ranks; nothing is repeated to even the ranks out, since a repeated image would
    bias a metric, so the last batch may be shorter, and absent on some ranks when it holds fewer images than ranks.
    """

    def __init__(self, *, dataset_size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        check_batch_size(batch_size, 1, "1", field="data.eval_batch_size")
        self.dataset_size = dataset_size
        self.batch_size = max(batch_size, world_size)
        self.rank = rank
        self.world_size = world_size

    def _shares(self) -> Iterator[np.ndarray]:
        for first in range(0, self.dataset_size, self.batch_size):
            joint = np.arange(first, min(first + self.batch_size, self.dataset_size))
            share = np.array_split(joint, self.world_size)[self.rank]
            if len(share):
                yield share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for share in self._shares():
            yield [(index, index) for index in share.tolist()]

    def __len__(self) -> int:
        return sum(1 for _ in self._shares())


class EqualSizes(Sampler):
    """Every index once: lists of (index, index) whose pictures have one size, this rank's share of them.

    count       pictures
    sizes       (height, width) of each, None when they are not known: then batches of one
    batch_size  pictures per batch over all ranks; a rank's batches hold at most batch_size / world_size, at least one

    A batch is given out when it is full, what is left at the end in the order of its first picture: near the stored
    order, so that the first batches are a fair sample of the split.
    """

    def __init__(self, *, count: int, sizes: list | None, batch_size: int, rank: int = 0, world_size: int = 1):
        share = max(1, batch_size // world_size) if sizes is not None else 1
        open_batches: dict[tuple, list[int]] = {}
        batches = []
        for index in range(count):
            key = sizes[index] if sizes is not None else None
            batch = open_batches.setdefault(key, [])
            batch.append(index)
            if len(batch) == share:
                batches.append(open_batches.pop(key))
        self.batches = (batches + list(open_batches.values()))[rank::world_size]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(index, index) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)
