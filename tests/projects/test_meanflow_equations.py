"""MeanFlow's module on networks whose derivative is written out by hand: identity, ratio 0, guidance, bad input."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from common.diffusion.sample import AverageVelocitySteps
from common.diffusion.time import LabelDrop, LogitNormal, OrderThenMask
from common.errors import UserError
from common.losses.meanflow import MeanFlowLoss
from common.runtime.training.context import RunContext
from projects.meanflow.module import MeanFlow

TIMES = OrderThenMask(base=LogitNormal(mean=-0.4, std=1.0), equal=0.5, rows="spread")


def wide(t):
    return t.reshape(-1, 1, 1, 1)


class Affine(nn.Module):
    """u = a z + b t + c r + d . class: its derivative along (v, 1, 0) is a v + b."""

    img_channels, img_resolution = 2, 4

    def __init__(self, label_dim: int = 3):
        super().__init__()
        self.label_dim = label_dim
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(k, dtype=torch.float64)) for k in (0.7, -0.4, 1.3))
        self.d = nn.Parameter(torch.linspace(-1, 1, label_dim, dtype=torch.float64))
        self.calls = []

    def forward(self, z, t, r, class_labels=None, augment_labels=None):
        self.calls.append((z.detach(), t.detach(), r.detach(), class_labels, augment_labels))
        offset = 0 if class_labels is None else wide(class_labels.to(z.dtype) @ self.d)
        return self.a * z + wide(self.b * t + self.c * r) + offset


def module(net: nn.Module, *, time=TIMES, label_drop=None, augment=None, **loss) -> MeanFlow:
    made = MeanFlow(
        net=net, loss=MeanFlowLoss(**loss), time=time, label_drop=label_drop, augment=augment,
        optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def batch(n: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
    return {"image": image, "label": torch.arange(n) % 3, "position": torch.arange(n)}


def drawn(made: MeanFlow, images):
    """The module's own t, r, z, v, written out."""
    draws = made.draws()
    t, r = (
        draws.apply("t", lambda n, generator: torch.stack(made.time(n, generator), 1), len(images)).double().unbind(1)
    )
    e = draws.normal("eps", images)
    return t, r, wide(1 - t) * images + wide(t) * e, e - images


def test_loss_is_the_identity_with_the_modules_own_draws():
    """w |u - (v - (t - r)(a v + b))|^2, w = 1/(|.|^2 + c)^p, and its gradient with target and weight held fixed."""
    net, given = Affine(), batch()
    made = module(net, power=0.75, eps=1e-3)
    loss = made.training_step(given, 0)
    t, r, z, v = drawn(made, given["image"])
    assert 0 < (r < t).sum() < len(t)
    u = net(z, t, r, torch.eye(3)[given["label"]])
    target = (v - wide(t - r) * (net.a * v + net.b)).detach()
    squared = (u - target).square().flatten(1).sum(1)
    expected = ((squared.detach() + 1e-3) ** -0.75 * squared).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(k, list(net.parameters())) for k in (loss, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_point_has_no_loss_at_the_exact_average_velocity():
    """All data one image x0: u = (z - x0) / t over every [r, t], the same along the path, and one step ends at x0."""

    class Exact(Affine):
        def forward(self, z, t, r, class_labels=None, augment_labels=None):
            return (z - point) / wide(t)

    given = batch()
    point = given["image"][:1]
    given["image"] = point.expand(8, -1, -1, -1).clone()
    made = module(Exact(), power=0.0)
    assert made.training_step(given, 0) < 1e-20
    with torch.no_grad():
        for steps in (1, 2):
            images = made.generate(torch.arange(3), sampler=AverageVelocitySteps(steps=steps), seed=0)
            torch.testing.assert_close(images, point.expand(3, -1, -1, -1).to(images.dtype), rtol=0, atol=1e-6)


def test_with_ratio_0_it_is_flow_matching():
    net, given = Affine(), batch()
    made = module(net, time=OrderThenMask(base=LogitNormal(mean=-0.4, std=1.0), equal=1.0), power=0.0)
    loss = made.training_step(given, 0)
    assert len(net.calls) == 1  # neither a derivative nor a second pass
    z, t, r, *_ = net.calls[0]
    assert torch.equal(t, r)
    _, _, path, v = drawn(made, given["image"])
    assert torch.equal(z, path)
    expected = (net(z, t, t, torch.eye(3)[given["label"]]) - v).square().flatten(1).sum(1).mean()
    assert torch.equal(loss, expected)
    ours, theirs = (torch.autograd.grad(k, list(net.parameters()), retain_graph=True) for k in (loss, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_derivative_takes_only_the_rows_with_r_below_t():
    net = Affine()
    module(net).training_step(batch(), 0)
    sizes = [len(call[0]) for call in net.calls]
    assert sizes == [4, 8]  # half of the batch, then all of it with a graph
    assert (net.calls[0][2] < net.calls[0][1]).all()


def test_dropped_samples_lose_their_class_and_are_not_guided():
    """omega v + (1 - omega) u(z, t, t) in the rows that keep their class, v in the others."""
    net, given = Affine(), batch(40)
    made = module(net, label_drop=LabelDrop(p=0.5), power=0.0, omega=2.0)
    loss = made.training_step(given, 0)
    dropped = made.draws().apply("drop", made.label_drop, 40)
    assert 10 < dropped.sum() < 30
    labels = torch.eye(3)[given["label"]] * ~dropped[:, None]
    assert torch.equal(net.calls[-1][3], labels)
    t, r, z, v = drawn(made, given["image"])
    with torch.no_grad():
        guided = torch.where(wide(dropped), v, 2 * v - net(z, t, t))
        squared = net(z, t, r, labels) - (guided - wide(t - r) * (net.a * guided + net.b))
    torch.testing.assert_close(loss.detach(), squared.square().flatten(1).sum(1).mean(), rtol=1e-12, atol=0)


def test_bad_input_is_one_sentence():
    def reversed_pair(n, generator=None, device="cpu"):
        return torch.full((n,), 0.2), torch.full((n,), 0.6)

    with pytest.raises(UserError, match="0 <= r <= t <= 1"):
        module(Affine(), time=reversed_pair).training_step(batch(), 0)
    with pytest.raises(UserError, match="guide by class"):
        module(Affine(label_dim=0), omega=2.0).training_step(batch(), 0)
    with pytest.raises(UserError, match="kappa must be >= 0 and < 1"):
        MeanFlowLoss(kappa=1.0)
    with pytest.raises(UserError, match="trained without it"):
        module(Affine()).generate(torch.arange(2), sampler=AverageVelocitySteps(omega=2.0), seed=0)


def test_the_baseline_differs_in_its_times_and_samplers_alone(composed, tmp_path):
    ours, theirs = (
        OmegaConf.to_container(composed(name, tmp_path / "run"), resolve=True)
        for name in ("meanflow_tiny", "meanflow_tiny_fm")
    )
    assert (ours["project"]["time"].pop("equal"), theirs["project"]["time"].pop("equal")) == (0.75, 1.0)
    for section in ("project", "data", "trainer", "ema", "speed"):
        assert ours[section] == theirs[section], section
