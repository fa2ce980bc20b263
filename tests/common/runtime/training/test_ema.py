"""Several averages at once, each its closed form; one chosen at test time."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from common.diffusion.ema import ConstantDecay, HalfLife, PowerFunction, gamma_of_std
from common.errors import UserError
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.context import RunContext
from common.runtime.training.ema import WeightAverages, averaged, choose_average
from common.runtime.verbs import fit
from common.runtime.verbs.export import export_task

NAME = "net.model.layer_in.weight"


class KeepWeights(Callback):
    """The weights before training and after each step."""

    def on_fit_start(self, trainer, pl_module) -> None:
        self.history = [dict(pl_module.named_parameters())[NAME].detach().clone()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.history.append(dict(pl_module.named_parameters())[NAME].detach().clone())


def test_each_average_is_its_formula(composed, tmp_path, with_callbacks):
    keep = KeepWeights()
    with_callbacks(keep)
    fit.fit_task(composed(
        tmp_path / "run", "trainer.max_steps=6", "ema.profiles.ema.decay=0.7",
        "+ema.profiles.half={_target_: common.diffusion.ema.HalfLife, images: 128, ramp: null}",
        "+ema.profiles.power={_target_: common.diffusion.ema.PowerFunction, std: 0.1}",
    ))  # fmt: skip
    stored = torch.load(list_checkpoints(tmp_path / "run/checkpoints")[0], weights_only=True)["averages"]
    assert list(stored) == ["ema", "half", "power"]
    weights = [w.double() for w in keep.history]
    gamma = gamma_of_std(0.1)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(0.1)  # EDM2 equation 123
    decays = {
        "ema": lambda n: 0.7,
        "half": lambda n: 0.5 ** (64 / 128),  # 64 images a step, half-life 128
        "power": lambda n: (1 - 1 / n) ** (gamma + 1),
    }
    for name, decay in decays.items():
        average = weights[0]
        for n in range(1, 7):
            average = decay(n) * average + (1 - decay(n)) * weights[n]
        torch.testing.assert_close(stored[name][NAME].double(), average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(stored["ema"][NAME], stored["power"][NAME])


def test_averages_of_16_bit_weights_are_kept_in_32_bits():
    """decay 0.999 from 1 towards 2: 1 + 1 - 0.999^100; in bfloat16, steps of 1/128 around 1, it would stay at 1."""
    module = torch.nn.Linear(1, 1, bias=False).bfloat16()
    module.context = RunContext(samples_per_step=1)
    averages = WeightAverages(profiles={"ema": ConstantDecay(decay=0.999)})
    trainer = SimpleNamespace(global_step=0)
    with torch.no_grad():
        module.weight.fill_(1.0)
        averages.on_fit_start(trainer, module)
        module.weight.fill_(2.0)
    for trainer.global_step in range(1, 101):
        averages.on_train_batch_end(trainer, module, None, None, 0)
    average = averages.averages["ema"]["weight"]
    assert average.dtype == torch.float32 and float(average) == pytest.approx(2 - 0.999**100, rel=1e-5)
    with averaged(module, averages.averages["ema"]):
        assert module.weight.dtype == torch.bfloat16


def test_every_k_steps_uses_k_steps_of_images(composed, tmp_path, with_callbacks):
    keep = KeepWeights()
    with_callbacks(keep)
    fit.fit_task(composed(
        tmp_path / "run", "trainer.max_steps=5", "ema=halflife", "ema.every=2", "~ema.profiles.ema.decay",
        "ema.profiles.ema.images=128", "ema.profiles.ema.ramp=null",
    ))  # fmt: skip
    stored = torch.load(list_checkpoints(tmp_path / "run/checkpoints")[0], weights_only=True)["averages"]["ema"][NAME]
    average = keep.history[0]
    for n in (2, 4):
        average = 0.5 * average + 0.5 * keep.history[n]  # 128 images since the last update, half-life 128
    torch.testing.assert_close(stored, average, rtol=1e-5, atol=1e-6)


def test_the_body_sees_the_average_and_the_weights_come_back():
    module = torch.nn.Linear(2, 2)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    storage = module.weight.data_ptr()
    average = {n: torch.zeros_like(p) for n, p in before.items()}
    with averaged(module, average):
        assert not module(torch.ones(1, 2)).any()
    assert torch.equal(module.weight, before["weight"]) and module.weight.data_ptr() == storage
    with pytest.raises(RuntimeError), averaged(module, average):
        raise RuntimeError
    assert torch.equal(module.weight, before["weight"]) and torch.equal(module.bias, before["bias"])
    with averaged(module, None) as same:
        assert same is module


def test_an_unknown_name_gives_the_nearest():
    available = {"ema": {"w": 1}, "power_050": {"w": 2}}
    assert choose_average(available, "power_050") == {"w": 2} and choose_average(available, "raw") is None
    with pytest.raises(UserError, match=r"'power_05' is not in this run. Closest: power_050. .*one of: raw, ema"):
        choose_average(available, "power_05")


@pytest.mark.parametrize("average", ["raw", "ema", "half", "power"])
def test_the_average_is_chosen_after_training(average, trained, composed, tmp_path, capsys):
    """`evaluate.average=...` decides what is exported and measured, without training again."""
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    export_task(composed(tmp_path / "out", "task=export", f"resume={checkpoint}", f"evaluate.average={average}"))
    exported = load_file(tmp_path / "out/export/model.safetensors")
    content = torch.load(checkpoint, weights_only=True)
    expected = content["state_dict"] if average == "raw" else content["averages"][average]
    assert torch.equal(exported[NAME.removeprefix("net.")], expected[NAME])
    assert f"exported {average} weights" in capsys.readouterr().out


def test_an_unknown_average_at_test_time(trained, composed, tmp_path):
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    with pytest.raises(UserError, match="Closest: power"):
        export_task(composed(tmp_path / "out", f"resume={checkpoint}", "evaluate.average=powr"))


def test_a_wrong_average_is_refused_before_training(composed, tmp_path):
    for section in ("evaluate", "sample"):
        with pytest.raises(UserError, match=r"'emaa' is not in this run. Closest: ema"):
            fit.fit_task(composed(tmp_path / "run", f"{section}.average=emaa", "trainer.max_steps=2"))
    assert not (tmp_path / "run/metrics.csv").exists()


def test_profiles_are_checked():
    with pytest.raises(UserError, match=r"ema.every must be >= 1, got 0"):
        WeightAverages(profiles={}, every=0)
    with pytest.raises(UserError, match=r"ema.profiles.x is no average but \{'decay': 0.9\}"):
        WeightAverages(profiles={"x": {"decay": 0.9}})
    kept = WeightAverages(profiles={"a": ConstantDecay(decay=0.9), "b": None, "c": HalfLife(), "d": PowerFunction()})
    assert list(kept.profiles) == ["a", "c", "d"]
