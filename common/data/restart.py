"""What every data module shares: where the run stands, this process's share of a batch, and loaders that keep to both.

What a run sees depends on (seed, samples seen so far) and on nothing else: not on the number of workers or processes,
not on validation in between, not on whether the run was interrupted.
"""

import os
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.sampler import EvalSampler, StatelessSampler, check_batch_size
from common.errors import UserError


class RestartingDataModule(pl.LightningDataModule):
    """Abstract: counts the samples of the run so that a restart goes on at the very next one.

    A data module sets `batch_size` (samples per optimiser step over all processes and accumulated micro-batches), and,
    where its training set is a numbered one, `seed` and `shuffle`. `sampled` is what a sample is called in messages,
    `seen_key` the name of the count in a checkpoint.
    """

    sampled = "images"
    seen_key = "images_seen"

    batch_size: int
    seed: int
    shuffle: bool

    def __init__(self):
        super().__init__()
        self.start_samples = 0  # seen before the first micro-batch that the trainer's counter does not include
        self._start_batches = 0  # micro-batches the trainer's counter had when start_samples was noted

    # Where the run stands --------------------------------------------------------------------------------------------

    @property
    def micro_batch_size(self) -> int:
        """Samples per micro-batch over all processes: batch_size / trainer.accumulate_grad_batches."""
        return self.batch_size // self._accumulate()

    def samples_seen(self) -> int:
        """Samples this run has trained on, over all processes and earlier parts of the run.

        Counted by Lightning's `total.processed` micro-batches, the one counter that is already right when a checkpoint
        is written in `on_train_batch_end` (`completed` is one behind there) and still right when it is restored.
        """
        return self.start_samples + max(self._batches_done() - self._start_batches, 0) * self.micro_batch_size

    def state_dict(self) -> dict[str, int | bool]:
        """Plain numbers: samples seen (so that another batch size continues exactly), and what they depend on."""
        return {self.seen_key: self.samples_seen(), "batches": self._batches_done(), **self._order_facts()}

    def load_state_dict(self, state_dict: dict[str, int | bool]) -> None:
        self.start_samples = state_dict[self.seen_key]
        self._start_batches = state_dict["batches"]
        changed = [
            f"{key} was {state_dict[key]}, is {value}"
            for key, value in self._order_facts().items()
            if key in state_dict and state_dict[key] != value
        ]
        if changed:
            self._say_changed(changed)

    def _order_facts(self) -> dict[str, int | bool]:
        """What the order of the samples depends on, kept in checkpoints."""
        return {"seed": self.seed, "shuffle": self.shuffle}

    def _say_changed(self, changed: list[str]) -> None:
        rank_zero_warn(f"The order of the {self.sampled} changes from here on: data {'; '.join(changed)}.")

    def _batches_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    # This process's share --------------------------------------------------------------------------------------------

    def _accumulate(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _world(self) -> tuple[int, int]:
        """`(rank, world size)` among the processes that take different data."""
        if self.trainer is None:
            return 0, 1
        # the strategy's own answer, because with sharded models several processes may share one batch
        shares = self.trainer.distributed_sampler_kwargs or {}
        return shares.get("rank", self.trainer.global_rank), shares.get("num_replicas", self.trainer.world_size)

    def _check_shares(self) -> None:
        """Raises UserError unless batch_size falls into equal micro-batches."""
        parts = self._accumulate() * self._world()[1]
        check_batch_size(self.batch_size, parts, "processes x trainer.accumulate_grad_batches")

    def _start(self):
        """First position of an iteration of the training loader: a function, or a number when batches repeat."""
        repeats = self.trainer is not None and self.trainer.overfit_batches > 0
        return self.start_samples if repeats else self.samples_seen

    def _train_sampler(self, dataset_size: int) -> StatelessSampler:
        """This process's endless draws from a set of that size. Raises UserError for a bad batch size."""
        self._check_shares()
        rank, world_size = self._world()
        return StatelessSampler(
            dataset_size=dataset_size,
            batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            start=self._start(),
            seed=self.seed,
            shuffle=self.shuffle,
        )

    def _eval_sampler(self, dataset_size: int, batch_size: int) -> EvalSampler:
        """This process's share of a set of that size, every sample once over all processes, in order."""
        rank, world_size = self._world()
        return EvalSampler(dataset_size=dataset_size, batch_size=batch_size, rank=rank, world_size=world_size)


class Batches:
    """A DataLoader that reports an unreadable file as one sentence instead of a worker's traceback.

    Not itself a DataLoader, so Lightning leaves its sampler alone: ours already gives every process its share.

    dataset      `__getitems__(draws)` gives a whole batch, or `{"error": sentence}`
    sampler      lists of draws; one without a length makes batches without end
    num_workers  worker processes at most; no more than this process has cores, where more only cost time
    pin_memory   None: when a CUDA device is there
    """

    def __init__(self, dataset: Dataset, sampler, *, num_workers: int, pin_memory: bool | None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(num_workers, cores)
        self.loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            generator=torch.Generator().manual_seed(0),  # else every start of an iteration moves torch's global stream
        )

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


def _as_is(batch):
    return batch
