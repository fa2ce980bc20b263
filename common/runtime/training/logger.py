"""metrics.csv: one row per logged step, appended as the run goes and cut back to the checkpoint on resume."""

import csv
import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from common.files import atomic, write_error
from common.runtime.training.context import logging_interval


class StepNumber(Callback):
    """Numbers logged rows by the optimiser steps done, as the screen and file names do; Lightning would count from 0.

    Lightning takes a logged value called "step" as the number of the row, for every logger.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step % logging_interval(trainer) == 0:
            # a float64 tensor: a number would become float32, or bfloat16 with its 8 digits
            pl_module.log("step", torch.tensor(float(trainer.global_step), dtype=torch.float64))


def log_step(trainer: Trainer) -> None:
    """Write the row of the current optimiser step to metrics.csv now, if that step has one.

    Lightning logs after the callbacks; a checkpoint of step n must not be on disk before the row of step n is.
    """
    if trainer.global_step % logging_interval(trainer) == 0:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.log_metrics(trainer.logged_metrics, step=trainer.global_step)


class MetricsCSV(Logger):
    """Writes `path` with a `step` column (optimiser steps done) and one column per metric; empty where not logged.

    Lightning's CSVLogger starts the file anew when a run resumes; here a killed and continued run leaves the same file
    as an uninterrupted one: rows after the checkpoint are dropped before training continues.
    """

    def __init__(self, *, path: str):
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._rows: dict[int, dict[str, str]] = {}
        self._loaded = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsCSV":
        return self

    @rank_zero_only
    def log_hyperparams(self, params, *args) -> None:
        """The resolved configuration is in the run folder already."""

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Keep rows up to `step`, drop the rest: the resumed run logs those again. 0 drops all."""
        self._load()
        self._rows = {s: row for s, row in self._rows.items() if s <= step and step}
        if self.path.is_file():  # also mends a last line that a kill cut short
            self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self._load()
        step = int(step or 0)
        values = {k: repr(float(v)) for k, v in metrics.items() if k not in ("epoch", "step")}
        if self._rows.get(step, {}).items() >= values.items():
            return  # nothing given, or no new value
        row = self._rows.setdefault(step, {})
        fresh = not row
        row.update(values)
        unseen = [k for k in row if k not in self._columns]
        self._columns += unseen
        if unseen or not fresh or step != max(self._rows):
            self._rewrite()
        else:
            try:
                with open(self.path, "a", newline="") as file:
                    csv.writer(file).writerow(self._line(step))
            except OSError as error:
                raise write_error(self.path, error) from error

    def _line(self, step: int) -> list[str]:
        return [str(step), *(self._rows[step].get(column, "") for column in self._columns)]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        if not self.path.is_file():
            return
        with open(self.path, newline="") as file:
            for record in csv.DictReader(file):
                try:
                    step = int(record.pop("step"))
                except (KeyError, TypeError, ValueError):
                    continue  # a line cut by a kill
                row = {k: v for k, v in record.items() if k and v}
                self._rows[step] = row
                self._columns += [k for k in row if k not in self._columns]

    def _rewrite(self) -> None:
        with atomic(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *self._columns])
            writer.writerows(self._line(step) for step in sorted(self._rows))
            file.flush()
            os.fsync(file.fileno())
