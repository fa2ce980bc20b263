"""The norm of the gradient, step by step, its largest value in the results, and both across a restart."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.files import read_json
from common.runtime.training.gradient_norm import GradientNorm
from common.runtime.verbs import fit


def step(callback: GradientNorm, *gradients: list[float]) -> dict:
    """The callback on parameters with these gradients; what it logs."""
    parameters = [nn.Parameter(torch.zeros(len(values))) for values in gradients]
    for parameter, values in zip(parameters, gradients):
        parameter.grad = torch.tensor(values)
    logged = {}
    module = SimpleNamespace(log=lambda name, value: logged.update({name: float(value)}))
    callback.on_before_optimizer_step(None, module, SimpleNamespace(param_groups=[{"params": parameters}]))
    return logged


def test_the_largest_norm_survives_smaller_ones_and_a_restart():
    callback = GradientNorm()
    assert math.isnan(callback.largest) and callback.state_dict() == {}
    assert step(callback, [3.0, 0.0], [4.0]) == {"train/grad_norm": pytest.approx(5.0)}
    step(callback, [1.0], [1.0])
    assert callback.results() == {"train/grad_norm_max": pytest.approx(5.0)}
    again = GradientNorm()
    again.load_state_dict(callback.state_dict())
    step(again, [2.0])
    assert again.largest == pytest.approx(5.0)
    step(again, [6.0])
    assert again.largest == pytest.approx(6.0)


def test_a_step_without_gradients_counts_nothing():
    callback = GradientNorm()
    module = SimpleNamespace(log=None)
    callback.on_before_optimizer_step(
        None, module, SimpleNamespace(param_groups=[{"params": [nn.Parameter(torch.zeros(2))]}])
    )
    assert math.isnan(callback.largest)


def test_a_run_reports_it(composed, tmp_path):
    cfg = composed(tmp_path / "run", "trainer.max_steps=3", "trainer.log_every_n_steps=1",
                   "+callbacks.grad_norm={_target_: common.runtime.training.gradient_norm.GradientNorm}")  # fmt: skip
    fit.fit_task(cfg)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        norms = [float(row["train/grad_norm"]) for row in csv.DictReader(file) if row.get("train/grad_norm")]
    assert len(norms) == 3
    found = read_json(tmp_path / "run" / "result.json")["metrics"]["train/grad_norm_max"]
    assert found["value"] == pytest.approx(max(norms), rel=1e-5) and found["record"] is None
