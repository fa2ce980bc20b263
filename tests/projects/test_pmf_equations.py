"""pMF's module on a network of images whose derivative is written out by hand: the clip, perceptual terms, ratio 0."""

from functools import partial

import pytest
import torch
from torch import nn

from common.diffusion.sample import AverageVelocitySteps
from common.diffusion.time import GuidanceInterval, LabelDrop, LogitNormal, MaskThenOrder, PowerOmega
from common.errors import UserError
from common.losses.meanflow import ImprovedMeanFlowLoss
from common.runtime.training.context import RunContext
from projects.pmf.method import Perceptual
from projects.pmf.module import PixelMeanFlow

FLOOR = 0.05
TIMES = MaskThenOrder(base=LogitNormal(mean=0.0, std=1.0), equal=0.5, rows="spread")


def wide(t):
    return t.reshape(-1, 1, 1, 1)


class Images(nn.Module):
    """x = a z + k + d . class, u = (z - x) / max(t, FLOOR): along (v, 1, 0) du/dt = ((1 - a) v - [t > FLOOR] u) / t."""

    img_channels, img_resolution = 2, 4

    def __init__(self, label_dim: int = 3, a: float = 0.3, k: float = 0.1):
        super().__init__()
        self.label_dim = label_dim
        self.a, self.k = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, k))
        self.d = nn.Parameter(torch.linspace(-1, 1, label_dim, dtype=torch.float64))
        self.calls = []

    def image(self, z, class_labels):
        return self.a * z + self.k + (0 if class_labels is None else wide(class_labels.to(z.dtype) @ self.d))

    def forward(self, z, t, r, class_labels=None, omega=None, t_min=None, t_max=None):
        self.calls.append({"z": z.detach(), "t": t, "r": r, "labels": class_labels, "omega": omega})
        return (z - self.image(z, class_labels)) / wide(t.clamp(min=FLOOR))


def module(
    net, *, time=TIMES, omega=None, interval=None, noise_scale=1.0, perceptual=None, label_drop=None, **loss
) -> PixelMeanFlow:
    loss = {"head": "boundary", "power": 0.0, "t_floor": FLOOR, **loss}
    made = PixelMeanFlow(
        net=net, loss=ImprovedMeanFlowLoss(**loss), time=time, omega=omega, interval=interval, noise_scale=noise_scale,
        perceptual=perceptual, label_drop=label_drop, optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def batch(n: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
    return {"image": image, "label": torch.arange(n) % 3, "position": torch.arange(n)}


def drawn(made, images):
    """The module's own t, r, z and e, written out."""
    draws = made.draws()
    t, r = (
        draws.apply("t", lambda n, generator: torch.stack(made.time(n, generator), 1), len(images)).double().unbind(1)
    )
    e = made.noise_scale * draws.normal("eps", images)
    return t, r, wide(1 - t) * images + wide(t) * e, e


def squared(x):
    return x.square().flatten(1).sum(1)


@pytest.mark.parametrize("noise_scale", [1.0, 4.0])
@pytest.mark.parametrize("mean", [0.0, -3.0])  # the second has times on both sides of the floor
def test_loss_is_that_of_velocities_made_of_images(mean, noise_scale):
    """V = u + (t - r) stop(du/dt) against (z - x) / max(t, .05); below the floor 1/max(t, .05) stands still."""
    net, given = Images(), batch(32)
    time = MaskThenOrder(base=LogitNormal(mean=mean, std=1.0), equal=0.5, rows="spread")
    made = module(net, time=time, noise_scale=noise_scale)
    loss = made.training_step(given, 0)
    t, r, z, e = drawn(made, given["image"])
    if mean < 0:
        assert 5 < (t < FLOOR).sum() < 27
    labels, floored = torch.eye(3)[given["label"]], wide(t.clamp(min=FLOOR))
    v = (z - given["image"]) / floored
    torch.testing.assert_close(v[t >= FLOOR], (e - given["image"])[t >= FLOOR])
    with torch.no_grad():
        own = net(z, t, t, labels)
        dudt = ((1 - net.a) * own - (wide(t) > FLOOR) * own) / floored
    expected = squared(net(z, t, r, labels) + wide(t - r) * dudt - v).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    ours, theirs = (torch.autograd.grad(k, list(net.parameters()), retain_graph=True) for k in (loss, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_oracle_of_one_image_has_no_loss_and_makes_it_in_one_step():
    net, given = Images(label_dim=0, a=0.0, k=0.25), batch()
    given["image"] = torch.full_like(given["image"], 0.25)
    made = module(net)
    assert made.training_step(given, 0) < 1e-20
    images = made.generate(torch.arange(3), sampler=AverageVelocitySteps(), seed=0)
    torch.testing.assert_close(images, torch.full_like(images, 0.25), rtol=0, atol=1e-6)


def test_with_ratio_0_it_is_flow_matching_of_velocities():
    net, given = Images(), batch()
    made = module(net, time=MaskThenOrder(base=LogitNormal(), equal=1.0))
    loss = made.training_step(given, 0)
    assert len(net.calls) == 1 and torch.equal(net.calls[0]["t"], net.calls[0]["r"])
    t, _, z, _ = drawn(made, given["image"])
    v = (z - given["image"]) / wide(t.clamp(min=FLOOR))
    assert torch.equal(loss, squared(net(z, t, t, torch.eye(3)[given["label"]]) - v).mean())


def test_dropped_samples_lose_their_class():
    net, given = Images(), batch(40)
    made = module(net, label_drop=LabelDrop(p=0.5))
    made.training_step(given, 0)
    dropped = made.draws().apply("drop", made.label_drop, 40)
    assert 10 < dropped.sum() < 30
    assert torch.equal(net.calls[-1]["labels"], torch.eye(3)[given["label"]] * ~dropped[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual terms


class Gap(nn.Module):
    """Mean squared difference per image; remembers what it compared."""

    def forward(self, image, x):
        self.seen = image.detach(), x.detach()
        return (image - x).square().flatten(1).mean(1)


def test_perceptual_terms_compare_the_implied_image_with_the_data_at_low_noise():
    """0.4 d(z - t u, x) where t < .5 beside the loss of velocities, each through its own weight."""
    net, given, gap = Images(), batch(32), Gap()
    perceptual = Perceptual(distances={"gap": gap}, weights={"gap": 0.4}, t_below=0.5, crop=None)
    loss = module(net, perceptual=perceptual, power=1.0, eps=0.01).training_step(given, 0)
    alone = module(net, power=1.0, eps=0.01).training_step(given, 0)
    t, r, z, _ = drawn(module(net), given["image"])
    image = z - wide(t) * net(z, t, r, torch.eye(3)[given["label"]])
    torch.testing.assert_close(gap.seen[0], image.detach())
    assert torch.equal(gap.seen[1], given["image"])
    distance = (image - given["image"]).square().flatten(1).mean(1) * (t < 0.5)
    assert 5 < (t < 0.5).sum() < 27
    further = (0.4 * distance / (distance.detach() + 0.01)).mean()
    torch.testing.assert_close(loss - alone, further, rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(k, net.k, retain_graph=True)[0] for k in (loss - alone, further))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_perceptual_terms_have_no_gradient_at_high_noise_and_their_networks_none_at_all():
    distance = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(0.5))

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = distance

        def forward(self, image, x):
            return (self.net(image) - self.net(x)).square().flatten(1).mean(1)

    perceptual = Perceptual(distances={"f": Features()}, weights={"f": 1.0}, t_below=0.5, crop=None).train()
    assert not perceptual.training and not distance[1].training
    assert not any(p.requires_grad for p in perceptual.parameters())
    image = torch.randn(4, 2, 8, 8).requires_grad_()
    t = torch.tensor([0.1, 0.49, 0.5, 0.9])
    perceptual(image, torch.zeros(4, 2, 8, 8), t, lambda d: d, None).sum().backward()
    assert ((image.grad.flatten(1).abs().sum(1) > 0) == (t < 0.5)).all()


def test_crops_are_drawn_by_the_step():
    net, given, gap = Images(), batch(), Gap()
    made = module(net, perceptual=Perceptual(distances={"gap": gap}, weights={"gap": 1.0}, t_below=1.0, crop=3))
    first = made.training_step(given, 0)
    assert gap.seen[0].shape == (8, 2, 3, 3) and torch.equal(made.training_step(given, 0), first)


# ---------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence():
    def reversed_pair(n, generator=None, device="cpu"):
        return torch.full((n,), 0.2), torch.full((n,), 0.6)

    with pytest.raises(UserError, match="0 <= r <= t <= 1"):
        module(Images(), time=reversed_pair).training_step(batch(), 0)
    with pytest.raises(UserError, match="noise_scale"):
        module(Images(), noise_scale=0.0)
    with pytest.raises(UserError, match=r"perceptual.weights must name \['gap'\]"):
        Perceptual(distances={"gap": Gap()}, weights={"lpips": 0.4})
    with pytest.raises(UserError, match="trained range 1 to 8, got"):
        made = module(Images(), omega=PowerOmega(), interval=GuidanceInterval())
        made.generate(torch.arange(2), sampler=AverageVelocitySteps(omega=8.5), seed=0)


def test_the_tiny_run_predicts_images_and_clips_alike_on_both_sides(composed, tmp_path):
    project = composed("pmf_tiny", tmp_path / "run").project
    assert project.net.prediction == "x" and project.loss.t_floor == project.net.t_floor == FLOOR
