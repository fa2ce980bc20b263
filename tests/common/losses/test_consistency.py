"""ECT: the schedule table, the loss on cases with a known answer, where gradients flow, and that skipping the teacher
where r = 0 changes nothing. Numbers of the official code are in tests/fixtures/losses.
"""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.diffusion.precond import EDMPrecond
from common.diffusion.time import LogNormal
from common.errors import UserError
from common.losses.consistency import ConsistencyLoss, ratio, stage_of_step, t_to_r


class Net(nn.Module):
    """A small raw network with the house signature: two convolutions, explicit dropout masks; counts calls and rows."""

    def __init__(self, p=0.0, label_dim=0):
        super().__init__()
        self.img_resolution, self.in_channels, self.out_channels, self.label_dim = 4, 3, 3, label_dim
        self.augment_dim, self.p = 0, p
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time, self.label = nn.Linear(1, 8), nn.Linear(max(label_dim, 1), 8, bias=False)
        self.calls = []

    def draw_dropout(self, x, generator=None):
        if not self.p:
            return ()
        mask = torch.empty(x.shape[0], 8, 4, 4, dtype=torch.bool, device=x.device)
        return (mask.bernoulli_(1 - self.p, generator=generator),)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, dropout_masks=None):
        assert bool(torch.isfinite(noise_labels).all()), "sigma = 0 reached the network"
        self.calls.append((x.shape[0], torch.is_grad_enabled(), self.training))
        emb = self.time(noise_labels[:, None].to(x.dtype))
        if class_labels is not None:
            emb = emb + self.label(class_labels)
        h = torch.tanh(self.first(x) + emb[:, :, None, None])
        if self.training and self.p:
            keep = dropout_masks[0] if dropout_masks is not None else torch.empty_like(h).bernoulli_(1 - self.p)
            h = h * keep / (1 - self.p)
        return self.last(h)


def build(p=0.0, label_dim=0, dtype=torch.float32):
    torch.manual_seed(0)
    return EDMPrecond(model=Net(p, label_dim)).to(dtype).train()


def batch(n=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype) * 2 - 1
    eps = torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype)
    t = torch.linspace(-4, 3, n, dtype=dtype).exp()
    return y, t, eps


def gradients(net, losses):
    net.zero_grad()
    losses.mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


# --- schedule -------------------------------------------------------------------------------------------------------

TIMES = [0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0]
TABLE = {
    0: [0, 0, 0, 0, 0.0232, 0.4732, 0.5],
    1: [0, 0, 0, 0.2121, 0.5116, 0.7366, 0.75],
    2: [0.3775, 0.4000, 0.4975, 0.6061, 0.7558, 0.8683, 0.875],
    3: [0.6888, 0.7000, 0.7487, 0.8030, 0.8779, 0.9342, 0.9375],
    5: [0.9222, 0.9250, 0.9372, 0.9508, 0.9695, 0.9835, 0.9844],
    7: [0.9806, 0.9813, 0.9843, 0.9877, 0.9924, 0.9959, 0.9961],
}


@pytest.mark.parametrize("stage", TABLE)
def test_schedule_table(stage):
    got = ratio(torch.tensor(TIMES, dtype=torch.float64), stage, q=2)
    torch.testing.assert_close(got, torch.tensor(TABLE[stage], dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage, share", [(0, 0.811), (1, 0.586), (2, 0.0)])
def test_share_of_samples_compared_with_the_image_itself(stage, share):
    t = LogNormal(mean=-1.1, std=2.0)(400_000, torch.Generator().manual_seed(0))
    assert abs((t_to_r(t, stage, q=2) == 0).float().mean() - share) < 0.003


def test_q4_stage_s_is_q2_stage_2s_plus_1_and_q256_starts_at_stage_7():
    t = torch.logspace(-3, 2, 50, dtype=torch.float64)
    for stage in range(4):
        torch.testing.assert_close(ratio(t, stage, q=4), ratio(t, 2 * stage + 1, q=2), rtol=0, atol=1e-12)
    torch.testing.assert_close(ratio(t, 0, q=256), ratio(t, 7, q=2), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    t=st.floats(1e-4, 1e3),
    stage=st.integers(0, 30),
    q=st.floats(1.0, 300.0),
    k=st.floats(0, 20),
    adj=st.sampled_from(["sigmoid", "const"]),
)
def test_r_is_between_zero_and_t_and_grows_with_the_stage(t, stage, q, k, adj):
    t = torch.tensor([t], dtype=torch.float64)
    r = [t_to_r(t, s, q, k=k, adj=adj) for s in (stage, stage + 1)]
    assert 0 <= r[0] <= r[1] <= t
    assert t_to_r(t, stage, q, k=k, adj=adj, ratio_limit=0.5) <= 0.5 * t


def test_gap_vanishes_with_the_stage():
    t = torch.logspace(-3, 2, 50, dtype=torch.float64)
    gaps = [(1 - ratio(t, stage, q=2)).max().item() for stage in range(3, 40)]
    assert all(b <= a / 1.99 for a, b in pairwise(gaps)) and gaps[-1] < 1e-10


def test_stages_follow_the_step_number():
    assert [stage_of_step(s, 100, 3) for s in (0, 99, 100, 199, 200, 10**6)] == [0, 0, 1, 1, 2, 2]


# --- cases with a known answer --------------------------------------------------------------------------------------


def test_first_stage_with_q_towards_one_is_plain_denoising_over_t():
    net, (y, t, eps) = build(dtype=torch.float64), batch(dtype=torch.float64)
    got = ConsistencyLoss(q=1 + 1e-9, adj="const")(net, y, t, eps, stage=0)
    x = y + t.reshape(-1, 1, 1, 1) * eps
    expected = (net(x, t) - y).square().flatten(1).sum(1).sqrt() / t
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    net.model.calls.clear()
    torch.testing.assert_close(ConsistencyLoss(q=1, adj="const")(net, y, t, eps, stage=0), expected)
    assert net.model.calls == [(12, True, True)]  # q = 1: every target is the image, no teacher pass at all


class Exact(nn.Module):
    """A consistency function given by a formula."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x, sigma, class_labels=None, augment_labels=None, dropout_masks=None):
        assert bool((sigma > 0).all())
        return self.formula(x, sigma.reshape(-1, 1, 1, 1))


@settings(deadline=None, max_examples=25)
@given(stage=st.integers(0, 8), skip=st.booleans(), c=st.sampled_from([0.0, 0.06]))
def test_point_mass_has_zero_loss(stage, skip, c):
    y, t, eps = batch(dtype=torch.float64)
    y = y[:1].expand_as(y)
    net = Exact(lambda x, sigma: y[:1].expand(x.shape[0], -1, -1, -1))
    loss = ConsistencyLoss(c=c, skip_zero=skip, official=True)(net, y, t, eps, stage=stage)
    assert torch.equal(loss, torch.zeros(12, dtype=torch.float64))


M, S = 0.2, 0.5


def gaussian_map(x, sigma):
    """Probability-flow map to time 0 for data N(M, S^2)."""
    return M + S * (x - M) / (S**2 + sigma**2).sqrt()


def test_gaussian_data_zero_gap_along_one_trajectory():
    t = torch.logspace(-2, 2, 20, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x_t = M + torch.randn(20, 1, 1, 1, dtype=torch.float64) * (S**2 + t**2).sqrt()
    for share in (0.0, 0.3, 0.99):
        r = share * t
        x_r = M + (x_t - M) * ((S**2 + r**2) / (S**2 + t**2)).sqrt()
        torch.testing.assert_close(gaussian_map(x_t, t), gaussian_map(x_r, r), rtol=1e-12, atol=1e-12)


def test_gaussian_data_gap_of_shared_noise_pairs_is_of_order_dt():
    """The eps-shared pair is not on one trajectory, but its gap shrinks like t - r."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    y = M + S * torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    eps = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    t = torch.full((n,), 0.8, dtype=torch.float64)
    loss = ConsistencyLoss()
    gaps = []
    for dt in (0.08, 0.04, 0.02, 0.01):
        delta = loss.difference(Exact(gaussian_map), y, t, t - dt, eps)
        gaps.append(delta.abs().mean().item())
    assert all(1.9 < a / b < 2.1 for a, b in pairwise(gaps))
    # and along the ODE step of the exact denoiser it is an order smaller (distillation)
    denoiser = Exact(lambda x, sigma: M + (x - M) * S**2 / (S**2 + sigma**2))
    for solver, order in (("euler", 2), ("heun", 3)):
        loss = ConsistencyLoss(ode_solver=solver)
        gaps = [
            loss.difference(Exact(gaussian_map), y, t, t - dt, eps, ode_teacher=denoiser).abs().mean().item()
            for dt in (0.08, 0.04, 0.02)
        ]
        assert all(order - 0.3 < math.log2(a / b) < order + 0.4 for a, b in pairwise(gaps))


def test_official_golden_numbers(repo):
    """Per-sample losses of the official ECMLoss (both branches) on formula-made inputs and network."""
    stored = json.loads((repo / "tests/fixtures/losses/ect_official.json").read_text())

    def formula(x, sigma):
        total = sigma**2 + 0.25
        raw = torch.sin(3 * torch.roll(x, 1, -1) / total.sqrt() + sigma.log() / 4)
        return 0.25 / total * x + sigma * 0.5 / total.sqrt() * raw

    n = torch.arange(8 * 3 * 4 * 4, dtype=torch.float64)
    y = torch.sin(0.37 * n).reshape(8, 3, 4, 4).float()
    eps = (1.3 * torch.cos(1.7 * n + 0.2)).reshape(8, 3, 4, 4).float()
    t = torch.linspace(-4, 4, 8).exp()
    assert len(stored["cases"]) == 16
    for case in stored["cases"]:
        loss = ConsistencyLoss(q=case["q"], c=case["c"], adj=case["adj"], weight=case["weight"], official=True)
        got = loss(Exact(formula), y, t, eps, stage=case["stage"])
        torch.testing.assert_close(got, torch.tensor(case["loss"]), rtol=1e-5, atol=0)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stage", [0, 2, 7])
def test_gradient_equals_that_of_a_frozen_copy_bitwise(stage, skip):
    net, (y, t, eps) = build(p=0.3, dtype=torch.float64), batch(dtype=torch.float64)
    masks = net.draw_dropout(y)
    loss = ConsistencyLoss(skip_zero=skip)
    own = gradients(net, loss(net, y, t, eps, stage=stage, dropout_masks=masks))
    frozen = copy.deepcopy(net).requires_grad_(False)
    other = gradients(net, loss(net, y, t, eps, stage=stage, dropout_masks=masks, teacher=frozen))
    assert all(torch.equal(a, b) for a, b in zip(own, other))


def test_gradient_is_the_derivative_with_the_target_held():
    net, (y, t, eps) = build(dtype=torch.float64), batch(dtype=torch.float64)
    frozen = copy.deepcopy(net).requires_grad_(False)
    loss = ConsistencyLoss(c=0.06)
    grads = gradients(net, loss(net, y, t, eps, stage=3))
    weight, h = net.model.last.weight, 1e-6
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0, 1, 1] += sign * h
            slopes.append(loss(net, y, t, eps, stage=3, teacher=frozen).mean().item())
            weight[0, 0, 1, 1] -= sign * h
    index = [id(p) for p in net.parameters() if p.requires_grad and p is not net.model.label.weight].index(id(weight))
    assert grads[index][0, 0, 1, 1].item() == pytest.approx((slopes[0] - slopes[1]) / (2 * h), rel=1e-6)


def test_gradient_stays_finite_where_the_difference_is_zero():
    weight = torch.zeros(1, requires_grad=True)
    y, t, eps = batch()
    net = Exact(lambda x, sigma: x * 0 + weight)
    ConsistencyLoss()(net, torch.zeros_like(y), t, eps, stage=0).mean().backward()
    assert bool(torch.isfinite(weight.grad).all())
    weight.grad = None
    ConsistencyLoss(official=True)(net, torch.zeros_like(y), t, eps, stage=0).mean().backward()
    assert bool(weight.grad.isnan().all())  # the oracle switch keeps the official behaviour


@pytest.mark.parametrize("label_dim", [0, 5])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_skipping_the_teacher_where_r_is_zero_changes_nothing(stage, label_dim):
    net, (y, t, eps) = build(p=0.3, label_dim=label_dim), batch()
    labels = torch.eye(5)[torch.arange(12) % 5] if label_dim else None
    masks = net.draw_dropout(y)
    results = []
    for skip in (True, False):
        losses = ConsistencyLoss(skip_zero=skip)(net, y, t, eps, stage=stage, class_labels=labels, dropout_masks=masks)
        results.append((losses.detach(), gradients(net, losses)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_only_the_needed_rows_take_a_teacher_pass_without_gradient_and_before_the_student():
    net, (y, t, eps) = build(p=0.3), batch()
    for stage in (0, 1, 2):
        net.model.calls.clear()
        loss = ConsistencyLoss()
        live = int((loss.t_to_r(t, stage) > 0).sum())
        loss(net, y, t, eps, stage=stage)
        assert net.model.calls == [(live, False, True), (12, True, True)]
    net.model.calls.clear()
    ConsistencyLoss()(net, y, torch.full((12,), 0.1), eps, stage=0)
    assert net.model.calls == [(12, True, True)]


def test_one_row_of_labels_serves_the_whole_batch():
    net, (y, t, eps) = build(label_dim=5), batch()
    one = torch.eye(5)[:1]
    a = ConsistencyLoss()(net, y, t, eps, stage=0, class_labels=one)
    b = ConsistencyLoss()(net, y, t, eps, stage=0, class_labels=one.expand(12, 5))
    torch.testing.assert_close(a, b)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["given", "drawn"])
def test_synchronised_dropout_makes_equal_times_agree_exactly(masks):
    net, (y, t, eps) = build(p=0.5), batch()
    given_masks = net.draw_dropout(y) if masks == "given" else None
    loss = ConsistencyLoss()
    assert torch.count_nonzero(loss.difference(net, y, t, t, eps, dropout_masks=given_masks)) == 0
    r = torch.where(torch.arange(12) % 3 == 0, torch.zeros(()), t)  # some rows only: masks are selected with them
    delta = loss.difference(net, y, t, r, eps, dropout_masks=given_masks)
    assert delta.abs().flatten(1).amax(1)[r > 0].max() < 1e-5
    off = ConsistencyLoss(sync_dropout=False).difference(net, y, t, t, eps, dropout_masks=given_masks)
    assert off.abs().mean() > 1e-3


# --- weights, precision, devices ------------------------------------------------------------------------------------


def test_weights_and_metric():
    net, (y, t, eps) = build(dtype=torch.float64), batch(dtype=torch.float64)
    r = t_to_r(t, 1, q=2)
    base = ConsistencyLoss(weight="uniform")(net, y, t, eps, stage=1)
    delta = ConsistencyLoss().difference(net, y, t, r, eps)
    squared = delta.square().flatten(1).sum(1)
    torch.testing.assert_close(base, squared.sqrt())
    torch.testing.assert_close(ConsistencyLoss()(net, y, t, eps, stage=1), squared.sqrt() / (t - r))
    huber = ConsistencyLoss(weight="snrpk", c=0.06, sigma_data=0.7)(net, y, t, eps, stage=1)
    torch.testing.assert_close(huber, ((squared + 0.06**2).sqrt() - 0.06) * (1 / t**2 + 1 / 0.7**2))


def test_ratio_limit():
    t = torch.tensor([1.0, 50.0])
    assert ConsistencyLoss(ratio_limit=0.99).t_to_r(t, 12).tolist() == pytest.approx([0.99, 49.5])


def test_autocast_keeps_the_students_gradient():
    """The teacher pass comes first, without gradient. In older torch autocast kept the weights it cast there and gave
    them, gradient-free, to the student (pytorch issue 112583); the torch we require must not.
    """
    net, (y, t, eps) = build(), batch()
    full = gradients(net, ConsistencyLoss()(net, y, t, eps, stage=2))
    with torch.autocast("cpu", torch.bfloat16):
        losses = ConsistencyLoss()(net, y, t, eps, stage=2)
    low = gradients(net, losses)
    assert losses.dtype == torch.float32 and len(low) == len(full)
    num = sum((a - b).square().sum() for a, b in zip(full, low)).sqrt()
    assert num < 0.1 * sum(a.square().sum() for a in full).sqrt()


def test_runs_on_tensors_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net, (y, t, eps) = EDMPrecond(model=Net()), (torch.empty(4, 3, 4, 4), torch.empty(4), torch.empty(4, 3, 4, 4))
        net.model.forward = lambda x, noise_labels, **_: net.model.last(net.model.first(x))
        assert ConsistencyLoss()(net, y, t, eps, stage=0).shape == (4,)


def test_edm2_weights_are_the_same_in_both_passes():
    from common.diffusion.precond import EDM2Precond
    from common.nets.edm2 import EDM2UNet

    torch.manual_seed(0)
    model = EDM2UNet(
        img_resolution=4, img_channels=3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[],
        channels_per_head=16, dropout=0.4,
    )  # fmt: skip
    net = EDM2Precond(model=model, logvar_channels=0).train()
    with torch.no_grad():
        model.out_gain.fill_(1)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y, t, eps = batch()
    delta = ConsistencyLoss().difference(net, y, t, t, eps)
    assert torch.count_nonzero(delta) == 0
    delta = ConsistencyLoss().difference(net, y, t, 0.5 * t, eps)
    delta.square().sum().backward()
    assert model.out_conv.weight.grad is not None and model.out_conv.forced


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ConsistencyLoss(q=0.5), "q must be >= 1"),
        (lambda: ConsistencyLoss(k=-1), "k must be >= 0"),
        (lambda: ConsistencyLoss(adj="sigmod"), "adj must be one of sigmoid, const, got 'sigmod'. Closest: sigmoid"),
        (lambda: ConsistencyLoss(weight="snr"), "weight must be one of"),
        (lambda: ConsistencyLoss(c=-0.1), "c must be >= 0"),
        (lambda: ConsistencyLoss(ratio_limit=1.5), "ratio_limit must be >= 0 and <= 1"),
        (lambda: ConsistencyLoss(ode_solver="rk"), "ode_solver must be one of"),
        (lambda: ConsistencyLoss(sigma_data=0), "sigma_data must be > 0"),
        (lambda: ConsistencyLoss().t_to_r(torch.ones(1), -1), "stage must be a whole number >= 0"),
        (lambda: stage_of_step(0, 0, 3), "steps_per_stage must be a whole number >= 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UserError, match=message):
        call()
