"""The data module of segmentation: pictures with masks, augmented together, exact restart, evaluation of whole ones.

Which pairs a run sees and how they are augmented depends on (seed, pictures seen so far) and on nothing else, as in
`common.data.images.module`.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from common import limits
from common.data.images.module import to_unit_range
from common.data.restart import Batches, CountedBatches, RestartingDataModule
from common.data.sampler import EqualSizes, check_batch_size
from common.data.segmentation.augment import IGNORE, PairedAugment, check_fit, resized, scaled_size
from common.data.segmentation.pairs import Pairs, SegmentationSource, check_pairs
from common.data.segmentation.palette import Palette
from common.data.source import check_split
from common.errors import UserError

WEIGHTINGS = ("none", "median_frequency", "inverse_log")


class SegmentationDataModule(RestartingDataModule):
    """Batches, after `on_after_batch_transfer`:

    image     float32 (B, 3, h, w) in [-1, 1]
    mask      int64 (B, H, W), classes 0..num_classes-1 and `ignore` = 255
    position  int64 (B,), number of the draw within the whole run (in evaluation: the picture's number)
    size      int64 (B, 2), height and width of the mask as it lies on the disk; evaluation only

    In training h = H, w = W are the crop's. In evaluation pictures come whole and are never padded: a global context
    block would see the padding from every pixel, and multi-scale evaluation would resize it along. So a batch holds
    only pictures of one size. h, w = H, W unless `eval_fit` shrinks the picture: the mask stays as it is, and
    predictions are resized to the mask.

    source           Voc2012, PascalContext, Ade20k, Cityscapes, CamVid (see `SegmentationSource`)
    augment          what training pairs go through (`common.data.segmentation.augment`)
    batch_size       pictures per optimiser step over all processes and accumulated micro-batches, >= 1
    eval_batch_size  at most so many pictures, of one size, per evaluation batch over all processes, >= 1. Above 1 the
                     head of every picture is read first, and the order is that of the batches' last pictures
    eval_fit         [long, short]: pictures are resized until both sides fit (mmseg: [2048, 512] for ADE20K); None: as
                     they are
    train_split      split trained on; trainval for the second stage of a run towards a test server
    class_weighting  none, median_frequency or inverse_log, see `class_weights`
    checked_pairs    pairs of each split decoded and checked before work starts, evenly spaced; None: all of them.
                     Every pair is checked again whenever it is read
    keep             True keeps decoded pairs in memory: for small sets
    num_workers      worker processes that read and augment
    seed, shuffle    order of the pictures; the seed also decides the augmentation
    pin_memory       None: when a CUDA device is there
    name             in messages and beside numbers, None: the source's
    root             data folder the source was given; kept for messages

    Raises UserError for numbers out of range, and from `check`, `setup` and the loaders for missing, damaged or
    mismatched files.
    """

    holds = "pictures with masks"
    ignore = IGNORE

    def __init__(
        self,
        *,
        source: SegmentationSource,
        augment: PairedAugment,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        eval_fit: Sequence[int] | None = None,
        train_split: str = "train",
        class_weighting: str = "none",
        checked_pairs: int | None = 8,
        keep: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        pin_memory: bool | None = None,
        name: str | None = None,
        root: str | None = None,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        check_fit(eval_fit, "data.eval_fit")
        check_split(train_split, source.splits, f"data.train_split: {source.name}")
        limits.choice("data.class_weighting", class_weighting, WEIGHTINGS, hint="Set none for equal weights.")
        if checked_pairs is not None:
            limits.whole("data.checked_pairs", checked_pairs, hint="Set null to check all.")
        limits.whole("data.num_workers", num_workers, hint="Set data.num_workers=0 for none.")
        self.source, self.augment = source, augment
        self.batch_size, self.eval_batch_size, self.eval_fit = batch_size, eval_batch_size, eval_fit
        self.train_split, self.class_weighting, self.checked_pairs = train_split, class_weighting, checked_pairs
        self.keep, self.num_workers, self.seed, self.shuffle = keep, num_workers, seed, shuffle
        self.pin_memory, self.name, self.root = pin_memory, name or source.name, root
        self._pairs: dict[str, Pairs | KeptPairs] = {}
        self._loaders: list[Batches] = []
        self._checked = False

    # What the data set is; known without touching a file -------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Classes without void."""
        return len(self.source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def palette(self) -> Palette:
        """A colour (red, green, blue) 0..255 for each class."""
        return self.source.palette

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def check(self) -> None:
        """Before any work, once: every split's files are there, each picture with its mask, and `checked_pairs` of them
        open, fit together and hold classes only. Raises UserError naming the file and the fix."""
        if not self._checked:
            self.source.check()
            if self.checked_pairs != 0:
                for split in self.splits:
                    check_pairs(self.pairs(split), self.checked_pairs)
            self._checked = True

    def pairs(self, split: str) -> "Pairs | KeptPairs":
        """One split, listed on first use: `read(index)` gives picture uint8 (3, H, W) and mask uint8 (H, W)."""
        check_split(split, self.splits, self.name)
        if split not in self._pairs:
            pairs = self.source.load(split)
            self._pairs[split] = KeptPairs(pairs) if self.keep else pairs
        return self._pairs[split]

    def fingerprint(self, split: str) -> str:
        """16 hex digits that change when the files of the split do."""
        return self.pairs(split).fingerprint()

    def class_weights(self) -> Tensor | None:
        """Weight of every class in the loss, float32 (num_classes,), from all masks of the training split; None for
        equal weights. See `class_weights`. Reads every mask: seconds for CamVid, minutes for ADE20K."""
        if self.class_weighting == "none":
            return None
        pairs = self.pairs(self.train_split)
        masks = (pairs.mask(index) for index in range(len(pairs)))
        return class_weights(masks, self.num_classes, self.class_weighting)

    # Lightning -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.pairs(self.train_split)
            self._check_shares()

    def train_dataloader(self) -> Batches:
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        pairs = self.pairs(self.train_split)
        draws = _TrainingPairs(pairs, self.augment, self.seed)
        return self._loader(Batches, draws, self._train_sampler(len(pairs)))

    def val_dataloader(self) -> list:
        """None: segmentation is judged by `eval_batches`."""
        return []

    def eval_batches(self, split: str) -> CountedBatches:
        """Every picture of the split once over all processes, whole. Raises UserError for an unknown split."""
        pairs = self.pairs(split)
        rank, world_size = self._world()
        sizes = None
        if self.eval_batch_size > world_size:
            sizes = [pairs.size(index) for index in range(len(pairs))]
        sampler = EqualSizes(
            count=len(pairs), sizes=sizes, batch_size=self.eval_batch_size, rank=rank, world_size=world_size
        )
        return self._loader(CountedBatches, _WholePairs(pairs, self.eval_fit), sampler)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Pictures float and masks whole numbers on the device: an eighth of the bytes travels."""
        if batch["image"].dtype == torch.uint8:
            batch = {**batch, "image": to_unit_range(batch["image"]), "mask": batch["mask"].long()}
        return batch

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()

    def _order_facts(self) -> dict[str, int | bool | str]:
        return {**super()._order_facts(), "train_split": self.train_split}

    def _loader(self, kind: type[Batches], dataset: Dataset, sampler: Sampler) -> Batches:
        batches = kind(dataset, sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)
        self._loaders.append(batches)
        return batches


class KeptPairs:
    """`Pairs` that decodes each pair once."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._read:
            image, mask = self.pairs.read(index)
            self._read[index] = (image.contiguous(), mask)
        return self._read[index]

    def mask(self, index: int) -> Tensor:
        return self._read[index][1] if index in self._read else self.pairs.mask(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.pairs.size(index)

    def fingerprint(self) -> str:
        return self.pairs.fingerprint()


class _TrainingPairs(Dataset):
    """A list of (index, position) as one augmented batch of uint8."""

    def __init__(self, pairs: Pairs | KeptPairs, augment: PairedAugment, seed: int):
        self.pairs, self.augment, self.seed = pairs, augment, seed

    def __getitems__(self, draws: Iterable[tuple[int, int]]) -> dict[str, Tensor | str]:
        try:
            made = [self.augment(*self.pairs.read(index), seed=self.seed, position=p) for index, p in draws]
        except UserError as error:
            return {"error": str(error)}
        images, masks = zip(*made)
        positions = torch.tensor([position for _, position in draws], dtype=torch.int64)
        return {"image": torch.stack(images), "mask": torch.stack(masks), "position": positions}

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        return self.__getitems__([draw])


class _WholePairs(Dataset):
    """A list of (index, index) of pictures of one size as one batch of uint8, with the masks' size."""

    def __init__(self, pairs: Pairs | KeptPairs, fit: Sequence[int] | None):
        self.pairs, self.fit = pairs, fit

    def __getitems__(self, draws: Iterable[tuple[int, int]]) -> dict[str, Tensor | str]:
        try:
            images, masks = zip(*(self.pairs.read(index) for index, _ in draws))
        except UserError as error:
            return {"error": str(error)}
        shape = tuple(masks[0].shape)
        if self.fit is not None:
            images = [resized(image, scaled_size(shape, 1.0, self.fit)) for image in images]
        return {
            "image": torch.stack(tuple(images)),
            "mask": torch.stack(masks),
            "position": torch.tensor([position for _, position in draws], dtype=torch.int64),
            "size": torch.tensor([shape] * len(masks), dtype=torch.int64),
        }

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        return self.__getitems__([draw])


def class_weights(masks: Iterable[Tensor], num_classes: int, weighting: str) -> Tensor:
    """float32 (num_classes,) from masks (H, W) of classes and 255; void pixels are not counted.

    median_frequency  median(f) / f_c, f_c = pixels of c / pixels of the pictures that hold c (arXiv 1411.4734, 6.3.2;
                      SegNet). The median is over the classes that occur; one that does not gets weight 1
    inverse_log       1 / ln(1.02 + p_c), p_c = share of c among all pixels (ENet, arXiv 1606.02147)

    Raises UserError when every pixel is void.
    """
    pixels, within = np.zeros(num_classes), np.zeros(num_classes)
    for mask in masks:
        counts = np.bincount(mask.numpy().ravel(), minlength=IGNORE + 1)[:num_classes]
        pixels += counts
        within += counts.sum() * (counts > 0)
    if not pixels.sum():
        raise UserError("class weights need masks, but every pixel of the training split is void. Check data.root.")
    if weighting == "inverse_log":
        weights = np.array([1 / math.log(1.02 + share) for share in pixels / pixels.sum()])
    else:
        seen = pixels > 0
        frequency = pixels[seen] / within[seen]
        weights = np.ones(num_classes)
        weights[seen] = np.median(frequency) / frequency
    return torch.from_numpy(weights.astype(np.float32))
