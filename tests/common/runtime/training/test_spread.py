"""Mean and deviation of a logged number over the last steps, also across a restart and from a real run."""

import csv
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from common.files import read_json
from common.runtime.training.spread import Spread
from common.runtime.verbs import fit


def feed(callback: Spread, *values: float) -> None:
    for value in values:
        trainer = SimpleNamespace(callback_metrics={"train/a": torch.tensor(value)})
        callback.on_train_batch_end(trainer, None, None, None, 0)


def test_only_the_last_numbers_count_also_after_a_restart():
    callback = Spread(metric="train/a", last=3)
    feed(callback, 100.0)
    assert math.isnan(callback.results()["train/a_std"])
    feed(callback, 100.0, 1.0, 2.0)
    again = Spread(metric="train/a", last=3)
    again.load_state_dict(callback.state_dict())
    feed(again, 6.0)
    assert again.results() == {
        "train/a_mean": pytest.approx(3.0), "train/a_std": pytest.approx(statistics.stdev([1, 2, 6]))
    }  # fmt: skip


def test_bad_input_is_named():
    with pytest.raises(UserError, match="at least 2 micro-batches, got 1"):
        Spread(metric="train/a", last=1)
    with pytest.raises(UserError, match="spread of train/b was asked for, but training logs train/a"):
        feed(Spread(metric="train/b"), 1.0)


def test_a_run_reports_it(composed, tmp_path):
    spread = "{_target_: common.runtime.training.spread.Spread, metric: train/loss, last: 3}"
    cfg = composed(
        tmp_path / "run", "trainer.max_steps=5", "trainer.log_every_n_steps=1", f"+callbacks.spread={spread}"
    )
    fit.fit_task(cfg)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    metrics = read_json(tmp_path / "run" / "result.json")["metrics"]
    assert len(losses) == 5
    assert metrics["train/loss_mean"]["value"] == pytest.approx(statistics.mean(losses[-3:]), rel=1e-5)
    assert metrics["train/loss_std"]["value"] == pytest.approx(statistics.stdev(losses[-3:]), rel=1e-4)
