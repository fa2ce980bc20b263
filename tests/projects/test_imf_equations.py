"""iMF's module on a network whose derivative is written out by hand: both heads, guidance, ratio 0, bad input."""

from functools import partial

import pytest
import torch
from torch import nn

from common.diffusion.sample import AverageVelocitySteps
from common.diffusion.time import GuidanceInterval, LabelDrop, LogitNormal, OrderThenMask, PowerOmega
from common.errors import UserError
from common.losses.meanflow import ImprovedMeanFlowLoss, MeanFlowLoss
from common.runtime.training.context import RunContext
from projects.imf.module import ImprovedMeanFlow

TIMES = OrderThenMask(base=LogitNormal(mean=-0.4, std=1.0), equal=0.5, rows="spread")
GUIDED = {"omega": PowerOmega(s_max=7.0), "interval": GuidanceInterval()}


def wide(t):
    return t.reshape(-1, 1, 1, 1)


class Affine(nn.Module):
    """u = a z + b t + c r + d . class + f (1 - 1/omega), along (v, 1, 0) a v + b; v = g z + d . class + f (...) + 1."""

    img_channels, img_resolution = 2, 4

    def __init__(self, label_dim: int = 3):
        super().__init__()
        self.label_dim = label_dim
        weights = (0.7, -0.4, 1.3, 0.5, 0.9)
        self.a, self.b, self.c, self.f, self.g = (nn.Parameter(torch.tensor(k, dtype=torch.float64)) for k in weights)
        self.d = nn.Parameter(torch.linspace(-1, 1, label_dim, dtype=torch.float64))
        self.calls = []

    def forward(self, z, t, r, class_labels=None, omega=None, t_min=None, t_max=None, heads="u"):
        self.calls.append({"z": z.detach(), "t": t, "r": r, "labels": class_labels, "omega": omega,
                           "t_min": t_min, "t_max": t_max, "heads": heads})  # fmt: skip
        offset = 0 if class_labels is None else wide(class_labels.to(z.dtype) @ self.d)
        guided = 0 if omega is None else wide(self.f * (1 - 1 / omega))
        u = self.a * z + wide(self.b * t + self.c * r) + offset + guided
        v = self.g * z + offset + guided + 1
        return {"u": u, "v": v, "both": (u, v)}[heads]


def module(net: nn.Module, *, time=TIMES, omega=None, interval=None, label_drop=None, **loss) -> ImprovedMeanFlow:
    made = ImprovedMeanFlow(
        net=net, loss=ImprovedMeanFlowLoss(**loss), time=time, omega=omega, interval=interval, label_drop=label_drop,
        optimizer=partial(torch.optim.Adam, lr=1e-3), schedule=None,
    )  # fmt: skip
    made.context = RunContext(seed=5)
    return made.train()


def batch(n: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64)
    return {"image": image, "label": torch.arange(n) % 3, "position": torch.arange(n)}


def drawn(made, images):
    """The module's own t, r, z, v, written out."""
    draws = made.draws()
    t, r = (
        draws.apply("t", lambda n, generator: torch.stack(made.time(n, generator), 1), len(images)).double().unbind(1)
    )
    e = draws.normal("eps", images)
    return t, r, wide(1 - t) * images + wide(t) * e, e - images


def squared(x):
    return x.square().flatten(1).sum(1)


def same_gradients(net, ours, theirs):
    pairs = (torch.autograd.grad(k, list(net.parameters()), allow_unused=True) for k in (ours, theirs))
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_boundary_loss_is_the_compound_velocity_against_e_minus_x():
    """V = u + (t - r) stop(a u(z, t, t) + b): the derivative follows the network, the target is the data's."""
    net, given = Affine(), batch()
    made = module(net, head="boundary", power=0.0)
    loss = made.training_step(given, 0)
    t, r, z, v = drawn(made, given["image"])
    assert 0 < (r < t).sum() < len(t)
    labels = torch.eye(3)[given["label"]]
    dudt = (net.a * net(z, t, t, labels) + net.b).detach()
    expected = squared(net(z, t, r, labels) + wide(t - r) * dudt - v).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    same_gradients(net, loss, expected)


def test_the_auxiliary_head_gives_the_direction_and_is_trained_beside():
    net, given = Affine(), batch()
    made = module(net, head="auxiliary", power=1.0, eps=0.01)
    loss = made.training_step(given, 0)
    t, r, z, v = drawn(made, given["image"])
    u, seen = net(z, t, r, torch.eye(3)[given["label"]], heads="both")
    dudt = (net.a * seen + net.b).detach()  # the v-head of this network does not read r
    errors = squared(u + wide(t - r) * dudt - v), squared(seen - v)
    expected = sum(k / (k.detach() + 0.01) for k in errors).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    same_gradients(net, loss, expected)


def test_with_the_datas_own_direction_it_is_meanflow():
    """V - v = u - (v - (t - r) du/dt): the same loss and gradient, the first row of the paper's ablation."""
    net, given = Affine(), batch()
    made = module(net, head="data", power=0.75, eps=1e-3)
    x, t, r, e, conditions = made.inputs(given)
    ours = made.loss(net, x, t, r, e, **conditions).loss.mean()
    theirs = MeanFlowLoss(power=0.75, eps=1e-3)(net, x, t, r, e, **conditions).loss.mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    same_gradients(net, ours, theirs)
    boundary = module(net, head="boundary", power=0.75, eps=1e-3)
    assert not torch.allclose(ours, boundary.loss(net, x, t, r, e, **conditions).loss.mean(), rtol=1e-3)


def test_with_the_datas_own_direction_guidance_moves_target_and_direction():
    net, given = Affine(), batch()
    made = module(net, **GUIDED, head="data", power=0.0)
    x, t, r, e, conditions = made.inputs(given)
    found = made.loss(net, x, t, r, e, **conditions).loss.detach()
    t, r, z, v = drawn(made, given["image"])
    omega, low, high = (conditions[k].double() for k in ("omega", "t_min", "t_max"))
    low, high = torch.where(t == r, 0, low), torch.where(t == r, 1, high)
    scale, labels = torch.where((t >= low) & (t <= high), omega, 1.0), torch.eye(3)[given["label"]]
    with torch.no_grad():
        v_cond, v_uncond = net(z, t, t, labels, omega=scale), net(z, t, t, omega=torch.ones_like(omega))
        target = v + wide(1 - 1 / scale) * (v_cond - v_uncond)
        compound = net(z, t, r, labels, omega=omega) + wide(t - r) * (net.a * target + net.b)
    torch.testing.assert_close(found, squared(compound - target), rtol=1e-10, atol=0)


def test_a_point_has_no_loss_at_the_exact_average_velocity():
    class Exact(Affine):
        def forward(self, z, t, r, class_labels=None, heads="u"):
            return (z - point) / wide(t)

    given = batch()
    point = given["image"][:1]
    given["image"] = point.expand(8, -1, -1, -1).clone()
    made = module(Exact(), head="boundary", power=0.0)
    assert made.training_step(given, 0) < 1e-20
    images = made.generate(torch.arange(3), sampler=AverageVelocitySteps(steps=2), seed=0)
    torch.testing.assert_close(images, point.expand(3, -1, -1, -1).to(images.dtype), rtol=0, atol=1e-6)


def test_with_ratio_0_it_is_flow_matching():
    net, given = Affine(), batch()
    made = module(net, time=OrderThenMask(base=LogitNormal(), equal=1.0), head="boundary", power=0.0)
    loss = made.training_step(given, 0)
    assert len(net.calls) == 1 and torch.equal(net.calls[0]["t"], net.calls[0]["r"])
    t, _, z, v = drawn(made, given["image"])
    assert torch.equal(loss, squared(net(z, t, t, torch.eye(3)[given["label"]]) - v).mean())


def test_dropped_samples_lose_their_class_and_keep_their_scale_in_view():
    """Guided target v + (1 - 1/omega)(v_c - v_u) in the rows with a class, v in the dropped ones."""
    net, given = Affine(), batch(40)
    made = module(net, **GUIDED, label_drop=LabelDrop(p=0.5), head="boundary", power=0.0)
    loss = made.training_step(given, 0)
    draws = made.draws()
    dropped = draws.apply("drop", made.label_drop, 40)
    omega = draws.apply("omega", made.omega, 40).double()
    low, high = draws.apply("interval", lambda n, generator: torch.stack(made.interval(n, generator), 1), 40).unbind(1)
    assert 10 < dropped.sum() < 30 and omega.min() >= 1 and omega.max() <= 8
    t, r, z, v = drawn(made, given["image"])
    low, high = torch.where(t == r, 0, low.double()), torch.where(t == r, 1, high.double())
    call = net.calls[-1]
    labels = torch.eye(3)[given["label"]] * ~dropped[:, None]
    assert torch.equal(call["labels"], labels) and torch.equal(call["omega"], omega)
    assert torch.equal(call["t_min"], low) and torch.equal(call["t_max"], high)
    scale = torch.where((t >= low) & (t <= high), omega, 1.0)
    with torch.no_grad():
        v_cond = net(z, t, t, torch.eye(3)[given["label"]], omega=scale)
        v_uncond = net(z, t, t, omega=torch.ones_like(omega))
        target = torch.where(wide(dropped), v, v + wide(1 - 1 / scale) * (v_cond - v_uncond))
        compound = net(z, t, r, labels, omega=omega) + wide(t - r) * (net.a * v_cond + net.b)
    expected = squared(compound - target)
    kept = ~dropped
    found = squared_of_rows(made, given)
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-10, atol=0)
    flat = dropped & (t == r)  # no derivative there: what the dropped rows are trained towards is v alone
    assert flat.sum() > 3
    torch.testing.assert_close(found[flat], squared(net(z, t, t, labels, omega=omega).detach() - v)[flat])
    torch.testing.assert_close(loss.detach(), found.mean(), rtol=1e-12, atol=0)


def squared_of_rows(made, given):
    """The module's loss row by row, before it is averaged."""
    x, t, r, e, conditions = made.inputs(given)
    return made.loss(made.net, x, t, r, e, **conditions).loss.detach()


def test_bad_input_is_one_sentence():
    def reversed_pair(n, generator=None, device="cpu"):
        return torch.full((n,), 0.2), torch.full((n,), 0.6)

    with pytest.raises(UserError, match="0 <= r <= t <= 1"):
        module(Affine(), time=reversed_pair).training_step(batch(), 0)
    with pytest.raises(UserError, match="needs project"):
        module(Affine(), omega=PowerOmega())
    with pytest.raises(UserError, match="label_dim=0"):
        module(Affine(label_dim=0), **GUIDED)


def test_two_real_steps_with_head_classes_and_guidance(two_steps, tmp_path):
    _, after, rows = two_steps(
        "imf_tiny", tmp_path / "run", "project.loss.head=auxiliary", "project.loss.power=1", "project.net.guided=true",
        "project.net.model.num_times=5", "project.net.model.out_channels=2", "project.net.model.label_dim=10",
        "project.omega={_target_: common.diffusion.time.PowerOmega, s_max: 7.0, beta: 1.0}",
        "project.interval={_target_: common.diffusion.time.GuidanceInterval, split: 0.5}",
        "project.label_drop={_target_: common.diffusion.time.LabelDrop, p: 0.1, rows: random}",
    )  # fmt: skip
    assert all(torch.isfinite(value).all() for value in after.values())
    assert float(rows[0]["train/loss"]) == pytest.approx(2, abs=0.02)  # two adaptive terms
