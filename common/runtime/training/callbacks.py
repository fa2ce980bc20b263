"""Callbacks that show a run: throughput, progress, pictures."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from common.errors import UserError
from common.files import atomic
from common.limits import number
from common.runtime.training.context import context_of, find_callback
from common.runtime.training.ema import WeightAverages, averaged, choose_average
from common.runtime.training.module import evaluating

# Dense bf16 matrix peak in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "V100": 125.0}

BAR_SECONDS = 0.5  # between two updates of the bar: reading the loss waits for the device


class Throughput(Callback):
    """Logs `perf/<unit>_per_s`, say images, and, when the device's peak is known, `perf/mfu` (model-FLOPs utilisation).

    FLOPs of one optimiser step are counted once, when training starts (`RunContext.count_flops`). A resumed
    run need not log the same values: they measure wall-clock time.
    """

    def __init__(self, *, every_n_steps: int = 50, peak_tflops: float | None = None):
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self.flops_per_step: float | None = None  # of the joint batch; None while unknown
        self.images_per_s = float("nan")  # or other units that the module counts
        self._started: tuple[float, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.peak_tflops is None and torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            self.peak_tflops = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        count_flops = context_of(pl_module).count_flops
        if self.peak_tflops and count_flops:
            self.flops_per_step = count_flops()
        self._started = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self._started is None:
            self._started = (time.perf_counter(), step)  # the first step includes the warm-up
            return
        before, from_step = self._started
        if step - from_step < self.every_n_steps:
            return
        seconds = time.perf_counter() - before
        self.images_per_s = (step - from_step) * context_of(pl_module).samples_per_step / seconds
        values = {f"perf/{unit_of(pl_module)}_per_s": self.images_per_s}
        if self.flops_per_step and self.peak_tflops:
            rate = self.flops_per_step * (step - from_step) / seconds
            values["perf/mfu"] = rate / (self.peak_tflops * 1e12 * trainer.world_size)
        pl_module.log_dict(values)
        self._started = (time.perf_counter(), step)


def clock(seconds: float) -> str:
    """A duration as `m:ss`, or `h:mm:ss` from an hour on, to the nearest second."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def unit_of(module) -> str:
    """What a batch of the module is made of, in words."""
    return getattr(module, "unit", "images")


class Progress(Callback):
    """A live bar on a terminal, lines elsewhere: step, time, loss, images/s and the latest metric.

    every_n_steps  optimiser steps between two lines
    every_seconds  a line also comes when this much time has passed since the last one, however slow the steps are
    Times are of this process: elapsed since training started, and an estimate of what remains at the mean speed.
    """

    def __init__(self, *, every_n_steps: int = 200, every_seconds: float = 30.0):
        if every_n_steps < 1:
            raise UserError(f"callbacks.progress.every_n_steps must be >= 1, got {every_n_steps}.")
        number("callbacks.progress.every_seconds", every_seconds, above=0)
        self.every_n_steps = every_n_steps
        self.every_seconds = every_seconds
        self.latest: dict[str, float] = {}  # metrics of the last evaluation, shown beside the loss
        self._loss: Tensor | None = None  # of the current optimiser step; Lightning's outputs are parts that add up
        self._bar: Any = None
        self._task: Any = None
        self._started = self._shown = 0.0  # times of the start and of the last line
        self._first = self._last = 0  # steps at the start and after the last batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._shown = time.perf_counter()
        self._first = self._last = trainer.global_step
        if not trainer.is_global_zero:
            return
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("<"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, values="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step, now = trainer.global_step, time.perf_counter()
        if not trainer.is_global_zero:
            return
        part = outputs["loss"] if isinstance(outputs, dict) else outputs
        if part is not None:
            self._loss = part.detach() if self._loss is None else self._loss + part.detach()
        if step == self._last:  # a micro-batch inside a step
            return
        self._last = step
        loss, self._loss = self._loss, None
        waited = now - self._shown
        if self._bar is not None:
            due = waited >= BAR_SECONDS
        else:
            due = step % self.every_n_steps == 0 or waited >= self.every_seconds
        if not due and step != trainer.max_steps:
            return
        self._shown = now
        text = self._text(trainer, loss, unit_of(pl_module))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=text)
        else:
            print(
                f"  step {step:>7}/{trainer.max_steps}  {self._times(step, trainer.max_steps, now)}  {text}", flush=True
            )

    def _times(self, step: int, steps: int, now: float) -> str:
        """`1:05 elapsed, 2:10 left`"""
        elapsed = now - self._started
        left = elapsed * (steps - step) / max(step - self._first, 1)
        return f"{clock(elapsed)} elapsed, {clock(left)} left"

    def _text(self, trainer: Any, loss: Tensor | None, unit: str) -> str:
        parts = [f"loss {float(loss):.4g}"] if loss is not None else []
        speed = throughput.images_per_s if (throughput := find_callback(trainer, Throughput)) else float("nan")
        if speed == speed:
            parts.append(f"{speed:,.0f} {unit}/s")
        parts += [f"{name} {value:.4g}" for name, value in self.latest.items()]
        return "  ".join(parts)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class SampleGrid(Callback):
    """Draws what the network does every N optimiser steps and at the end, always of the same samples.

    The module's `preview` writes `<folder>/step-<n>.png`, or several files in a folder `<folder>/step-<n>`. The
    sampler, the average and the seed are those of the `sample` section (`RunContext`).
    """

    def __init__(self, *, folder: str, every_n_steps: int | None = 5000, samples: int = 64):
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"callbacks.pictures.every_n_steps must be >= 1 or null, got {every_n_steps}.")
        if samples < 1:
            raise UserError(f"callbacks.pictures.samples must be >= 1, got {samples}.")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.samples = samples
        self._done = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self._done or not trainer.is_global_zero:
            return
        self._done = trainer.global_step
        context, stem = context_of(pl_module), self.folder / f"step-{trainer.global_step:08d}"
        kept = find_callback(trainer, WeightAverages)
        weights = choose_average(kept.averages if kept else {}, context.picture_average)
        with averaged(pl_module, weights), evaluating(pl_module):
            pl_module.refresh()  # type: ignore[operator]
            pl_module.preview(  # type: ignore[operator]
                trainer.datamodule,
                stem,
                samples=self.samples,
                seed=context.picture_seed,  # type: ignore[attr-defined]
            )


def write_grid(path, images: Tensor, *, columns: int | None = None) -> Path:
    """One PNG with all `images` (N, C, H, W; float in [-1, 1] or uint8) in rows with a gap between them.

    Small images are enlarged, without smoothing, so that a tile is at least 48 pixels wide.
    """
    from PIL import Image

    from common.metrics.images import to_uint8

    path = Path(path)
    tiles = to_uint8(images.detach().cpu() if images.dtype == torch.uint8 else images.detach().float().cpu())
    count, channels = tiles.shape[:2]
    scale, gap = max(1, -(-48 // tiles.shape[3])), 2
    tiles = tiles.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    tiles = torch.nn.functional.pad(tiles, (gap, 0, gap, 0), value=128)
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    grid = torch.full((rows * columns, *tiles.shape[1:]), 128, dtype=torch.uint8)
    grid[:count] = tiles
    grid = grid.view(rows, columns, *tiles.shape[1:]).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * tiles.shape[2], columns * tiles.shape[3], channels)
    array = torch.nn.functional.pad(grid, (0, 0, 0, gap, 0, gap), value=128).numpy()
    with atomic(path) as temporary:
        Image.fromarray(array[..., 0] if channels == 1 else array[..., :3]).save(temporary, format="PNG")
    return path
