"""pMF end to end: predicted images, clipped alike, noise of another scale, perceptual terms at low noise only."""

from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from common.diffusion.sample import AverageVelocitySteps, ImageNoise
from common.diffusion.time import LogitNormal, MaskThenOrder
from common.errors import UserError
from common.losses.meanflow import ImprovedMeanFlowLoss
from common.runtime.cli.launch import register_resolvers
from common.runtime.training.context import RunContext
from common.runtime.verbs.assemble import assemble
from common.runtime.verbs.export import write_export
from common.weights.export import load
from projects.pmf.method import Perceptual
from projects.pmf.module import PixelMeanFlow
from projects.pmf.network import PixelMiT


def small() -> PixelMiT:
    torch.manual_seed(0)
    sizes = dict(img_resolution=8, in_channels=3, patch_size=4, bottleneck=8, width=16, depth=2, num_heads=2)
    net = PixelMiT(**sizes, head_depth=1, v_depth=1, label_dim=0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def module(net, *, noise_scale=1.0, perceptual=None) -> PixelMeanFlow:
    made = PixelMeanFlow(
        net=net, loss=ImprovedMeanFlowLoss(t_floor=0.05), label_drop=None, omega=None, interval=None,
        time=MaskThenOrder(base=LogitNormal(mean=0.8, std=0.8), equal=0.5), noise_scale=noise_scale,
        perceptual=perceptual, optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def batch(n: int) -> dict:
    image = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": image, "label": torch.zeros(n, dtype=torch.int64), "position": torch.arange(n)}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_one_step_sample_is_the_predicted_image(scale):
    """x = z_1 - u(z_1, 1, 0) with z_1 = scale e: the network's output itself."""
    net = small()
    made = module(net, noise_scale=scale)
    found = made.generate(torch.arange(2), sampler=AverageVelocitySteps(), seed=3)
    z = scale * ImageNoise(seed=3, indices=torch.arange(2), shape=(3, 8, 8)).z
    net.prediction = "u"  # then the head's output comes out as it is
    with torch.no_grad():
        torch.testing.assert_close(found, net(z, 1.0, 0.0), rtol=1e-4, atol=1e-5)


def test_the_noise_of_training_has_the_same_scale():
    made = module(small(), noise_scale=4.0)
    e = made.inputs(batch(6)).e
    assert torch.equal(e, 4.0 * made.draws().normal("eps", batch(6)["image"]))


class Distance(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, x):
        return self.factor * (image - x).abs().flatten(1).mean(1)


def test_perceptual_terms_act_at_low_noise_only_and_leave_their_networks_alone():
    made = Perceptual(
        distances={"a": Distance(), "b": Distance()}, weights={"a": 0.4, "b": 0.1}, t_below=0.5, crop=None
    )
    image, x = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.1, 0.49, 0.5, 0.9])
    total = made(image, x, t, lambda d: d / (d + 0.01).detach(), None)
    distance = 2 * (image - x).abs().flatten(1).mean(1)
    expected = 0.5 * distance / (distance + 0.01)
    torch.testing.assert_close(total, torch.where(t < 0.5, expected, 0.0))
    total.sum().backward()
    moved = image.grad.flatten(1).abs().sum(1)
    assert (moved[:2] > 0).all() and (moved[2:] == 0).all()
    assert not any(p.requires_grad for p in made.parameters())
    assert not made.train().distances["a"].training
    with pytest.raises(UserError, match=r"weights must name \['a'\], got \['c'\]"):
        Perceptual(distances={"a": Distance()}, weights={"c": 1.0})


def test_perceptual_terms_are_part_of_the_step():
    perceptual = Perceptual(distances={"a": Distance()}, weights={"a": 0.4}, t_below=1.0, crop=6)
    plain, more = module(small()).training_step(batch(6), 0), module(small(), perceptual=perceptual)
    loss = more.training_step(batch(6), 0)
    assert 0 < float((loss - plain).detach()) <= 0.4
    loss.backward()
    assert all(p.grad is not None for p in more.net.parameters())
    trained = [p for group in more.parameter_groups() for p in group["params"]]
    assert len(trained) == len(list(more.net.parameters()))  # frozen networks are not trained


def test_two_real_steps(two_steps, tmp_path):
    before, after, rows = two_steps("pmf_tiny", tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(float(row["train/squared_u"]) > 0 for row in rows)


# The published table: noise scale, P_mean, uniform share, beta, perceptual t, average for evaluation, omega, interval
PUBLISHED = {
    "256_b": (1, 0.8, 0.0, 1, 0.8, 2_000_000, 8.5, (0.1, 0.7), 3.12),
    "256_l": (1, 0.8, 0.0, 2, 0.8, 1_000_000, 7.0, (0.2, 0.7), 2.52),
    "256_h": (2, 0.0, 0.1, 1, 0.6, 1_000_000, 7.0, (0.2, 0.6), 2.22),
    "512_b": (2, 0.8, 0.0, 1, 0.8, 2_000_000, 6.5, (0.1, 0.7), 3.70),
    "512_l": (4, 0.0, 0.0, 1, 0.6, 2_000_000, 7.5, (0.2, 0.6), 2.75),
    "512_h": (4, 0.0, 0.1, 1, 0.6, 500_000, 5.5, (0.1, 0.6), 2.48),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_of_the_sheet(repo, name):
    """pmf.md, section 4, and the released configurations, read from the composed experiments."""
    scale, mean, uniform, beta, t_below, images, omega, interval, fid = PUBLISHED[name]
    register_resolvers()
    with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"+experiment=pmf_imagenet{name}", "run.experiment=any"])
    project, size = cfg.project, int(name[:3])
    assert (project.noise_scale, project.time.base.mean, project.time.base.std) == (scale, mean, 0.8)
    assert (project.time.uniform, project.time.equal, project.label_drop.p) == (uniform, 0.5, 0.1)
    assert (project.omega.beta, project.omega.s_max, project.interval.split) == (beta, 7, 0.5)
    loss = project.loss
    assert (loss.power, loss.eps, loss.t_floor, loss.head) == (1, 0.01, 0.05, "auxiliary")
    perceptual = project.perceptual
    assert (perceptual.t_below, perceptual.crop) == (t_below, 224)
    assert dict(perceptual.weights) == {"lpips": 0.4, "convnext": 0.1}
    optimizer = project.optimizer
    assert optimizer._target_ == "common.optim.muon.Muon" and optimizer.scale == "shape" and optimizer.debias
    assert (optimizer.lr, optimizer.momentum, list(optimizer.betas)) == (1e-3, 0.95, [0.9, 0.95])
    assert (optimizer.weight_decay, project.schedule.warmup) == (0, 0)
    assert (cfg.data.batch_size, cfg.data.source.resolution, cfg.trainer.max_steps) == (1024, size, 320 * 1251)
    assert (project.net.img_resolution, project.net.patch_size) == (size, size // 16)
    assert sorted(profile.images for profile in cfg.ema.profiles.values()) == [500_000, 1_000_000, 2_000_000]
    assert cfg.ema.profiles[cfg.evaluate.average].images == images
    assert {profile.ramp for profile in cfg.ema.profiles.values()} == {0.05}
    for sampler in (cfg.sample.sampler, cfg.evaluate.samplers.one_step):
        assert (sampler.steps, sampler.omega, (sampler.t_min, sampler.t_max)) == (1, omega, interval)
        assert sampler.beyond == (omega > 8)
    assert (cfg.evaluate.samples, cfg.published[0].value) == (50_000, fid)


def test_an_export_samples_as_its_run(composed, tmp_path):
    """Noise of the run's own scale, also without Hydra."""
    run = assemble(composed("pmf_tiny", tmp_path / "run", "project.noise_scale=2"), training=False, measuring=False)
    made = run.module.generate(torch.arange(3), sampler=AverageVelocitySteps(), seed=5)
    exported = load(write_export(run, step=0, average="raw"))
    assert exported.meta["noise_scale"] == 2 and exported.meta["guidance"] is None
    torch.testing.assert_close(exported.sample(3, seed=5, sampler=AverageVelocitySteps()), made.float())
