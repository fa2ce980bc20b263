"""Non-finite numbers stop the run before the weights are touched; signals end it at a step boundary."""

import math
import signal
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.guard import Interrupted, NonFiniteGuard, NonFiniteStop, StopOnSignal
from common.runtime.verbs import fit


def newest(folder) -> dict:
    return torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)


class Poison(Callback):
    """Makes one gradient element non-finite before step `step`; keeps the weights as they were then."""

    def __init__(self, step: int, value: float, name: str):
        self.step, self.value, self.name = step, value, name
        self.module = None

    def on_train_start(self, trainer, pl_module) -> None:
        self.module = pl_module

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step:
            self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            dict(pl_module.named_parameters())[self.name].grad.view(-1)[3] = self.value


class PoisonLoss(Callback):
    """Makes the images of step `step` infinite: the loss cannot be finite then."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            self.module = pl_module
            batch["image"].fill_(float("inf"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_stops_before_the_weights_and_names_the_tensor(value, composed, tmp_path, with_callbacks):
    poison = Poison(5, value, "net.model.layer_in.weight")
    with_callbacks(poison)
    with pytest.raises(NonFiniteStop) as stop:
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=9", "callbacks.checkpoints.every_n_steps=2"))
    text = str(stop.value)
    assert stop.value.exit_code == 3 and "\n" not in text
    assert "the gradient of net.model.layer_in.weight is not finite" in text and "Stopped at step 5" in text
    assert f"Last good checkpoint: {tmp_path / 'run/checkpoints/step-00000004.ckpt'}" in text
    assert "+debug=nonfinite" in text
    for name, parameter in poison.module.named_parameters():
        assert torch.equal(parameter, poison.before[name]), name
    assert newest(tmp_path / "run")["global_step"] == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_loss_is_named_as_such(accumulate, composed, tmp_path, with_callbacks):
    poison = PoisonLoss(0)
    with_callbacks(poison)
    with pytest.raises(NonFiniteStop, match=r"the loss is (nan|inf)\. No checkpoint had been written yet") as stop:
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=3", f"trainer.accumulate_grad_batches={accumulate}"))
    assert stop.value.exit_code == 3
    assert all(torch.equal(p, poison.before[n]) for n, p in poison.module.named_parameters())
    assert list_checkpoints(tmp_path / "run/checkpoints") == []


def test_clipping_does_not_hide_a_bad_gradient(composed, tmp_path, with_callbacks):
    with_callbacks(Poison(1, float("nan"), "net.model.layer_out.weight"))
    with pytest.raises(NonFiniteStop, match=r"net\.model\.layer_out\.weight"):
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=3", "trainer.gradient_clip_val=1.0"))


@pytest.mark.parametrize(("limit", "expected"), [(1e5, [0.0, 1e5, -1e5, 2.0]), (0.0, [0.0, 0.0, 0.0, 2.0])])
def test_a_number_replaces_bad_gradients_and_goes_on(limit, expected):
    """1e5 as in EDM's loop and ECT's branch main, 0 as in EDM2's and ECT's branch imgnet."""
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    optimizer, trainer = torch.optim.SGD([weight], lr=1.0), SimpleNamespace(precision="32-true", global_step=7)
    guard = NonFiniteGuard(replace=limit)
    with pytest.warns(UserWarning, match=r"Step 7 .*callbacks\.guard\.replace"):
        guard.on_before_optimizer_step(trainer, None, optimizer)
    assert weight.grad.tolist() == expected
    weight.grad[0] = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once
        guard.on_before_optimizer_step(trainer, None, optimizer)
    assert weight.grad[0] == limit


def test_a_replaced_gradient_lets_a_run_end(composed, tmp_path, with_callbacks):
    with_callbacks(Poison(1, float("nan"), "net.model.layer_in.weight"))
    with pytest.warns(UserWarning, match="not finite"):
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=3", "callbacks.guard.replace=0"))
    saved = newest(tmp_path / "run")
    assert saved["global_step"] == 3 and all(value.isfinite().all() for value in saved["state_dict"].values())


def test_the_guard_can_be_left_out(composed, tmp_path, with_callbacks):
    with_callbacks(Poison(1, float("nan"), "net.model.layer_in.weight"))
    fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=3", "callbacks.guard=null"))
    assert newest(tmp_path / "run")["global_step"] == 3


class Send(Callback):
    """Raises `signum` in this process after `micro` micro-batches."""

    def __init__(self, signum, micro: int):
        self.signum, self.micro, self.seen = signum, micro, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen += 1
        if self.seen == self.micro:
            signal.raise_signal(self.signum)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_at_the_step_with_a_checkpoint(signum, code, composed, tmp_path, with_callbacks):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with_callbacks(Send(signum, 3))
    with pytest.raises(Interrupted) as stop:
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=9"))
    assert stop.value.exit_code == code
    assert f"{signum.name} received: stopped after step 3" in str(stop.value)
    assert str(tmp_path / "run/checkpoints/step-00000003.ckpt") in str(stop.value)
    assert newest(tmp_path / "run")["global_step"] == 3
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before, "handlers are given back"


def test_inside_accumulation_the_step_is_finished_first(composed, tmp_path, with_callbacks):
    with_callbacks(Send(signal.SIGTERM, 3))  # the first half of step 2
    with pytest.raises(Interrupted, match="stopped after step 2"):
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=9", "trainer.accumulate_grad_batches=2"))
    assert newest(tmp_path / "run")["global_step"] == 2


def test_the_checkpoint_of_that_step_is_not_written_twice(composed, tmp_path, with_callbacks, monkeypatch):
    from common.runtime.training.checkpoint import SafeCheckpointIO

    written = []
    save = SafeCheckpointIO.save_checkpoint

    def counted(self, content, path, storage_options=None):
        written.append(path)
        save(self, content, path)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", counted)
    with_callbacks(Send(signal.SIGTERM, 4))
    with pytest.raises(Interrupted, match=r"step-00000004\.ckpt"):
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=9", "callbacks.checkpoints.every_n_steps=2"))
    assert [path.name for path in written] == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_without_checkpoints_it_says_so(composed, tmp_path, with_callbacks):
    with_callbacks(Send(signal.SIGTERM, 1))
    with pytest.raises(Interrupted, match="No checkpoint was written"):
        fit.fit_task(composed(tmp_path / "run", "trainer.max_steps=9", "callbacks.checkpoints=null"))


def test_a_second_signal_does_not_wait(monkeypatch):
    stop, raised = StopOnSignal(), []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop._receive(signal.SIGTERM, None)
        assert raised == [] and stop.received == signal.SIGTERM
        stop._receive(signal.SIGTERM, None)
        assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_leaves_the_signals_alone():
    class Stand:
        global_step = 0

    errors = []

    def work():
        try:
            stop = StopOnSignal()
            stop.on_train_start(Stand(), None)
            stop.teardown(Stand(), None, "fit")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
