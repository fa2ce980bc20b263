"""The data module of every image experiment: uint8 from the source, float in [-1, 1] on the device, exact restart.

Which images a run sees depends on (seed, images seen so far) and on nothing else: not on the number of workers or
processes, not on validation in between, not on whether the run was interrupted.
"""

from collections.abc import Iterable, Iterator

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.sampler import EvalSampler, StatelessSampler, check_batch_size
from common.data.source import Images, Source, check_split
from common.errors import UserError


def to_unit_range(images: Tensor) -> Tensor:
    """Images uint8 0..255 of any shape as float32 in [-1, 1]: x / 127.5 - 1, as in EDM (arXiv 2206.00364)."""
    return images.to(torch.float32) / 127.5 - 1


class ImageDataModule(pl.LightningDataModule):
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
        if num_workers < 0:
            raise UserError(f"data.num_workers must be >= 0, got {num_workers}. Set data.num_workers=0 for none.")
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
        self.start_images = 0  # images seen before the first micro-batch that the trainer's counter does not include
        self._start_batches = 0  # micro-batches the trainer's counter had when start_images was noted
        self._images: dict[str, Images] = {}
        self._loaders: list[Batches] = []

    # What the data set is; known without touching a file -------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 when unlabelled."""
        return self.source.num_classes

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels, None when the source knows none."""
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

    def eval_batches(self, split: str) -> "Batches":
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
            check_batch_size(self.batch_size, self._accumulate() * self._world()[1], self._parts())

    def train_dataloader(self) -> "Batches":
        """Endless batches of this process, from `images_seen()` on, at every start of an iteration."""
        images = self.images("train")
        check_batch_size(self.batch_size, self._accumulate() * self._world()[1], self._parts())
        rank, world_size = self._world()
        repeats = self.trainer is not None and self.trainer.overfit_batches > 0
        sampler = StatelessSampler(
            dataset_size=len(images) * (2 if self.xflip else 1),
            batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            start=self.start_images if repeats else self.images_seen,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        return self._batches(images, sampler)

    def val_dataloader(self) -> "Batches | list":
        """`val_split` once, in stored order, each process its share; an empty list when there is none.

        Raises UserError for an unknown split; "test" may be absent, because it is the default.
        """
        if self.val_split not in (None, "test"):
            check_split(self.val_split, self.splits, self.name)
        return self._eval(self.val_split) if self.val_split in self.splits else []

    def test_dataloader(self) -> "Batches | list":
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

    # Where the run stands --------------------------------------------------------------------------------------------

    @property
    def micro_batch_size(self) -> int:
        """Images per micro-batch over all processes: batch_size / trainer.accumulate_grad_batches."""
        return self.batch_size // self._accumulate()

    def images_seen(self) -> int:
        """Images this run has trained on, over all processes and earlier parts of the run.

        Counted by Lightning's `total.processed` micro-batches, the one counter that is already right when a checkpoint
        is written in `on_train_batch_end` (`completed` is one behind there) and still right when it is restored.
        """
        if self.trainer is None:
            return self.start_images
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed - self._start_batches
        return self.start_images + max(done, 0) * self.micro_batch_size

    def state_dict(self) -> dict[str, int | bool]:
        """Plain numbers: images seen (so that another batch size continues exactly), and what they depend on."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer is not None else 0
        return {"images_seen": self.images_seen(), "batches": done, **self._order_facts()}

    def load_state_dict(self, state_dict: dict[str, int | bool]) -> None:
        self.start_images = state_dict["images_seen"]
        self._start_batches = state_dict["batches"]
        changed = [
            f"{key} was {state_dict[key]}, is {value}"
            for key, value in self._order_facts().items()
            if key in state_dict and state_dict[key] != value
        ]
        if changed:
            rank_zero_warn(f"The order of the images changes from here on: data {'; '.join(changed)}.")

    def _order_facts(self) -> dict[str, int | bool]:
        return {"seed": self.seed, "shuffle": self.shuffle, "xflip": self.xflip}

    # Pieces ----------------------------------------------------------------------------------------------------------

    def _accumulate(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _world(self) -> tuple[int, int]:
        """`(rank, world size)` among the processes that take different data."""
        if self.trainer is None:
            return 0, 1
        # the strategy's own answer, because with sharded models several processes may share one batch
        shares = self.trainer.distributed_sampler_kwargs or {}
        return shares.get("rank", self.trainer.global_rank), shares.get("num_replicas", self.trainer.world_size)

    def _parts(self) -> str:
        return "processes x trainer.accumulate_grad_batches"

    def _eval(self, split: str) -> "Batches":
        images = self.images(split)
        rank, world_size = self._world()
        sampler = EvalSampler(
            dataset_size=len(images), batch_size=self.eval_batch_size, rank=rank, world_size=world_size
        )
        return self._batches(images, sampler)

    def _batches(self, images: Images, sampler: StatelessSampler | EvalSampler) -> "Batches":
        endless = isinstance(sampler, StatelessSampler)
        pin = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        loader = DataLoader(
            _Draws(images, mirrored=endless and self.xflip),
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),  # else every start of an iteration moves torch's global stream
        )
        batches = Batches(loader) if endless else CountedBatches(loader)
        self._loaders.append(batches)
        return batches


class Batches:
    """A DataLoader that reports an unreadable file as one sentence instead of a worker's traceback.

    Not itself a DataLoader, so Lightning leaves its sampler alone: ours already gives every process its share.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            if "error" in batch:
                raise UserError(batch["error"])
            yield batch

    def close(self) -> None:
        """Ends the worker processes; a later iteration starts new ones."""
        self.loader._iterator = None


class CountedBatches(Batches):
    """`Batches` with an end."""

    def __len__(self) -> int:
        return len(self.loader)


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


def _as_is(batch):
    return batch
