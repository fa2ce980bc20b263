"""Checkpoints, written atomically (temporary file, checksum, rename) and read with `weights_only=True`."""

import re
from itertools import takewhile
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from common.errors import UserError
from common.files import atomic, checksum_path, sha256_file, verify_checksum, write_text
from common.runtime.training.logger import log_step
from common.weights.load import read_torch, stored_step

NAME = re.compile(r"^step-(\d+)\.ckpt$")


class SafeCheckpointIO(CheckpointIO):
    """Lightning's file access for checkpoints.

    Order of a write: data to a temporary file, its sha256 to `<name>.sha256`, then the rename. A kill at any point
    leaves either the old state or a complete new file. A file that does not match its checksum is never read; one that
    has none was copied here without it, and is read as plain data.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            _save(checkpoint, temporary)
            write_text(checksum_path(path), f"{sha256_file(temporary)}  {path.name}\n")

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        return read_checkpoint(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path) -> None:
        path = Path(path)
        path.unlink(missing_ok=True)
        checksum_path(path).unlink(missing_ok=True)


def _save(checkpoint: dict, path: Path) -> None:
    """torch.save that reports a failed write as the OSError it is; torch's own error only counts positions."""
    with open(path, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_checkpoint(path, *, map_location="cpu") -> dict:
    """One checkpoint, checked against its checksum (if it has one) and read without running any code in it.

    Raises UserError naming the file when it is missing, truncated, altered or holds anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No checkpoint at {path}. Train one first, or give the path of an existing step-*.ckpt.")
    if verify_checksum(path) is False:
        raise UserError(
            f"The checkpoint {path} does not match its checksum: it was cut short or altered. "
            f"Delete it to use the one before it."
        )
    return read_torch(path, map_location=map_location)


def list_checkpoints(folder) -> list[Path]:
    """Step checkpoints in `folder`, newest (highest step) first; unchecked."""
    folder = Path(folder)
    found = [p for p in folder.iterdir() if NAME.match(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Optimiser steps in the name of a checkpoint or picture, `step-<n>...`; 0 for other names."""
    found = re.match(r"step-(\d+)", Path(path).name)
    return int(found.group(1)) if found else 0


def fault(path: Path) -> str | None:
    """Why a checkpoint cannot be used, None when it can. One without a checksum is used when it can be opened."""
    try:
        matches = verify_checksum(path)
        if matches is None:
            stored_step(path)
    except (UserError, OSError) as error:
        return str(error).rstrip(".")
    return "it is cut short or altered (checksum differs)" if matches is False else None


def latest_complete(folder, say=print) -> Path | None:
    """The newest checkpoint that can be used; those passed over, and one without a checksum, are named by `say`."""
    for path in list_checkpoints(folder):
        found = fault(path)
        if found is None:
            if not checksum_path(path).is_file():
                say(f"Checkpoint {path} has no checksum beside it ({checksum_path(path).name}): read unchecked.")
            return path
        say(f"Checkpoint {path} cannot be used: {found}. Looking at the one before it.")
    return None


def unusable(folder) -> list[Path]:
    """The checkpoints in `folder` that cannot be used, down to the newest that can."""
    return list(takewhile(lambda path: fault(path) is not None, list_checkpoints(folder)))


class Checkpoints(Checkpoint):
    """Writes `step-<n>.ckpt` every `every_n_steps` optimiser steps and at the end; keeps the newest `keep`.

    Old files go only after the new one is in place, so a full disk or a kill never loses the last good one. The one
    just written stays, whatever else is in the folder.
    """

    def __init__(self, *, dirpath: str, every_n_steps: int = 1000, keep: int = 2):
        if every_n_steps < 1 or keep < 1:
            raise UserError(f"checkpoints need every_n_steps >= 1 and keep >= 1, got {every_n_steps} and {keep}.")
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.last: Path | None = None
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self.last = next(iter(list_checkpoints(self.dirpath)), None)  # unusable ones were moved aside before
        if trainer.is_global_zero and self.dirpath.is_dir():
            for cut_short in self.dirpath.glob(".tmp-*"):  # of a run that was killed while it wrote
                cut_short.unlink(missing_ok=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step != self._saved_step and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Write the checkpoint of the current step (all ranks must call this together)."""
        step = trainer.global_step
        path = self.dirpath / f"step-{step:08d}.ckpt"
        log_step(trainer)
        trainer.save_checkpoint(path, weights_only=False)  # optimiser and callbacks too; plain data all the same
        self._saved_step, self.last = step, path
        if trainer.is_global_zero:
            others = [old for old in list_checkpoints(self.dirpath) if old != path]
            for old in others[self.keep - 1 :]:
                trainer.strategy.checkpoint_io.remove_checkpoint(old)
        return path
