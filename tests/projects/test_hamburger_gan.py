"""HamGAN end to end: one step of each player by hand, who moves whom, exact restart, averages and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from common.deq.layers import reset
from common.diffusion.sample import Direct, ImageNoise
from common.errors import UserError
from common.metrics.images import to_uint8
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.module import to_device
from common.runtime.training.seeding import Draws, seed_step
from common.runtime.training.weights import network_tensors
from common.runtime.verbs import fit, sample
from common.runtime.verbs.assemble import assemble
from common.runtime.verbs.plan import fake_training_step
from common.weights.export import load
from projects.hamburger.gan import frozen

SMALL = (
    "project.net.g_width=8", "project.net.d_width=8", "project.net.z_dim=6", "project.net.g_ham.rank=3",
    "project.net.d_ham.rank=3", "data.batch_size=12", "ema.profiles.ema.decay=0.7",
)  # fmt: skip


@pytest.fixture
def small(composed):
    """small(folder, *overrides) -> configuration of a small run of two steps."""

    def build(folder: Path, *overrides: str):
        return composed("hamburger_gan_tiny", folder, *SMALL, *overrides)

    return build


def newest(folder: Path) -> dict:
    return torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)


def weights(state: dict, part: str) -> dict:
    return {k: v for k, v in state["state_dict"].items() if f"net.{part}." in k and ("scale" in k or "original" in k)}


def same(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[name], b[name]) for name in a)


def test_two_steps_by_hand(small, tmp_path):
    """The trainer against the plain statement: D on real and fake, then G against the moved D; beta1 = 0."""
    fit.fit_task(small(tmp_path / "run"))
    run = assemble(small(tmp_path / "hand"), training=True, measuring=False)
    net, module = run.module.net.train(), run.module
    run.data.setup("fit")
    d, g = net.discriminator, net.generator
    d_adam = torch.optim.Adam(d.parameters(), lr=run.cfg.project.d_optimizer.lr, betas=(0.0, 0.999))
    g_adam = torch.optim.Adam(g.parameters(), lr=run.cfg.project.optimizer.lr, betas=(0.0, 0.999))
    for step, batch in zip(range(2), run.data.train_dataloader(), strict=False):
        batch = to_device(batch, run.data, "cpu")
        seed_step(0, step, 0)
        draws = Draws(seed=0, step=step)
        pick = lambda n, generator: torch.randint(10, (n,), generator=generator)
        hot = lambda labels: torch.nn.functional.one_hot(labels, 10).float()
        reset(net)
        wanted = hot(draws.apply("label_d", pick, 12))
        with torch.no_grad():
            fake = g(draws.normal("z_d", torch.empty(12, 6)), wanted)
        logits = d(torch.cat([batch["image"], fake]), torch.cat([hot(batch["label"]), wanted]))
        loss = (1 - logits[:12]).clamp(min=0).mean() + (1 + logits[12:]).clamp(min=0).mean()
        d_adam.zero_grad()
        loss.backward()
        d_adam.step()
        wanted = hot(draws.apply("label_g", pick, 12))
        with frozen(d):
            loss = -d(g(draws.normal("z_g", torch.empty(12, 6)), wanted), wanted).mean()
        g_adam.zero_grad()
        loss.backward()
        g_adam.step()
    trained = newest(tmp_path / "run")["state_dict"]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=0, msg=name)
    assert newest(tmp_path / "run")["global_step"] == 2  # not four


def test_each_optimiser_moves_its_own_player(small, tmp_path):
    start = assemble(small(tmp_path / "start"), training=True, measuring=False).module.state_dict()
    start = {"state_dict": start}
    for still, moves, override in (
        ("generator", "discriminator", "project.optimizer.lr=0.0"),
        ("discriminator", "generator", "project.d_optimizer.lr=0.0"),
    ):
        fit.fit_task(small(tmp_path / still, override))
        end = newest(tmp_path / still)
        assert same(weights(start, still), weights(end, still))
        assert not any(torch.equal(v, weights(end, moves)[k]) for k, v in weights(start, moves).items()
                       if not k.startswith(f"net.{moves}.context") and "shift" not in k)  # fmt: skip


def test_gradients_stay_with_their_loss(small, tmp_path):
    module = assemble(small(tmp_path / "run"), training=True, measuring=False).module.train()
    batch = {"image": torch.randn(6, 1, 8, 8).tanh(), "label": torch.arange(6)}
    module.discriminator_loss(batch).backward()
    assert all(p.grad is None for p in module.net.generator.parameters())
    assert all(p.grad is not None for p in module.net.discriminator.parameters())
    module.zero_grad()
    with frozen(module.net.discriminator):
        loss = module.generator_loss(batch)
    loss.backward()
    assert all(p.grad is not None for p in module.net.generator.parameters())
    assert all(p.grad is None and p.requires_grad for p in module.net.discriminator.parameters())


def test_labels_of_the_batch_reach_the_projection(small, tmp_path):
    """The embedding has a gradient in the columns of the classes that were shown or drawn, and in no other."""
    module = assemble(small(tmp_path / "run"), training=True, measuring=False).module.train()
    batch = {"image": torch.randn(6, 1, 8, 8).tanh(), "label": torch.full((6,), 7)}
    classes, last = module.net.discriminator.classes, module.net.discriminator.last
    # spectral norms below 1, which the normalisation leaves alone, and logits inside the margin
    classes.weight, last.weight = 1e-4 * classes.weight, 1e-4 * last.weight
    module.discriminator_loss(batch).backward()
    drawn = module.draws().apply("label_d", lambda n, generator: torch.randint(10, (n,), generator=generator), 6)
    grads = classes.parametrizations.weight.original.grad
    assert {c for c in range(10) if grads[:, c].any()} == {7, *drawn.tolist()} != set(range(10))


class Watch(Callback):
    """What a run did, in order."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.seen.append("backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parts = [n for n in ("generator", "discriminator")
                 if mine == {id(p) for p in getattr(pl_module.net, n).parameters()}]  # fmt: skip
        self.seen.append(f"{parts[0]} at {trainer.global_step}")


def test_order_and_counting_of_steps(small, tmp_path, monkeypatch):
    watch, build = Watch(), fit.build_trainer

    def watched(run):
        trainer, averages = build(run)
        trainer.callbacks.insert(0, watch)
        return trainer, averages

    monkeypatch.setattr(fit, "build_trainer", watched)
    fit.fit_task(small(tmp_path / "run"))
    assert watch.seen == [
        "backward", "discriminator at 0", "backward", "generator at 0",
        "backward", "discriminator at 1", "backward", "generator at 1",
    ]  # fmt: skip
    state = newest(tmp_path / "run")
    assert len(state["optimizer_states"]) == 2
    assert all(k.startswith("net.generator.") for k in state["averages"]["ema"])


WATCHED = (
    "evaluate=digits", "evaluate.extractors.digits=null", "evaluate.samples=20", "evaluate.batch_size=10",
    "evaluate.curve_samples=10", "evaluate.every_n_steps=3", "evaluate.floor=false", "evaluate.at_start=false",
)  # fmt: skip


def test_ten_steps_are_six_and_four(small, tmp_path):
    fit.fit_task(small(tmp_path / "whole", *WATCHED, "trainer.max_steps=10"))
    fit.fit_task(small(tmp_path / "parts", *WATCHED, "trainer.max_steps=6"))
    fit.fit_task(small(tmp_path / "parts", *WATCHED, "trainer.max_steps=10"))
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert a["global_step"] == b["global_step"] == 10
    for key in ("state_dict", "averages", "optimizer_states"):
        for name, value in flat(a[key]).items():
            assert torch.equal(value, flat(b[key])[name]), f"{key} {name}"
    assert a["state_dict"].keys() == b["state_dict"].keys()


def flat(tree, prefix="") -> dict[str, torch.Tensor]:
    if torch.is_tensor(tree):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}").items()}


def test_images_come_from_the_averaged_generator(small, tmp_path, capsys):
    cfg = small(tmp_path / "run", "sample.samples=9", "sample.seed=3", "evaluate.average=ema")
    fit.fit_task(cfg)
    module = assemble(cfg, training=False, measuring=False).module
    noise = ImageNoise(seed=3, indices=range(9), shape=(6,))
    labels = torch.nn.functional.one_hot(noise.labels(10), 10).float()
    images = {}
    for average in ("raw", "ema"):
        module.net.load_state_dict(network_tensors(list_checkpoints(tmp_path / "run/checkpoints")[0], average))
        made = module.generate(torch.arange(9), sampler=Direct(), seed=3)
        images[average] = made
        with torch.no_grad():
            assert torch.equal(made, module.net.eval()(noise.z, labels))
    assert not torch.allclose(images["raw"], images["ema"])
    loaded = load(tmp_path / "run/export")
    torch.testing.assert_close(loaded.sample(9, seed=3), images["ema"])
    sample.sample_task(cfg)
    assert "(ema, step 2)" in capsys.readouterr().out
    stored = np.load(next((tmp_path / "run/samples").glob("*/samples.npz")))["images"]
    assert torch.equal(torch.from_numpy(stored).permute(0, 3, 1, 2), to_uint8(images["ema"]))


@pytest.mark.parametrize("context", ["attention", "none"])
def test_other_contexts_by_one_word(small, tmp_path, context):
    fit.fit_task(small(tmp_path / "run", f"project.net.context={context}"))
    names = [n for n in newest(tmp_path / "run")["state_dict"] if ".context." in n]
    assert bool(names) == (context == "attention")


def test_unconditional(small, tmp_path):
    fit.fit_task(small(tmp_path / "run", "project.net.label_dim=0"))
    assert not any("classes" in n for n in newest(tmp_path / "run")["state_dict"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=1"),
        (["trainer.gradient_clip_val=1.0"], "trainer.gradient_clip_val=null"),
        (["project.d_optimizer.lr=-1.0"], "project.d_optimizer cannot be built"),
        (["trainer=ddp", "trainer.accelerator=cpu"], "find_unused_parameters=true"),
    ],
)
def test_refusals(small, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        fit.fit_task(small(tmp_path / "run", *overrides))


def test_plan_counts_both_players(small, tmp_path):
    module, flops, kept = fake_training_step(small(tmp_path / "run"), images=2)
    assert flops > 0 and kept > 0
    assert all(p.grad is not None for p in module.net.parameters())
