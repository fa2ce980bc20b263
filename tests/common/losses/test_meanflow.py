"""The identity on Gaussian data, where everything is known; gradients, guidance, rows, and what both losses leave."""

import math

import pytest
import torch
from torch import nn

from common.diffusion.jvp import total_derivative
from common.errors import UserError
from common.losses.meanflow import (
    ImprovedMeanFlowLoss,
    MeanFlowLoss,
    average_velocity_target,
    compound_velocity,
    data_from_velocity,
    guided_target,
    guided_velocity,
    velocity_from_data,
)
from common.nets.average_velocity import AverageVelocity
from common.nets.mlp import MLPDenoiser
from common.nets.two_head import TwoHeadVelocity

MEAN, SD = 0.4, 0.3  # of the Gaussian data


def wide(t):
    return t.reshape(-1, 1, 1, 1)


def spread(t):
    return wide(((1 - t) ** 2 * SD**2 + t**2).sqrt())


def flow_map(z, t, r):
    """z at t -> z at r along the flow of N(MEAN, SD^2): affine, by the ratio of the standard deviations."""
    return wide(1 - r) * MEAN + spread(r) / spread(t) * (z - wide(1 - t) * MEAN)


def velocity(z, t):
    """E[e - x | z]."""
    slope = wide((t - (1 - t) * SD**2) / ((1 - t) ** 2 * SD**2 + t**2))
    return -MEAN + slope * (z - wide(1 - t) * MEAN)


def exact_u(z, t, r, **conditions):
    """Average velocity over [r, t]; r < t."""
    return (z - flow_map(z, t, r)) / wide(t - r)


def points(n: int = 200):
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(n, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    r = t * torch.rand(n, generator=generator, dtype=torch.float64) * 0.9
    z = torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)
    return z, t, r


def test_the_target_is_a_constant_and_the_compound_velocity_is_one_in_the_derivative():
    generator = torch.Generator().manual_seed(0)
    u, v, dudt = (torch.randn(4, 1, 2, 2, generator=generator).requires_grad_() for _ in range(3))
    t, r = torch.tensor([0.9, 0.5, 0.7, 1.0]), torch.tensor([0.1, 0.5, 0.2, 0.0])
    target = average_velocity_target(v, dudt, t, r)
    assert not target.requires_grad
    torch.testing.assert_close(target, (v - wide(t - r) * dudt).detach())
    velocity = compound_velocity(u, dudt, t, r)
    torch.testing.assert_close(velocity, u + wide(t - r) * dudt)
    velocity.sum().backward()
    assert torch.equal(u.grad, torch.ones_like(u)) and dudt.grad is None


def test_the_identity_holds_for_the_exact_average_velocity():
    z, t, r = points()
    v = velocity(z, t)
    u = exact_u(z, t, r)
    dudt = total_derivative(exact_u, z, t, r, (v, 1.0, 0.0))
    torch.testing.assert_close(u, average_velocity_target(v, dudt, t, r), rtol=0, atol=1e-12)
    torch.testing.assert_close(compound_velocity(u, dudt, t, r), v, rtol=0, atol=1e-12)  # the form of iMF
    wrong = total_derivative(exact_u, z, t, r, (v, 0.0, 0.0))  # time stands still: (v, 0, 0)
    assert (u - average_velocity_target(v, wrong, t, r)).abs().mean() > 0.1 * u.abs().mean()


def test_one_jump_from_noise_ends_at_the_data_and_equals_two_half_jumps():
    z, t, r = points()
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    torch.testing.assert_close(z - exact_u(z, one, zero), MEAN + SD * z, rtol=0, atol=1e-14)
    middle = (t + r) / 2
    half = z - wide(t - middle) * exact_u(z, t, middle)
    twice = half - wide(middle - r) * exact_u(half, middle, r)
    torch.testing.assert_close(z - wide(t - r) * exact_u(z, t, r), twice, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Networks and batches


def mlp(num_times: int = 2, **options) -> MLPDenoiser:
    options = {"out_channels": 1, "width": 16, "emb_channels": 8, **options}
    torch.manual_seed(0)
    made = MLPDenoiser(img_resolution=2, in_channels=1, num_times=num_times, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return made


def net(**options) -> AverageVelocity:
    return AverageVelocity(model=mlp(label_dim=3, **options))


def two_headed(guided: bool = True, **options) -> TwoHeadVelocity:
    model = mlp(num_times=5 if guided else 2, label_dim=3, out_channels=2)
    return TwoHeadVelocity(model=model, guided=guided, **options)


def batch(n: int = 12) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    t = torch.rand(n, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    r = torch.where(torch.arange(n) % 2 == 0, t, t * torch.rand(n, generator=generator, dtype=torch.float64))
    return {
        "x": draw(n, 1, 2, 2), "e": draw(n, 1, 2, 2), "t": t, "r": r,
        "labels": torch.eye(3, dtype=torch.float64)[torch.arange(n) % 3],
    }  # fmt: skip


def call(loss, network, given: dict, **more):
    more = {"class_labels": given["labels"], **more}
    return loss(network, given["x"], given["t"], given["r"], given["e"], **more)


def parts(given: dict):
    t = wide(given["t"])
    return (1 - t) * given["x"] + t * given["e"], given["e"] - given["x"]


def grads(loss, network) -> list:
    return torch.autograd.grad(loss, list(network.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# MeanFlow


def test_the_loss_and_its_gradient_are_those_of_the_paper():
    """w |u - sg(v - (t - r) du/dt)|^2: the gradient is 2 w (u - target) du/dtheta, nothing through target or weight."""
    network, given, loss = net(), batch(), MeanFlowLoss(power=0.75, eps=1e-3)
    z, v = parts(given)
    t, r = given["t"], given["r"]
    u, dudt = torch.func.jvp(
        lambda z, t, r: network(z, t, r, class_labels=given["labels"]), (z, t, r),
        (v, torch.ones_like(t), torch.zeros_like(r)),
    )  # fmt: skip
    gap = u - (v - wide(t - r) * dudt).detach()
    squared = gap.square().flatten(1).sum(1)
    weight = (squared + 1e-3).detach() ** -0.75
    terms = call(loss, network, given)
    torch.testing.assert_close(terms.loss, weight * squared, rtol=1e-11, atol=0)
    torch.testing.assert_close(terms.u, squared.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(terms.v, (u - v).square().flatten(1).sum(1).detach(), rtol=1e-11, atol=0)
    expected = torch.autograd.grad(u, list(network.parameters()), 2 * wide(weight) * gap.detach(), retain_graph=True)
    for a, b in zip(grads(terms.loss.sum(), network), expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert terms.loss.requires_grad and not terms.u.requires_grad and not terms.v.requires_grad


@pytest.mark.parametrize("skip_equal", [True, False])
def test_with_r_equal_t_it_is_flow_matching_bit_for_bit(skip_equal):
    network, given = net(), batch()
    given["r"] = given["t"]
    z, v = parts(given)
    terms = call(MeanFlowLoss(power=0.0, skip_equal=skip_equal), network, given)
    plain = (network(z, given["t"], given["t"], class_labels=given["labels"]) - v).square().flatten(1).sum(1)
    assert torch.equal(terms.loss, plain)
    for a, b in zip(grads(terms.loss.mean(), network), grads(plain.mean(), network)):
        assert torch.equal(a, b)


def test_rows_with_r_equal_t_neither_pay_for_nor_feel_the_others():
    network, given = net(), batch()
    whole = call(MeanFlowLoss(skip_equal=False), network, given)
    some = call(MeanFlowLoss(), network, given)
    for a, b in zip(grads(some.loss.mean(), network), grads(whole.loss.mean(), network)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_network_that_is_exact_has_no_loss_on_a_point():
    """One image x0: v = e - x0 = (z - x0)/t is a function of z, u = (z - x0)/t is exact for every r."""

    class Point(nn.Module):
        def forward(self, z, t, r):
            return (z - 0.7) / wide(t)

    given = batch()
    given["x"] = torch.full_like(given["x"], 0.7)
    for loss in (MeanFlowLoss(), ImprovedMeanFlowLoss(head="boundary")):
        assert call(loss, Point(), given, class_labels=None).u.max() < 1e-25


def test_guidance_of_scale_one_changes_nothing_and_asks_nothing():
    calls = []

    class Counting(AverageVelocity):
        def forward(self, z, *args, **kwargs):
            calls.append(len(z))
            return super().forward(z, *args, **kwargs)

    network, given = Counting(model=mlp(label_dim=3)), batch()
    plain = call(MeanFlowLoss(), network, given)
    assert calls == [6, 12]  # the derivative of six rows, then all
    window = call(MeanFlowLoss(omega=3.0, start=0.0, end=0.05), network, given)  # no t in the window
    assert calls == [6, 12] * 2 and torch.equal(window.loss, plain.loss)
    v = given["x"]
    assert torch.equal(guided_velocity(v, v + 1, v - 1, omega=1.0, kappa=0.0), v)


@pytest.mark.parametrize("omega, kappa", [(2.0, 0.0), (1.0, 0.5), (0.2, 0.92)])
def test_guidance_is_the_formula_in_the_window_and_v_for_dropped_labels(omega, kappa):
    network, given = net(), batch()
    given["r"] = given["t"]  # then the loss is |u - v_g|^2
    z, v = parts(given)
    t, labels = given["t"], given["labels"]
    dropped = torch.arange(12) % 4 == 0
    with torch.no_grad():
        cond, free = network(z, t, t, class_labels=labels), network(z, t, t)
        expected = omega * v + kappa * cond + (1 - omega - kappa) * free
        outside = (t < 0.3) | (t > 0.8)
        assert outside.any() and not outside.all()
        expected = torch.where(wide(outside | dropped), v, expected)
        u = network(z, t, t, class_labels=labels * ~dropped[:, None])
    found = call(MeanFlowLoss(omega=omega, kappa=kappa, start=0.3, end=0.8), network, given, dropped=dropped)
    torch.testing.assert_close(found.u, (u - expected).square().flatten(1).sum(1), rtol=1e-11, atol=0)


def test_omega_and_kappa_act_as_the_scale_omega_over_one_minus_kappa():
    """At the fixed point v_cond = v_guided: v_guided = v_uncond + scale (v - v_uncond)."""
    v, free = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    omega, kappa = 0.2, 0.92
    fixed = free + omega / (1 - kappa) * (v - free)
    torch.testing.assert_close(guided_velocity(v, free, fixed, omega, kappa), fixed, rtol=1e-12, atol=1e-12)
    per_sample = guided_velocity(v, free, fixed, torch.full((5,), omega), torch.full((5,), kappa))
    torch.testing.assert_close(per_sample, fixed, rtol=1e-6, atol=1e-6)


def test_target_velocities_come_from_the_network_without_dropout():
    network, given = net(dropout=0.5).train(), batch()
    masks = network.draw_dropout(given["x"])
    modes = [part.training for part in network.modules()]
    found = call(MeanFlowLoss(omega=2.0), network, given, dropout_masks=masks)
    assert [part.training for part in network.modules()] == modes
    z, v = parts(given)
    network.eval()
    with torch.no_grad():
        target = guided_velocity(v, network(z, given["t"], given["t"]), omega=2.0)
    network.train()
    same = given["t"] == given["r"]
    u = network(z, given["t"], given["r"], class_labels=given["labels"], dropout_masks=masks)
    torch.testing.assert_close(found.u[same], (u - target).square().flatten(1).sum(1)[same].detach())


# ---------------------------------------------------------------------------------------------------------------------
# Improved MeanFlow


def test_the_gradient_equals_meanflows_when_both_follow_the_same_velocity():
    """V - v_g = u - (v_g - (t - r) du/dt): the same difference, the same gradient, if the tangents coincide."""
    network, given = two_headed(guided=False), batch()
    z, v = parts(given)
    t, r = given["t"], given["r"]
    dudt = total_derivative(network, z, t, r, (v, 1.0, 0.0))
    u = network(z, t, r)
    ours = (compound_velocity(u, dudt, t, r) - v).square().sum()
    theirs = (u - average_velocity_target(v, dudt, t, r)).square().sum()
    for a, b in zip(torch.autograd.grad(ours, u, retain_graph=True), torch.autograd.grad(theirs, u)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", ["auxiliary", "boundary"])
def test_the_derivative_follows_the_networks_own_velocity(head):
    network, given = two_headed(guided=False), batch()
    z, v = parts(given)
    t, r, labels = given["t"], given["r"], given["labels"]
    with torch.no_grad():
        own = network(z, t, t, class_labels=labels, heads="v" if head == "auxiliary" else "u")
    u, dudt = torch.func.jvp(
        lambda z, t, r: network(z, t, r, class_labels=labels), (z, t, r),
        (own, torch.ones_like(t), torch.zeros_like(r)),
    )  # fmt: skip
    squared = (u + wide(t - r) * dudt.detach() - v).square().flatten(1).sum(1)
    terms = call(ImprovedMeanFlowLoss(head=head), network, given)
    torch.testing.assert_close(terms.u, squared.detach(), rtol=1e-11, atol=0)
    expected = squared / (squared + 0.01).detach()
    if head == "auxiliary":
        other = (network(z, t, r, class_labels=labels, heads="v") - v).square().flatten(1).sum(1)
        torch.testing.assert_close(terms.v, other.detach(), rtol=1e-11, atol=0)
        expected = expected + other / (other + 0.01).detach()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-11, atol=0)
    found = torch.autograd.grad(terms.loss.sum(), list(network.parameters()))
    for a, b in zip(found, torch.autograd.grad(expected.sum(), list(network.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def official_guidance(network, given, omega, t_min, t_max, dropped):
    """(v_g, v_c) as the official code computes them, in its three evaluations over the whole batch."""
    z, v = parts(given)
    t, labels, equal = given["t"], given["labels"], given["t"] == given["r"]
    ask = lambda scale, cls: network(z, t, t, class_labels=cls, omega=scale, t_min=0.0, t_max=1.0, heads="v")
    ones = torch.ones_like(omega)
    v_c, v_u = ask(omega, labels), ask(ones, torch.zeros_like(labels))
    everywhere = v + wide(1 - 1 / omega) * (v_c - v_u)
    scale = torch.where((t >= t_min) & (t <= t_max), omega, 1.0)
    v_c = ask(torch.where(equal, omega, scale), labels)  # tangent: only the rows with r < t use it
    v_g = v + wide(1 - 1 / scale) * (ask(scale, labels) - v_u)
    return torch.where(wide(dropped), v, torch.where(wide(equal), everywhere, v_g)), v_c


def test_guidance_is_that_of_the_official_code():
    network, given = two_headed(), batch()
    omega = torch.linspace(1, 8, 12, dtype=torch.float64)
    t_min, t_max = torch.full((12,), 0.3, dtype=torch.float64), torch.full((12,), 0.7, dtype=torch.float64)
    dropped = torch.arange(12) % 5 == 1
    with torch.no_grad():
        v_g, v_c = official_guidance(network, given, omega, t_min, t_max, dropped)
    z, v = parts(given)
    t, r = given["t"], given["r"]
    live = t != r
    assert ((v_g - v).flatten(1).abs().sum(1) == 0).sum() not in (0, 12) and (dropped & live).any()
    low, high = torch.where(live, t_min, 0.0), torch.where(live, t_max, 1.0)
    conditions = {"class_labels": given["labels"] * ~dropped[:, None], "omega": omega, "t_min": low, "t_max": high}
    u, dudt = torch.func.jvp(
        lambda z, t, r: network(z, t, r, **conditions), (z, t, r), (v_c, torch.ones_like(t), torch.zeros_like(r))
    )
    expected = (u + wide(t - r) * dudt - v_g).square().flatten(1).sum(1).detach()
    terms = call(ImprovedMeanFlowLoss(), network, given, omega=omega, t_min=t_min, t_max=t_max, dropped=dropped)
    torch.testing.assert_close(terms.u, expected, rtol=1e-10, atol=1e-12)
    seen = network(z, t, r, **conditions, heads="v")
    torch.testing.assert_close(terms.v, (seen - v_g).square().flatten(1).sum(1).detach(), rtol=1e-10, atol=1e-12)
    same = call(ImprovedMeanFlowLoss(uncond_omega="same"), network, given, omega=omega, t_min=t_min, t_max=t_max)
    assert (
        same.u - call(ImprovedMeanFlowLoss(), network, given, omega=omega, t_min=t_min, t_max=t_max).u
    ).abs().max() > 0


def test_omega_one_is_no_guidance_and_the_fixed_point_is_classifier_free_guidance():
    v, cond, free = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(guided_target(v, cond, free, torch.ones(4)), v)
    omega = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    consistent = free + wide(omega) * (v - free)  # a v_cond that equals its own target
    torch.testing.assert_close(guided_target(v, consistent, free, omega), consistent, rtol=1e-12, atol=1e-12)


def test_what_each_loss_leaves_at_the_exact_network():
    """iMF: e - x less its mean given z. MeanFlow: the same times the Jacobian of the flow from t to r, because its
    derivative follows e - x too; that is noise the network cannot reduce, and it grows where the flow spreads out.
    """
    z, t, r = points()
    x = z.flip(0)
    e = (z - wide(1 - t) * x) / wide(t)  # so that the noisy image is z
    exact = Exact()
    missing = e - x - velocity(z, t)
    left = ImprovedMeanFlowLoss(power=0, head="boundary")(exact, x, t, r, e).loss
    torch.testing.assert_close(left, missing.square().flatten(1).sum(1), rtol=1e-9, atol=1e-12)
    left = MeanFlowLoss(power=0)(exact, x, t, r, e).loss
    jacobian = spread(r) / spread(t)
    torch.testing.assert_close(left, (jacobian * missing).square().flatten(1).sum(1), rtol=1e-9, atol=1e-12)


class Exact(nn.Module):
    """The exact average velocity, and the velocity where r = t."""

    def forward(self, z, t, r):
        below = torch.where(t == r, r - 0.1, r)
        return torch.where(wide(t == r), velocity(z, t), exact_u(z, t, below))


# ---------------------------------------------------------------------------------------------------------------------
# Pixel MeanFlow


def test_conversions_invert_each_other_above_the_floor():
    z, t, _ = points()
    x = torch.randn_like(z)
    torch.testing.assert_close(data_from_velocity(z, velocity_from_data(z, x, t), t), x, rtol=1e-12, atol=1e-12)
    low = torch.full_like(t, 0.01)
    torch.testing.assert_close(velocity_from_data(z, x, low), (z - x) / 0.05, rtol=1e-12, atol=0)


def test_pixel_targets_are_clipped_on_both_sides():
    """Below t = 0.05 the target is (z - x) / 0.05, above it e - x; with r = t this is JiT's velocity loss."""
    network, given = two_headed(guided=False, prediction="x"), batch()
    given["t"] = given["r"] = torch.linspace(0.005, 0.9, 12, dtype=torch.float64)
    terms = call(ImprovedMeanFlowLoss(head="boundary", t_floor=0.05), network, given)
    z, v = parts(given)
    t, labels = given["t"], given["labels"]
    image = network.model(z, torch.stack([t, 0 * t], 1), class_labels=labels)[:, :1]
    clipped = wide(t.clamp(min=0.05))
    expected = ((given["x"] - image) / clipped).square().flatten(1).sum(1)
    torch.testing.assert_close(terms.u, expected.detach(), rtol=1e-9, atol=1e-12)
    above = t >= 0.05
    torch.testing.assert_close(velocity_from_data(z, given["x"], t)[above], v[above], rtol=1e-9, atol=1e-12)


def test_a_perfect_image_network_on_a_point_has_no_loss_also_below_the_floor():
    class Point(nn.Module):
        def forward(self, z, t, r):
            return velocity_from_data(z, torch.full_like(z, 0.7), t)

    given = batch()
    given["x"] = torch.full_like(given["x"], 0.7)
    loss = ImprovedMeanFlowLoss(head="boundary", t_floor=0.05)
    given["t"] = given["t"].clamp(min=0.06)
    given["r"] = torch.minimum(given["r"], given["t"])
    assert call(loss, Point(), given, class_labels=None).u.max() < 1e-25
    given["t"] = given["r"] = torch.linspace(0.001, 0.05, 12, dtype=torch.float64)
    assert call(loss, Point(), given, class_labels=None).u.max() < 1e-25


@pytest.mark.parametrize("side", [1, -1])
def test_the_derivative_passes_the_conversion_on_both_sides_of_the_floor(side):
    network = two_headed(guided=False, prediction="x")
    z, v = parts(batch())
    t = torch.full((12,), 0.05 + side * 0.005, dtype=torch.float64)
    r, h = t * 0.3, 1e-6
    found = total_derivative(network, z, t, r, (v, 1.0, 0.0))
    with torch.no_grad():
        ends = [network(z + s * v, t + s, r) for s in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))


def test_a_further_loss_of_the_implied_image():
    network, given = two_headed(guided=False, prediction="x"), batch()
    seen = {}

    def perceptual(image, x, t, weighted):
        seen.update(image=image, x=x, t=t)
        return 0.4 * weighted((image - x).abs().flatten(1).sum(1))

    loss = ImprovedMeanFlowLoss(head="boundary", t_floor=0.05)
    terms, plain = call(loss, network, given, perceptual=perceptual), call(loss, network, given)
    z, _ = parts(given)
    u = network(z, given["t"], given["r"], class_labels=given["labels"])
    torch.testing.assert_close(seen["image"], z - wide(given["t"]) * u)
    distance = (seen["image"] - given["x"]).abs().flatten(1).sum(1)
    torch.testing.assert_close(terms.loss - plain.loss, 0.4 * distance / (distance + 0.01), rtol=1e-9, atol=1e-12)
    assert seen["image"].requires_grad and torch.equal(seen["x"], given["x"])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def plain(given, **changes):
    return call(MeanFlowLoss(), net(), {**given, **changes})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda b: MeanFlowLoss(power=-1), "power must be >= 0"),
        (lambda b: MeanFlowLoss(eps=0), "eps must be > 0"),
        (lambda b: MeanFlowLoss(kappa=1.0), "kappa must be >= 0 and < 1"),
        (lambda b: MeanFlowLoss(start=0.5, end=0.2), "end must be >= 0.5"),
        (lambda b: MeanFlowLoss(tangent_t=math.nan), "tangent_t must be a number"),
        (lambda b: ImprovedMeanFlowLoss(head="aux"), "head must be one of auxiliary, boundary"),
        (lambda b: ImprovedMeanFlowLoss(uncond_omega="two"), "uncond_omega must be one of one, same"),
        (lambda b: ImprovedMeanFlowLoss(t_floor=2), "t_floor must be >= 0 and <= 1"),
        (lambda b: TwoHeadVelocity(model=mlp(num_times=3)), "is conditioned on 2 numbers .* but takes 3"),
        (lambda b: TwoHeadVelocity(model=mlp(out_channels=3)), "out_channels must be in_channels=1"),
        (lambda b: TwoHeadVelocity(model=mlp())(*points(4), heads="v"), "has no v-head"),
        (lambda b: plain(b, r=b["t"] + 0.01), "times must satisfy 0 <= r <= t <= 1"),
        (lambda b: plain(b, t=b["t"] + 1), "times must satisfy"),
        (lambda b: plain(b, e=b["e"][:6]), r"one value per sample, got x \(12, 1, 2, 2\), e \(6, 1, 2, 2\)"),
        (lambda b: plain(b, x=b["x"][..., :1], e=b["e"][..., :1]), "images of shape"),
        (lambda b: call(MeanFlowLoss(omega=2.0), net(), b, class_labels=None), "omega and kappa guide by class"),
        (
            lambda b: call(ImprovedMeanFlowLoss(), two_headed(), b, omega=torch.ones(12)),
            "needs class labels, t_min and t_max",
        ),
    ],
)
def test_bad_arguments_and_input_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make(batch())
