"""The LightningModule every paper starts from: a network, its optimiser recipe, and the methods the runtime calls."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from common.errors import UserError
from common.runtime.training.context import RunContext
from common.runtime.training.seeding import Draws


class ResearchModule(LightningModule):
    """Abstract: owns the network, the optimiser recipe and the per-step random numbers.

    A paper's module implements `training_step` and `fake_batch`. It may implement `show` (task=sample, pictures during
    training), `refresh` (state derived from the weights), and `evaluation_step` with `finalise` (metrics over a split).

    net        the network, in state-dict keys `net.*`; a wrapper around the network that papers count keeps that one
               as `net.raw`
    optimizer  partial: parameters -> torch optimiser
    schedule   learning-rate multiplier, optimiser step -> float (`common.optim.schedules`), or None for constant
    """

    net: nn.Module
    reads = ""  # kind of data it needs, the `holds` of a data module; empty: any
    unit = "samples"  # what a batch is made of, in words: `perf/<unit>_per_s`
    uses_sampler = False  # whether it uses `sample.sampler`
    unaveraged: tuple[str, ...] = ()  # prefixes of parameters (`net.<...>`) that running averages leave out
    idle_parameters: tuple[str, ...] = ()  # prefixes of parameters of `raw` that a plain training step does not use

    def __init__(self, *, net: nn.Module, optimizer: Callable, schedule: Callable | None = None):
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.context = RunContext()  # the runtime sets that of the run
        self._summed_step = -1
        self._sums: dict[str, tuple] = {}  # of the values logged in that optimiser step: name -> (sum, count)

    @property
    def raw(self) -> nn.Module:
        """The network whose parameters papers count: `net.raw` when the network is a wrapper, else the network."""
        return getattr(self.net, "raw", self.net)

    # Training ---------------------------------------------------------------------------------------------------------

    @property
    def micro_step(self) -> int:
        """Micro-batches done before the current one, over the whole run (restored on resume)."""
        if self._trainer is None:
            return 0
        return max(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1, 0)

    def draws(self) -> Draws:
        """The random numbers of the current micro-step."""
        if self._trainer is None:
            return Draws(seed=self.context.seed, step=0)
        return Draws(
            seed=self.context.seed,
            step=self.micro_step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def log(self, name: str, value, **options) -> None:  # type: ignore[override]
        """Lightning's `log`, tensors averaged over the processes; nothing outside a trainer (planning, notebooks).

        What `training_step` logs is the mean over the micro-batches of the current optimiser step.
        """
        if self._trainer is not None:
            if self._current_fx_name == "training_step" and self.trainer.accumulate_grad_batches > 1:
                value = self._mean_of_step(name, value)
            sync = torch.is_tensor(value) and self.trainer.world_size > 1
            super().log(name, value, **{"sync_dist": sync, **options})

    def _mean_of_step(self, name: str, value):
        if self._summed_step != self.trainer.global_step:
            self._summed_step, self._sums = self.trainer.global_step, {}
        total, count = self._sums.get(name, (0, 0))
        total = total + (value.detach() if torch.is_tensor(value) else value)
        self._sums[name] = (total, count + 1)
        return total / (count + 1)

    def parameter_groups(self) -> list:
        """What the optimiser is given: the trainable parameters, or groups of them with options of their own."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self):
        try:
            optimizer = self.make_optimizer(self.parameter_groups())
        except ValueError as error:  # torch refuses a negative learning rate, betas outside [0, 1), ...
            raise UserError(f"project.optimizer cannot be built: {error}. Change that option of it.") from error
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # What the runtime calls -------------------------------------------------------------------------------------------

    def fake_batch(self, samples: int):
        """A batch in the shapes of the data contract, called inside a FakeTensorMode: it holds no memory."""
        raise NotImplementedError(f"{type(self).__name__} needs fake_batch(samples): the shapes of one batch.")

    def fake_step(self, batch) -> Tensor:
        """The loss whose one backward pass costs what a training step costs, for planning on fake tensors.

        `training_step` by default; a module with manual optimisation adds up its losses, since there is no optimiser
        and no trainer here.
        """
        return loss_of(self.training_step(batch, 0))

    def check_data(self, data) -> None:
        """Raises UserError when the network cannot be trained on the data module `data`. Reads no files."""

    def refresh(self) -> None:
        """Recompute state derived from the weights. Called after they were exchanged (by an average, a checkpoint)."""

    def show(self, data, folder: Path, *, samples: int, seed: int) -> list[Path]:
        """Write pictures or text that show what the network does into `folder`; returns the files, the best one first.

        Called without gradients, in evaluation mode, with the chosen weights. By default nothing is written.

        data     the run's data module
        samples  how many at most;  seed  of random draws
        """
        return []

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """`show` during training: files in the folder `stem`; a module of one picture writes `<stem>.png` instead."""
        return self.show(data, stem, samples=samples, seed=seed)

    def show_files(self, files: Path | list[Path], data, folder: Path) -> list[Path]:
        """As `show`, on a file, a list of files or a folder of the user's own (`sample.input`).

        By default raises UserError.
        """
        raise UserError(f"sample.input={files} is given, but {type(self).__name__} reads no files. Set it to null.")

    def export_facts(self) -> dict:
        """Plain data an export stores beside weights and configuration, such as scales its sampler needs."""
        return {}

    def finalise(self, means: dict) -> dict[str, float]:
        """From the means of `evaluation_step` over a split to the paper's metrics. The same by default.

        A mean is a float, or a tensor (CPU, float64) where the step's sum was one: a confusion matrix, say.
        """
        return means


def loss_of(outputs) -> Tensor:
    """The loss among what a training step returned: a tensor, or a dictionary that holds it."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs


def modes_of(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every submodule with its training flag, parents first."""
    return [(part, part.training) for part in module.modules()]


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Restore the flags by calling `train`, which some modules override."""
    for part, mode in modes:
        if part.training != mode:
            part.train(mode)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; every submodule's own mode is put back afterwards."""
    modes = modes_of(module)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        restore_modes(modes)


def to_device(batch, data, device: torch.device | str):
    """A batch of a loader as a training step gets it: on `device`, through the data module's transfer hooks."""
    batch = data.on_before_batch_transfer(batch, 0)
    batch = data.transfer_batch_to_device(batch, torch.device(device), 0)
    return data.on_after_batch_transfer(batch, 0)


def leaves(batch) -> Iterator[Tensor]:
    """Every tensor in a batch, depth first."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from leaves(value)
