"""The data module of optical flow: mixtures of data sets in given shares, exact restart, evaluation sets by name.

Which pairs a run sees and how they are augmented depends on (seed, pairs seen so far) and on nothing else, as in
`common.data.images.module`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from common import limits
from common.data.draws import PositionDraws
from common.data.flow.padding import MODES
from common.data.flow.pairs import FlowPairs, FlowSource, stack
from common.data.images.module import to_unit_range
from common.data.restart import Batches, CountedBatches, RestartingDataModule
from common.data.sampler import EqualSizes, check_batch_size
from common.data.source import check_split
from common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """One part of a mixture.

    source   see `common.data.flow.pairs.FlowSource`
    split    split of it
    augment  `common.data.flow.augment`: DenseAugment, SparseAugment, ColourAugment; None: pairs as they are
    weight   times that each pair occurs in one pass over the mixture, >= 0; 0 leaves the part out

    Raises UserError for an unknown split or a negative weight.
    """

    source: FlowSource
    split: str = "train"
    augment: Callable | None = None
    weight: int = 1

    def __post_init__(self):
        check_split(self.split, self.source.splits, self.source.name)
        limits.whole("data.train.<set>.weight", self.weight, hint="Set 0 to leave the set out.")


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A split of a source that is evaluated, whole pictures.

    padding  how a network should pad its pictures (`common.data.flow.padding`), None: as its module does all others

    Raises UserError for an unknown split or padding.
    """

    source: FlowSource
    split: str = "train"
    padding: str | None = None

    def __post_init__(self):
        if self.padding is not None:
            limits.choice("data.evaluation.<set>.padding", self.padding, MODES)
        check_split(self.split, self.source.splits, self.source.name)


class FlowData(RestartingDataModule):
    """Batches, after `on_after_batch_transfer`:

    first, second  float32 (B, 3, H, W) in [-1, 1]
    flow           float32 (B, 2, H, W) pixels, u (right) then v (down), from the first to the second picture
    valid          float32 (B, H, W), 1 where the flow is known
    position       int64 (B,), number of the draw within the whole run (in evaluation: the pair's number)
    occluded       float32 (B, H, W), 1 where the second picture does not show the pixel; only where all pairs have it
    padding        in evaluation, a word: that of the set, where it has one

    In training H, W are the crop. In evaluation pairs come whole and unpadded, a batch holds pairs of one size.

    train            name -> TrainingSet. One pass holds every pair `weight` times; an endless source as many new ones
    evaluation       name -> EvaluationSet; the names are the `splits`. None in either leaves the set out
    crop             [height, width] of training pairs, pixels; what planning counts with
    batch_size       pairs per optimiser step over all processes and accumulated micro-batches, >= 1
    eval_batch_size  at most so many pairs, of one size, per evaluation batch over all processes, >= 1
    num_workers      worker processes that read and augment
    seed, shuffle    order of the pairs; the seed also decides the augmentation
    pin_memory       None: when a CUDA device is there
    name             in messages and beside numbers
    root             data folder the sources were given; kept for messages

    Raises UserError for numbers out of range, and from `check`, `setup` and the loaders for missing, damaged or
    mismatched files.
    """

    holds = "pairs of frames with optical flow"
    sampled = "pairs"
    seen_key = "pairs_seen"

    def __init__(
        self,
        *,
        train: Mapping[str, TrainingSet | None],
        evaluation: Mapping[str, EvaluationSet | None],
        crop: Sequence[int],
        batch_size: int = 12,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        pin_memory: bool | None = None,
        name: str = "flow",
        root: str | None = None,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        if len(crop) != 2 or min(crop) < 8 or any(side % 8 for side in crop):
            raise UserError(f"data.crop must be [height, width], multiples of 8, got {list(crop)}. Set [368,496].")
        limits.whole("data.num_workers", num_workers, hint="Set data.num_workers=0 for none.")
        self.train = {key: part for key, part in train.items() if part is not None and part.weight}
        self.evaluation = {key: part for key, part in evaluation.items() if part is not None}
        if not self.train:
            raise UserError("data.train names no set with a weight above 0. Set data.train.<name>.weight=1 for one.")
        for key, part in self.train.items():
            size = getattr(part.augment, "crop", None) or getattr(part.source, "size", None)
            if size is not None and tuple(size) != tuple(crop):
                raise UserError(
                    f"data.train.{key} gives pairs of {list(size)}, but data.crop is {list(crop)}. Set its "
                    "augment.crop (or source.size) to ${data.crop}."
                )
        self.crop = tuple(crop)
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed, self.shuffle, self.pin_memory, self.name, self.root = seed, shuffle, pin_memory, name, root
        self._pairs: dict[str, FlowPairs] = {}
        self._mixture: Mixture | None = None
        self._loaders: list[Batches] = []

    # What the data set is; known without touching a file -------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the evaluation sets."""
        return tuple(self.evaluation)

    def check(self) -> None:
        """Before any work: the files of every set, trained on and evaluated, are there. Raises UserError with the
        expected layout of the folder."""
        for kind, parts in (("train", self.train), ("evaluation", self.evaluation)):
            for key, part in parts.items():
                try:
                    part.source.check(part.split)
                except UserError as error:
                    out = f"data.evaluation.{key}=null" if kind == "evaluation" else f"data.train.{key}.weight=0"
                    needed = kind == "train" and len(parts) == 1  # something must be trained on
                    drop = "" if needed else f" Or leave the set out: {out}."
                    raise UserError(f"data.{kind}.{key}: {error}{drop}") from error

    def mixture(self) -> "Mixture":
        """The training sets, listed on first use."""
        if self._mixture is None:
            self._mixture = Mixture(self.train)
        return self._mixture

    def pairs(self, split: str) -> FlowPairs:
        """One evaluation set, listed on first use. Raises UserError for an unknown name."""
        check_split(split, self.splits, self.name)
        if split not in self._pairs:
            part = self.evaluation[split]
            self._pairs[split] = part.source.load(part.split)
        return self._pairs[split]

    def fingerprint(self, split: str) -> str:
        """16 hex digits that change when the files of the set do."""
        return self.pairs(split).fingerprint()

    # Lightning -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.mixture()
            self._check_shares()

    def train_dataloader(self) -> Batches:
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        mixture = self.mixture()
        return self._loader(Batches, _TrainingPairs(mixture, self.seed), self._train_sampler(len(mixture)))

    def val_dataloader(self) -> list:
        """None: flow is judged by `eval_batches`."""
        return []

    def eval_batches(self, split: str) -> CountedBatches:
        """Every pair of the evaluation set once over all processes, whole. Raises UserError for an unknown name."""
        pairs = self.pairs(split)
        rank, world_size = self._world()
        sizes = None
        if self.eval_batch_size > world_size:
            sizes = [pairs.size(index) for index in range(len(pairs))]
        sampler = EqualSizes(
            count=len(pairs), sizes=sizes, batch_size=self.eval_batch_size, rank=rank, world_size=world_size
        )
        return self._loader(CountedBatches, _WholePairs(pairs, self.padding(split)), sampler)

    def padding(self, split: str) -> str | None:
        """How pictures of the evaluation set are padded; None: it does not say."""
        return self.evaluation[split].padding

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Pictures float on the device: a quarter of their bytes travels."""
        if batch["first"].dtype == torch.uint8:
            batch = {**batch, **{name: to_unit_range(batch[name]) for name in ("first", "second")}}
        return batch

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()

    def _order_facts(self) -> dict[str, int | bool | str]:
        weights = ", ".join(f"{part.weight} {key}" for key, part in self.train.items())
        return {**super()._order_facts(), "mixture": weights}

    def _loader(self, kind: type[Batches], dataset: Dataset, sampler: Sampler) -> Batches:
        batches = kind(dataset, sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)
        self._loaders.append(batches)
        return batches


class Mixture:
    """Training sets one after the other, each as often as its weight says; `len` is one pass over all."""

    def __init__(self, train: Mapping[str, TrainingSet]):
        self.names = list(train)
        self.augments = [part.augment for part in train.values()]
        self.pairs = [part.source.load(part.split) for part in train.values()]
        self.ends = np.cumsum([len(pairs) * part.weight for pairs, part in zip(self.pairs, train.values())])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def shares(self) -> dict[str, float]:
        """What part of the pairs drawn each set gives, by name; they add up to 1."""
        counts = np.diff(self.ends, prepend=0)
        return {name: float(count / self.ends[-1]) for name, count in zip(self.names, counts)}

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the set, number of the pair in it) of 0 <= index < len."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[part - 1]) if part else 0
        return part, (index - start) % len(self.pairs[part])

    def read(self, index: int, position: int, seed: int) -> dict[str, Tensor]:
        """The sample drawn at `position`, augmented."""
        part, number = self.locate(index)
        pairs, augment = self.pairs[part], self.augments[part]
        sample = pairs.read(position if pairs.endless else number)
        return sample if augment is None else augment(PositionDraws(seed, position, "flow augmentation"), sample)


class _TrainingPairs(Dataset):
    """A list of (index, position) as one augmented batch, pictures uint8."""

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture, self.seed = mixture, seed

    def __getitems__(self, draws: Iterable[tuple[int, int]]) -> dict[str, Tensor | str]:
        try:
            samples = [self.mixture.read(index, position, self.seed) for index, position in draws]
        except UserError as error:
            return {"error": str(error)}
        return {**stack(samples), "position": torch.tensor([position for _, position in draws], dtype=torch.int64)}

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        return self.__getitems__([draw])


class _WholePairs(Dataset):
    """A list of (index, index) of pairs of one size as one batch, pictures uint8."""

    def __init__(self, pairs: FlowPairs, padding: str | None):
        self.pairs = pairs
        self.extra = {} if padding is None else {"padding": padding}

    def __getitems__(self, draws: Iterable[tuple[int, int]]) -> dict[str, Tensor | str]:
        try:
            samples = [self.pairs.read(index) for index, _ in draws]
        except UserError as error:
            return {"error": str(error)}
        position = torch.tensor([position for _, position in draws], dtype=torch.int64)
        return {**stack(samples), "position": position, **self.extra}

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        return self.__getitems__([draw])
