"""The data module of every image experiment: uint8 from the source, float in [-1, 1] on the device, exact restart.

Which images a run sees depends on (seed, images seen so far) and on nothing else: not on the number of workers or
processes, not on validation in between, not on whether the run was interrupted.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import limits
from common.data.restart import Batches, CountedBatches, RestartingDataModule
from common.data.sampler import EvalSampler, StatelessSampler, check_batch_size
from common.data.source import Images, Source, check_split
from common.errors import UserError


def to_unit_range(images: Tensor) -> Tensor:
    """Images uint8 0..255 of any shape as float32 in [-1, 1]: x / 127.5 - 1, as in EDM (arXiv 2206.00364)."""
    return images.to(torch.float32) / 127.5 - 1


class ImageDataModule(RestartingDataModule):
    """Batches `image` float32 (B, C, H, W) in [-1, 1], `label` int64 (B,), `position` int64 (B,).

    position is the number of the draw within the whole run, over all processes (in evaluation: the image's number).

    source           data set: Digits, Cifar10, Mnist, FashionMnist, ImageFolder (see `common.data.source.Source`)
    batch_size       images per optimiser step over all processes and accumulated micro-batches, >= 1
    eval_batch_size  images per evaluation batch over all processes, >= 1
    num_workers      worker processes; 0 is fastest for data held in memory
    seed             seed of the order of the images
    shuffle          False takes the images in stored order
    xflip            True adds each image's mirror image to the set, which doubles an epoch (EDM's `xflip`)
    val_split        split used by `val_dataloader`, None for no validation data
    pin_memory       None: when a CUDA device is there
    name             name in messages and beside numbers, None takes the source's
    root             data folder the source was given; kept for messages

    Raises UserError for a bad batch size, and from `check`, `setup` and the loaders for missing or damaged files.
    """

    holds = "images"

    def __init__(
        self,
        *,
        source: Source,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        xflip: bool = False,
        val_split: str | None = "test",
        pin_memory: bool | None = None,
        name: str | None = None,
        root: str | None = None,
    ):
        super().__init__()
        check_batch_size(batch_size, 1, "1")
        check_batch_size(eval_batch_size, 1, "1", field="data.eval_batch_size")
        limits.whole("data.num_workers", num_workers, hint="Set data.num_workers=0 for none.")
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.xflip = xflip
        self.val_split = val_split
        self.pin_memory = pin_memory
        self.name = name or source.name
        self.root = root
        self._images: dict[str, Images] = {}
        self._loaders: list[Batches] = []

    # What the data set is; known without touching a file -------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 when unlabelled."""
        return self.source.num_classes

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels, None when the source has none."""
        return getattr(self.source, "classes", None)

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def resolution(self) -> int:
        """Width = height in pixels."""
        return self.source.resolution

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def check(self) -> None:
        """Cheap look whether the files are there, before any work. Raises UserError saying what to do."""
        self.source.check()

    def images(self, split: str) -> Images:
        """One split, read and verified on first use. Raises UserError for an unknown split or damaged files."""
        if split not in self._images:
            self._images[split] = self.source.load(split)
        return self._images[split]

    def fingerprint(self, split: str) -> str:
        """16 hex digits that change when the content of the split does."""
        return self.images(split).fingerprint()

    def reference_images(self, split: str, batch_size: int) -> Iterator[Tensor]:
        """Every image of the split once, in stored order, never mirrored: uint8 (<= batch_size, C, H, W)."""
        for image, _ in self.reference_batches(split, batch_size):
            yield image

    def reference_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `reference_images`, with the labels: uint8 (B, C, H, W) and int64 (B,)."""
        images = self.images(split)
        for first in range(0, len(images), batch_size):
            yield images.take(np.arange(first, min(first + batch_size, len(images))))

    def eval_batches(self, split: str) -> CountedBatches:
        """The split once, in stored order, each process its share: batches of a loader, so that images are uint8 until
        `on_after_batch_transfer`. Works with and without a trainer. Raises UserError for an unknown split.
        """
        return self._eval(check_split(split, self.splits, self.name))

    # Lightning -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.images("train")
            self._check_shares()

    def train_dataloader(self) -> Batches:
        """Endless batches of this process, from `samples_seen()` on, at every start of an iteration."""
        images = self.images("train")
        return self._batches(images, self._train_sampler(len(images) * (2 if self.xflip else 1)))

    def val_dataloader(self) -> Batches | list:
        """`val_split` once, in stored order, each process its share; an empty list when there is none.

        Raises UserError for an unknown split; "test" may be absent, because it is the default.
        """
        if self.val_split not in (None, "test"):
            check_split(self.val_split, self.splits, self.name)
        return self._eval(self.val_split) if self.val_split in self.splits else []

    def test_dataloader(self) -> Batches | list:
        """The split "test" once, in stored order; an empty list when the source has none."""
        return self._eval("test") if "test" in self.splits else []

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Makes the images float on the device: a quarter of the bytes travel from the workers and over the bus."""
        if batch["image"].dtype == torch.uint8:
            batch = {**batch, "image": to_unit_range(batch["image"])}
        return batch

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()

    def _order_facts(self) -> dict[str, int | bool]:
        return {**super()._order_facts(), "xflip": self.xflip}

    def _eval(self, split: str) -> CountedBatches:
        images = self.images(split)
        return self._batches(images, self._eval_sampler(len(images), self.eval_batch_size))

    def _batches(self, images: Images, sampler: StatelessSampler | EvalSampler) -> Batches:
        endless = isinstance(sampler, StatelessSampler)
        kind = Batches if endless else CountedBatches
        draws = self._draws(images, endless)
        batches = kind(draws, sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)
        self._loaders.append(batches)
        return batches

    def _draws(self, images: Images, endless: bool) -> Dataset:
        """What turns a list of (index, position) into one batch; `endless`: for training."""
        return _Draws(images, mirrored=endless and self.xflip)


class _Draws(Dataset):
    """Turns a list of (index, position) into one uint8 batch; indices from N on are the mirror images of 0..N-1."""

    def __init__(self, images: Images, mirrored: bool):
        self.images = images
        self.mirrored = mirrored

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirrored else 1)

    def __getitems__(self, draws: Iterable[tuple[int, int]]) -> dict[str, Tensor | str]:
        indices, positions = np.asarray(draws, dtype=np.int64).T
        flips, rows = np.divmod(indices, len(self.images))
        try:
            image, label = self.images.take(rows)
        except UserError as error:
            return {"error": str(error)}
        if flips.any():
            image = torch.where(torch.from_numpy(flips == 1)[:, None, None, None], image.flip(3), image)
        return {"image": image, "label": label, "position": torch.from_numpy(positions.copy())}

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        return self.__getitems__([draw])
