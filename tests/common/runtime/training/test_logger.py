"""metrics.csv grows by lines, survives kills, and never repeats or loses a step."""

import builtins
import csv
import errno
import math

import pytest
from lightning.pytorch import Callback

from common.errors import UserError
from common.runtime.training.logger import MetricsCSV
from common.runtime.verbs import fit


def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_one_row_per_step_with_empty_cells(path):
    logger = MetricsCSV(path=str(path))
    logger.log_metrics({"train/loss": 1.5, "epoch": 0}, step=0)
    logger.log_metrics({"val/fd": 2.0}, step=1)
    logger.log_metrics({"train/loss": 0.25}, step=1)
    logger.log_metrics({"train/loss": math.nan}, step=2)
    assert path.read_text().splitlines() == ["step,train/loss,val/fd", "0,1.5,", "1,0.25,2.0", "2,nan,"]


def test_values_keep_every_bit(path):
    MetricsCSV(path=str(path)).log_metrics({"x": 0.1 + 0.2}, step=0)
    assert float(rows(path)[0]["x"]) == 0.1 + 0.2


def test_nothing_given_writes_nothing(path):
    MetricsCSV(path=str(path)).log_metrics({"epoch": 1}, step=3)
    assert not path.exists()


def test_the_same_row_twice_is_one_row_and_one_write(path):
    logger = MetricsCSV(path=str(path))
    for _ in range(2):
        logger.log_metrics({"a": 1.0, "b": 2.0}, step=5)
        before = path.stat().st_mtime_ns
    assert len(rows(path)) == 1 and path.stat().st_mtime_ns == before
    logger.log_metrics({"b": 3.0}, step=5)
    assert rows(path) == [{"step": "5", "a": "1.0", "b": "3.0"}]


def test_resuming_cuts_back_to_the_checkpoint(path):
    logger = MetricsCSV(path=str(path))
    for step in range(6):
        logger.log_metrics({"a": float(step)}, step=step)
    with open(path, "a") as file:
        file.write("6,")  # the line a kill cut short
    again = MetricsCSV(path=str(path))
    again.start_at(4)
    assert [row["step"] for row in rows(path)] == ["0", "1", "2", "3", "4"]
    again.log_metrics({"a": 50.0, "step": 5.0}, step=5)
    assert [row["a"] for row in rows(path)] == ["0.0", "1.0", "2.0", "3.0", "4.0", "50.0"]


def test_a_line_cut_inside_its_step_number_is_dropped(path):
    path.write_text("step,a\n0,1.0\n\n,3\n")
    MetricsCSV(path=str(path)).start_at(10)
    assert rows(path) == [{"step": "0", "a": "1.0"}]


def test_starting_anew_forgets_the_old_run(path):
    MetricsCSV(path=str(path)).log_metrics({"a": 1.0}, step=0)
    logger = MetricsCSV(path=str(path))
    logger.start_at(0)
    assert rows(path) == []


def test_a_full_disk_is_one_sentence(path, monkeypatch):
    logger = MetricsCSV(path=str(path))
    logger.log_metrics({"a": 1.0}, step=0)
    real = builtins.open

    def full(file, mode="r", *args, **kwargs):
        if str(file) == str(path) and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(UserError, match=r"Cannot write .*metrics.csv: the disk is full"):
        logger.log_metrics({"a": 2.0}, step=1)
    monkeypatch.undo()
    assert [row["a"] for row in rows(path)] == ["1.0"]


class Losses(Callback):
    """Loss of every micro-batch by optimiser step; Lightning hands it over divided by their number."""

    def __init__(self, parts: int):
        self.parts, self.seen = parts, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(float(outputs["loss"]) * self.parts)


def test_rows_count_optimiser_steps_and_hold_the_mean_of_their_micro_batches(composed, tmp_path, with_callbacks):
    watch = Losses(parts=4)
    with_callbacks(watch)
    fit.fit_task(composed(
        tmp_path / "run", "trainer.max_steps=3", "trainer.accumulate_grad_batches=4",
        "callbacks.checkpoints.every_n_steps=2",
    ))  # fmt: skip
    logged = rows(tmp_path / "run/metrics.csv")
    assert [row["step"] for row in logged] == ["1", "2", "3"], "as on screen and in the names of checkpoints"
    means = [sum(watch.seen[first : first + 4]) / 4 for first in (0, 4, 8)]
    assert [float(row["train/loss"]) for row in logged] == pytest.approx(means, rel=1e-5)
    assert max(means) - min(means) < max(watch.seen) - min(watch.seen)
