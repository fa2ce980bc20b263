"""Seconds of training steps, with nothing changed by taking them."""

import pytest
import torch

from common.runtime.training import timing
from common.runtime.training.timing import step_times
from common.runtime.verbs.assemble import assemble


@pytest.fixture
def run(toy_config, tmp_path):
    return assemble(toy_config(tmp_path / "run"), training=False, measuring=True)


def test_medians_of_forward_and_backward_without_the_warm_up(run, monkeypatch):
    """A fake clock: forward 2, backward 3 seconds a step; the first step, ten times as slow, does not count."""
    clock, calls = [0.0], []

    def tick():
        calls.append(None)
        step, part = divmod(len(calls) - 1, 3)
        clock[0] += (0, 2, 3)[part] * (10 if step == 0 else 1)
        return clock[0]

    monkeypatch.setattr(timing.time, "perf_counter", tick)
    assert step_times(run.module, run.data, 3) == {"forward_s": 2.0, "backward_s": 3.0, "step_s": 5.0}
    assert len(calls) == 4 * 3


def test_nothing_is_left_behind(run):
    module = run.module
    module.eval()
    module.net.read.train()
    module.net.read.weight.grad = torch.ones_like(module.net.read.weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    times = step_times(module, run.data, 2)
    assert torch.equal(torch.rand(1), expected), "the random stream stands where it stood"
    assert all(seconds > 0 for seconds in times.values())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in module.parameters())
    assert not module.training and not module.net.drop.training and module.net.read.training
    assert run.data.was_set_up == ["fit"]


def test_the_steps_were_real_ones(run):
    """They run in training mode: the toy network counts those calls, in a buffer that is put back."""
    seen = []
    run.module.net.register_forward_pre_hook(lambda *_: None)
    inner = run.module.training_step

    def spy(batch, index):
        seen.append((run.module.training, torch.is_grad_enabled(), len(batch["x"])))
        return inner(batch, index)

    run.module.training_step = spy
    with torch.no_grad():
        step_times(run.module.eval(), run.data, 2)
    assert seen == [(True, True, 16)] * 3
