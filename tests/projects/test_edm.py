"""EDM end to end: equation 8 through the module, its two inputs beside the image, and real steps on real data."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from common.data.images.augment import EdmAugment
from common.diffusion.precond import EDMPrecond
from common.diffusion.sample import Heun
from common.diffusion.time import LogNormal
from common.losses.denoising import DenoisingLoss
from common.runtime.training.context import RunContext
from common.weights.official import RELEASES
from projects.edm.module import Edm

SD = 0.5


def module(net: nn.Module, *, augment=None, loss_scaling=1.0, **loss) -> Edm:
    made = Edm(
        net=net, loss=DenoisingLoss(sigma_data=SD, **loss), time=LogNormal(mean=-1.2, std=1.2), augment=augment,
        loss_scaling=loss_scaling,
        optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def batch(n: int, classes: int = 3, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype) * SD
    return {"image": image, "label": torch.arange(n) % classes, "position": torch.arange(n)}


def test_loss_is_equation_8_with_the_modules_own_draws(spy):
    """lambda |D(y + sigma n; sigma) - y|^2 with D = c_skip x + c_out F(c_in x; ln(sigma)/4), written out."""
    raw, given = spy().double(), batch(6, dtype=torch.float64)
    made = module(EDMPrecond(model=raw, sigma_data=SD))
    got = made.training_step(given, 0)
    y, draws = given["image"], made.draws()
    sigma = draws.apply("sigma", made.time, 6).double().reshape(-1, 1, 1, 1)
    x = y + sigma * draws.normal("eps", y)
    total = sigma**2 + SD**2
    with torch.no_grad():
        raw_out = raw(x / total.sqrt(), sigma.flatten().log() / 4)
    denoised = SD**2 / total * x + sigma * SD / total.sqrt() * raw_out
    expected = (total / (sigma * SD) ** 2 * (denoised - y) ** 2).sum() / 6
    torch.testing.assert_close(got.detach(), expected, rtol=1e-12, atol=0)
    assert len(raw.calls) == 2 and raw.calls[0].training and raw.calls[0].x.shape == (6, 3, 4, 4)


def test_an_oracle_has_no_loss_and_a_fresh_network_about_one_per_pixel(spy):
    """Data N(0, sd^2): c_skip x alone is the exact denoiser, what it cannot know costs exactly 1, weighted."""
    raw = spy()
    nn.init.zeros_(raw.layer_out.weight)
    nn.init.zeros_(raw.layer_out.bias)
    made = module(EDMPrecond(model=raw, sigma_data=SD))
    per_pixel = made.training_step(batch(4000), 0) / (3 * 4 * 4)
    assert per_pixel.item() == pytest.approx(1, abs=0.02)

    class Oracle(nn.Module):  # all images are one image
        label_dim = 0

        def forward(self, x, sigma, class_labels=None, augment_labels=None, dropout_masks=None):
            return point.expand_as(x)

    given = batch(8)
    point = given["image"][:1]
    given["image"] = point.repeat(8, 1, 1, 1)
    assert module(Oracle()).training_step(given, 0).item() == 0


def test_the_gradient_reaches_every_weight_and_points_downhill(spy):
    made, given = module(EDMPrecond(model=spy(label_dim=3), sigma_data=SD)), batch(16)
    loss = made.training_step(given, 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    with torch.no_grad():
        for p in made.parameters():
            p -= 1e-6 * p.grad
    assert made.training_step(given, 0) < loss  # without a trainer the draws of both calls are those of step 0


def test_loss_scaling_stays_in_the_gradients(spy):
    """The authors multiply the loss and never divide the gradients: 100 with float16 on ImageNet-64."""
    grads = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        made = module(EDMPrecond(model=spy(label_dim=3), sigma_data=SD), loss_scaling=scale).double()
        made.training_step(batch(4, dtype=torch.float64), 0).backward()
        grads.append([p.grad for p in made.parameters()])
    for one, hundred in zip(*grads):
        torch.testing.assert_close(hundred, 100 * one, rtol=1e-12, atol=1e-12)


# Of the published runs: --ls, gradients' replacement for infinity, TF32, average that is exported.
RECIPES = {
    "edm_cifar10": (1.0, 1e5, False, "ema"),
    "edm_imagenet64": (100.0, 1e5, False, "ema"),
    "edm_imagenet64_edm2_s": (1.0, 0.0, False, "power_075"),
    "edm_imagenet64_edm2_m": (1.0, 0.0, False, "power_060"),
    "edm_imagenet64_edm2_l": (1.0, 0.0, False, "power_040"),
    "edm_imagenet64_edm2_xl": (1.0, 0.0, False, "power_040"),
}


@pytest.mark.parametrize("experiment", RECIPES)
def test_published_settings_are_the_authors(experiment, composed, tmp_path):
    cfg = composed(experiment, tmp_path)
    average = cfg.evaluate.average
    assert (cfg.project.loss_scaling, cfg.callbacks.guard.replace, cfg.speed.tf32, average) == RECIPES[experiment]
    if average != "ema":  # the file name of the release tells the width
        assert cfg.ema.profiles[average].std == pytest.approx(float(average.removeprefix("power_")) / 1000)
        size = experiment.removeprefix("edm_imagenet64_edm2_")
        assert RELEASES[f"edm2_imagenet64_{size}"].file.endswith(f"-0.{average.removeprefix('power_')}.pkl")


def test_class_labels_reach_the_network_one_hot(spy):
    raw = spy(label_dim=3)
    made = module(EDMPrecond(model=raw, sigma_data=SD))
    made.training_step(batch(5), 0)
    assert torch.equal(raw.calls[-1].class_labels, torch.eye(3)[[0, 1, 2, 0, 1]])
    made.generate(torch.arange(2), sampler=Heun(steps=2), seed=0, labels=torch.tensor([2, 0]))
    assert all(torch.equal(call.class_labels, torch.eye(3)[[2, 0]]) for call in raw.calls[1:])
    unconditional = spy()
    module(EDMPrecond(model=unconditional)).training_step(batch(5), 0)
    assert unconditional.calls[-1].class_labels is None


def test_augmented_images_and_their_labels_reach_the_network(spy):
    raw, given, augment = spy(augment_dim=9).double(), batch(64, dtype=torch.float64), EdmAugment(p=0.5)
    made = module(EDMPrecond(model=raw, sigma_data=SD), augment=augment)
    original = given["image"].clone()
    made.training_step(given, 0)
    draws = made.draws()
    images, labels = augment(original, draws.generator("augment"))
    assert torch.equal(raw.calls[-1].augment_labels, labels) and labels.shape == (64, 9)
    assert labels.abs().sum(0).min() > 0 and not torch.equal(images, original)
    sigma = draws.apply("sigma", made.time, 64).double().reshape(-1, 1, 1, 1)
    noisy = images + sigma * draws.normal("eps", images)
    torch.testing.assert_close(raw.calls[-1].x, noisy / (sigma**2 + SD**2).sqrt())
    assert torch.equal(given["image"], original)  # the batch belongs to the loader
    made.generate(torch.arange(2), sampler=Heun(steps=2), seed=0)
    assert all(call.augment_labels is None for call in raw.calls[1:])  # samples are of unaugmented images


def test_two_real_steps(two_steps, tmp_path):
    runs = [two_steps("edm_tiny", tmp_path / name, f"seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    before, after, _ = runs[0]
    assert before.keys() == after.keys()
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.endswith(("weight", "bias"))}
    losses = [[float(row["train/loss"]) for row in rows] for _, _, rows in runs]
    assert len(losses[0]) == 2 and losses[0] == losses[1] != losses[2]
    assert all(torch.equal(after[name], runs[1][1][name]) for name in after)
    assert losses[0][0] / 64 == pytest.approx(1, abs=0.3)  # 8x8 pixels, 256 of them, before the first update


SMALL_UNET = (
    "project.net.model.model_channels=16", "project.net.model.num_blocks=1", "project.net.model.channel_mult=[1,2]",
    "data.batch_size=8", "data.source.batches=[1]",
)  # fmt: skip


def test_two_steps_on_real_cifar10(two_steps, data_root, tmp_path):
    before, after, rows = two_steps("edm_cifar10", tmp_path / "run", *SMALL_UNET, f"data.root={data_root}")
    assert before["model.map_augment.weight"].shape[1] == 9
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == 2 and all(math.isfinite(value) for value in losses)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(torch.equal(before[name], after[name]) == name.endswith("resample_filter") for name in after)
    assert losses[0] / (3 * 32 * 32) == pytest.approx(1, abs=0.7)
