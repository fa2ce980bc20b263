"""DEQ-INR: the measure, where gradients go, fixed-point reuse and its restart, what is drawn and written."""

import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from common.errors import UserError
from common.runtime.training.checkpoint import latest_complete
from common.runtime.verbs import fit
from projects.torchdeq.inr import ExplicitInr, Inr
from projects.torchdeq.inr_show import draw, pixels, psnr, write_gif, write_wav
from projects.torchdeq.signal_data import SignalDataModule
from projects.torchdeq.signals import Photograph, Signal

SMALL = (
    "data.source.size=[12,16]", "data.batch_size=192", "project.net.width=24", "evaluate=split",
    "evaluate.average=raw",
)  # fmt: skip


def module_of(composed, tmp_path, *overrides, experiment="torchdeq_inr_tiny") -> Inr | ExplicitInr:
    torch.manual_seed(0)
    cfg = composed(experiment, tmp_path / "run", *SMALL, *overrides)
    return instantiate(cfg.project, _convert_="all")


def small_batch(count: int = 192) -> dict:
    data = SignalDataModule(source=Photograph(picture="coffee", size=(12, 16)), batch_size=count, shuffle=False)
    return next(iter(data.train_dataloader()))


class Grey(torch.nn.Module):
    """A network that answers the same value everywhere."""

    in_features, out_features = 2, 1

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x.new_full((len(x), 1), self.value)


# The measure ----------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_pixels():
    """0.2 of [-1, 1] is 0.1 of the pixel range: 20 dB; what leaves the range is clamped as pixels are."""
    original = torch.zeros(4, 4, 1)
    assert psnr(original + 0.2, original) == pytest.approx(20.0, abs=1e-5)
    assert psnr(original + 9.0, original + 1.0) == pytest.approx(200.0)
    a, b = torch.rand(8, 9, 3) * 2 - 1, torch.rand(8, 9, 3) * 2 - 1
    in_pixels = 10 * np.log10(255**2 / ((((a - b) * 127.5) ** 2).mean().item()))
    assert psnr(a, b) == pytest.approx(in_pixels, abs=1e-4)


def test_metrics_add_up_over_batches():
    module = ExplicitInr(net=Grey(0.2), optimizer=torch.optim.Adam, schedule=None)
    sums = [
        module.evaluation_step({"coords": torch.zeros(n, 2), "value": torch.full((n, 1), value)})["mse"]
        for n, value in ((3, 0.0), (1, 0.6))
    ]
    assert sum(count.item() for _, count in sums) == 4
    mse = sum(total.item() for total, _ in sums) / 4
    assert mse == pytest.approx((3 * 0.01 + 0.04) / 4)
    assert module.finalise({"mse": mse})["psnr"] == pytest.approx(-10 * np.log10(mse))
    assert next(iter(module.finalise({"mse": mse}))) == "mse", "a sweep minimises the first"


def test_other_dimensions_are_refused_instead_of_broadcast(composed, tmp_path):
    module = module_of(composed, tmp_path)
    batch = small_batch()
    with pytest.raises(UserError, match=r"Set project\.net\.out_features=1, not 3"):
        module.training_step({**batch, "value": batch["value"][:, :1]}, 0)
    with pytest.raises(UserError, match=r"Set project\.net\.in_features=1, not 2"):
        module.evaluation_step({**batch, "coords": batch["coords"][:, :1]})


# Training -------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_squared_error_at_the_equilibrium_and_reaches_every_parameter(composed, tmp_path):
    module, batch = module_of(composed, tmp_path, "project.net.deq.solver.tol=1e-6").train(), small_batch()
    loss = module.training_step(batch, 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.net.parameters())
    module.eval()
    with torch.no_grad():
        expected = (module.net(batch["coords"]) - batch["value"]).square().mean()
        equilibrium = module.net.states(batch["coords"])[-1]
        step = module.net.cell(equilibrium, *module.net.filter(batch["coords"]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (step - equilibrium).norm(dim=1).max() < 1e-5


def test_video_recipe_weighs_two_states(composed, tmp_path):
    cfg = composed("torchdeq_inr_video", tmp_path / "run", "project.net.width=16")
    module = instantiate(cfg.project, _convert_="all").train()
    torch.manual_seed(0)
    batch = {"coords": torch.rand(8, 3) * 2 - 1, "value": torch.rand(8, 3), "index": torch.arange(8)}
    first, last = (module.criterion(output, batch) for output in module.outputs(batch))
    assert module.training_step(batch, 0).item() == pytest.approx((0.8 * first + last).item(), rel=1e-5)
    assert cfg.trainer.gradient_clip_val == 0.1 and cfg.trainer.gradient_clip_algorithm == "value"


class FakeTrainer(SimpleNamespace):
    """As much of a trainer as `outputs` asks for."""


def in_a_run(module, points: int):
    """The module as inside a fit with so many training points; logging goes nowhere."""
    data = SimpleNamespace(points=lambda split: (torch.zeros(points, 2), None))
    module._trainer = FakeTrainer(datamodule=data, world_size=1)
    module.log = lambda *args, **options: None
    return module.train()


def test_reuse_goes_on_from_the_last_state_of_the_same_points(composed, tmp_path):
    module = in_a_run(module_of(composed, tmp_path, "project.reuse_steps=0"), 192)
    whole = small_batch()
    part = {key: value[50:60] for key, value in whole.items()}
    module.outputs(whole)
    before, stored = module.net.deq.solver, module.state.clone()
    made = module.outputs(part)[-1]
    with torch.no_grad():
        z, u = stored[50:60], module.net.filter(part["coords"])
        for _ in range(3):  # the gradient steps alone
            z = module.net.cell(z, *u)
        assert torch.allclose(made, module.net.head(z), atol=1e-6)
    assert torch.allclose(module.state[50:60], z, atol=1e-6), "the state after the gradient steps is kept"
    assert torch.equal(module.state[:50], stored[:50]) and torch.equal(module.state[60:], stored[60:])
    assert not module.state.requires_grad and module.net.deq.solver is before


def test_reused_states_need_fewer_steps(composed, tmp_path):
    module = in_a_run(module_of(composed, tmp_path, "project.reuse_steps=null"), 192)
    batch = small_batch()
    module.outputs(batch)
    cold = module.net.deq.solution.evaluations.float().mean()
    module.outputs(batch)
    assert module.net.deq.solution.evaluations.float().mean() < 0.4 * cold
    module.eval()
    with torch.no_grad():
        module.outputs(batch)
    assert module.net.deq.solution.evaluations.float().mean() >= 0.9 * cold, "evaluation starts at zero"


def test_a_stopped_run_goes_on_with_the_same_states(composed, tmp_path):
    """3 + 3 steps end with the bits of 6: the states of the points travel in the checkpoint."""
    weights = {}
    for name, stops in (("straight", (6,)), ("halves", (3, 6))):
        for stop in stops:
            subsets = ("data.shuffle=true", "data.batch_size=80", "project.reuse=true")
            fit.fit_task(composed("torchdeq_inr_tiny", tmp_path / name, *SMALL, *subsets, f"trainer.max_steps={stop}"))
        stored = torch.load(latest_complete(tmp_path / name / "checkpoints"), weights_only=True)
        weights[name] = {**stored["state_dict"], "state": stored["inr_state"]}
    assert weights["straight"]["state"].shape == (192, 24)
    for key, value in weights["straight"].items():
        assert torch.equal(value, weights["halves"][key]), key


@pytest.mark.parametrize("experiment", ["torchdeq_inr_tiny", "torchdeq_inr_tiny_siren"])
def test_two_steps_change_weights_and_stay_finite(two_steps, tmp_path, experiment):
    before, after, rows = two_steps(experiment, tmp_path / "run", *SMALL)
    assert len(rows) == 2 and all(np.isfinite(float(row["train/loss"])) for row in rows)
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert set(changed) == set(before)


def test_a_photograph_is_learnt(composed, tmp_path):
    """120 steps reach 30 dB on 192 pixels; the mean colour alone has 14."""
    overrides = ("project.net.width=64", "project.net.scale=20")
    module, batch = in_a_run(module_of(composed, tmp_path, *overrides), 192), small_batch()
    optimizer = module.make_optimizer(module.parameters())
    for _ in range(120):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        total, count = module.evaluation_step(batch)["mse"]
    assert module.finalise({"mse": (total / count).item()})["psnr"] > 30
    mean = batch["value"].mean(0).expand_as(batch["value"])
    assert psnr(mean, batch["value"]) < 15


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("project.reuse_steps=-1",), r"project\.reuse_steps must be a whole number >= 0"),
        (("project.reuse_steps=1", "project.net.deq.states=2"), r"Set project\.reuse_steps=null"),
        (("net@project.net=inr_mfn",), r"Set it to false"),
    ],
)
def test_settings_that_exclude_each_other_are_one_sentence(composed, tmp_path, overrides, message):
    with pytest.raises(Exception, match=message):
        module_of(composed, tmp_path, *overrides)


# What is shown --------------------------------------------------------------------------------------------------------


def signal_of(kind: str) -> tuple[Signal, torch.Tensor]:
    shape = {"image": (10, 14, 3), "audio": (400, 1), "video": (5, 8, 6, 3)}[kind]
    values = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    return Signal(kind, values, {"image": 0.0, "audio": 8000.0, "video": 10.0}[kind]), values.flip(0)


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_every_kind_has_a_picture(tmp_path, kind):
    signal, values = signal_of(kind)
    picture = np.asarray(Image.open(draw(signal, values, tmp_path / "new" / "a.png")).convert("RGB"))
    assert picture.shape[0] > 100 and picture.shape[1] > 200 and picture.std() > 10
    other = np.asarray(Image.open(draw(signal, signal.values, tmp_path / "b.png")).convert("RGB"))
    assert not np.array_equal(picture, other), "the reconstruction is in the picture"


def test_what_is_written_is_what_was_reconstructed(tmp_path):
    signal, values = signal_of("audio")
    with wave.open(str(write_wav(tmp_path / "a.wav", values, signal.rate)), "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
        samples = np.frombuffer(file.readframes(400), "<i2") / 32767
    assert np.abs(samples - values[:, 0].numpy()).max() < 1e-4
    signal, values = signal_of("video")
    with Image.open(write_gif(tmp_path / "a.gif", signal, values)) as film:
        assert film.n_frames == 5 and film.size == (12, 8) and film.info["duration"] == 100


def test_pixels_round_and_clamp():
    assert pixels(torch.tensor([[-1.0], [0.0], [1.0], [7.0]])).tolist() == [0, 128, 255, 255]


def test_show_reconstructs_the_whole_grid_in_order(tmp_path):
    class Coordinates(Grey):
        def forward(self, x):
            return x[:, :1]

    module = ExplicitInr(net=Coordinates(0.0), optimizer=torch.optim.Adam, schedule=None)
    signal = Signal("image", torch.zeros(6, 4, 1))
    data = SimpleNamespace(signal=signal)
    values = module.reconstruct(signal)
    assert torch.allclose(values[:, 0, 0], torch.linspace(-1, 1, 6)) and torch.equal(values[:, 0], values[:, 3])
    assert [path.name for path in module.show(data, tmp_path, samples=1, seed=0)] == ["reconstruction.png"]
    assert module.preview(data, tmp_path / "step-00000004", samples=1, seed=0)[0].name == "step-00000004.png"
