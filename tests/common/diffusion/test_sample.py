"""Solvers against the closed form on Gaussian data, evaluation counts, fixed randomness per image, guidance."""

import json
import math
from itertools import pairwise

import pytest
import torch

from common.diffusion.guidance import CFG, Autoguidance, BoundVelocity, Conditional
from common.diffusion.paths import VE, VP, DiscreteVP, Linear
from common.diffusion.sample import (
    DDIM,
    AverageVelocitySteps,
    Direct,
    Euler,
    FlowEuler,
    Heun,
    ImageNoise,
    Multistep,
    karras_grid,
)
from common.errors import UserError

STD = 0.5


class Oracle:
    """Exact denoiser of x ~ N(0, STD^2), counting its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma):
        assert sigma.shape == (x.shape[0],) and x.dtype == torch.float64
        self.calls.append(float(sigma[0]))
        return x * (STD**2 / (STD**2 + sigma**2)).reshape(-1, 1, 1, 1)


def latents(n=2):
    return torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def relative_error(sampler):
    """Against x_0 = x_80 STD / sqrt(STD^2 + 80^2), the end of the probability-flow ODE."""
    z = latents()
    exact = 80 * z * STD / math.sqrt(STD**2 + 80**2)
    return ((sampler(Oracle(), z) - exact) / exact).abs().max().item()


@pytest.mark.parametrize("steps, error", [(10, 0.220), (18, 0.0553), (40, 0.00977), (80, 0.00231), (256, 0.000210)])
def test_heun_error_table(steps, error):
    assert relative_error(Heun(steps=steps)) == pytest.approx(error, rel=6e-3)


def test_heun_is_second_order_and_euler_first():
    heun = [relative_error(Heun(steps=n)) for n in (64, 128, 256)]
    euler = [relative_error(Euler(steps=n)) for n in (256, 512, 1024)]
    assert all(1.9 < math.log2(a / b) < 2.2 for a, b in pairwise(heun))
    assert all(0.9 < math.log2(a / b) < 1.1 for a, b in pairwise(euler))


def test_direct_calls_once_and_truncates_by_quantiles():
    calls = []
    z = torch.randn(40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Direct()(lambda x: calls.append(x) or 2 * x, z), 2 * z) and len(calls) == 1
    assert Direct().nfe == 1
    cut = Direct(truncation=0.8)(lambda x: x, z)
    assert cut.abs().max() < 0.8 and torch.equal(cut.argsort(dim=0), z.argsort(dim=0))
    normal = torch.distributions.Normal(0.0, 1.0)
    inside = normal.cdf(torch.tensor(0.8)) - normal.cdf(torch.tensor(-0.8))
    for at in (-0.5, 0.0, 0.3, 0.7):  # the distribution function of the truncated normal
        want = (normal.cdf(torch.tensor(at)) - normal.cdf(torch.tensor(-0.8))) / inside
        assert (cut < at).double().mean().item() == pytest.approx(want.item(), abs=0.01)
    far = Direct(truncation=2.0)(lambda x: x, torch.tensor([[-40.0, 40.0]]))
    torch.testing.assert_close(far, torch.tensor([[-2.0, 2.0]]))


def test_karras_grid():
    grid = karras_grid(18)
    assert len(grid) == 19 and grid[0] == pytest.approx(80) and grid[17] == pytest.approx(0.002) and grid[18] == 0
    assert grid[5] == pytest.approx((80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    assert karras_grid(1) == [pytest.approx(80), 0.0]


@pytest.mark.parametrize(
    "sampler, nfe",
    [
        (Heun(steps=18), 35),
        (Heun(steps=40), 79),
        (Heun(steps=1), 1),
        (Euler(steps=7), 7),
        (Multistep(), 1),
        (Multistep(mids=(0.821,)), 2),
        (DDIM(path=VP(), steps=5), 5),
    ],
)
def test_evaluation_counts(sampler, nfe):
    oracle = Oracle()
    out = sampler(oracle, latents(), lambda k: latents())
    assert len(oracle.calls) == nfe == sampler.nfe and out.dtype == torch.float64
    assert min(oracle.calls) > 0  # sigma = 0 never reaches a network


def test_float32_in_float32_out_with_a_float64_state():
    z = latents().float()
    out = Heun(steps=18)(Oracle(), z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, Heun(steps=18)(Oracle(), z.double()).float())


def test_multistep_reproduces_a_consistency_oracle():
    """f*(x, t) = m + s (x - m)/sqrt(s^2 + t^2): one step lands on the ODE end point, two steps on the data law."""

    def oracle(x, sigma):
        return 0.3 + STD * (x - 0.3) / (STD**2 + sigma**2).sqrt().reshape(-1, 1, 1, 1)

    z = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    one = Multistep()(oracle, z)
    torch.testing.assert_close(one, oracle(80 * z.double(), torch.full((20000,), 80.0)).float())
    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    two = Multistep(mids=(0.821,))(oracle, z, lambda k: noise)
    expected = oracle(one.double() + 0.821 * noise, torch.full((20000,), 0.821)).float()
    torch.testing.assert_close(two, expected, rtol=1e-5, atol=1e-5)
    assert abs(two.mean() - 0.3) < 0.02 and abs(two.std() - STD) < 0.02


@pytest.mark.parametrize("path", [VP(), DiscreteVP(), Linear(), VE()], ids=["vp", "discrete", "linear", "ve"])
def test_ddim_converges_on_every_path(path):
    t_max = 0.99 if isinstance(path, Linear) else 1.0
    z = latents()
    t = torch.tensor(t_max, dtype=torch.float64)
    a, s = float(path.a(t)), float(path.s(t))
    exact = z * s * STD / math.sqrt((a * STD) ** 2 + s**2)
    errors = [
        ((DDIM(path=path, steps=n, t_max=t_max)(Oracle(), z) - exact) / exact).abs().max().item()
        for n in (50, 100, 200)
    ]
    assert errors[2] < 0.05
    assert all(1.6 < x / y < 2.6 for x, y in pairwise(errors))  # DDIM is first order


def test_ddim_with_full_noise_gives_the_data_law():
    z = torch.randn(20000, 1, 1, 1)
    out = DDIM(path=VP(), steps=300, eta=1.0)(Oracle(), z, lambda k: torch.randn(20000, 1, 1, 1))
    assert abs(out.std() - STD) < 0.02


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("path", [VP(), DiscreteVP()], ids=["vp", "discrete"])
def test_ddim_with_fresh_noise_draws_from_the_ddpm_posterior(path, eta):
    """Three steps with the data known to be 0 and known noise: every state follows from the means and variances.

    With abar = a^2 and beta = 1 - abar_t / abar_r, DDPM (arXiv 2006.11239) eq. 7: mean sqrt(1 - beta) (1 - abar_r) /
    (1 - abar_t) x, variance beta (1 - abar_r) / (1 - abar_t). DDIM eq. 16: eta times that standard deviation.
    """
    steps = 4
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    abar = (path.a(times) ** 2).tolist()
    z = latents(1)
    expected, noises = z * math.sqrt(1 - abar[0]), [torch.full_like(z, 10.0**k) for k in range(steps)]
    for k in range(steps - 1):
        beta, left = 1 - abar[k] / abar[k + 1], (1 - abar[k + 1]) / (1 - abar[k])
        variance = beta * left
        if eta == 1:
            mean = math.sqrt(1 - beta) * left * expected
        else:  # eq. 12: the noise that is not drawn afresh keeps its direction
            mean = math.sqrt(1 - abar[k + 1] - eta**2 * variance) / math.sqrt(1 - abar[k]) * expected
        expected = mean + eta * math.sqrt(variance) * noises[k]

    seen = []

    def nothing(x, sigma):
        seen.append(x * math.sqrt(abar[len(seen)]))  # the denoiser is given x / a
        return torch.zeros_like(x)

    DDIM(path=path, steps=steps, eta=eta)(nothing, z, lambda k: noises[k])
    torch.testing.assert_close(seen[-1], expected, rtol=1e-9, atol=1e-12)


def test_flow_euler_closed_form_and_order():
    """v = E[e - x | z] for x ~ N(0, STD^2); end point z_0 = STD z_1 (sd_0/sd_1 with sd_1 = 1)."""

    def velocity(z, t):
        c = t.reshape(-1, 1, 1, 1)
        return z * (c - (1 - c) * STD**2) / ((1 - c) ** 2 * STD**2 + c**2)

    z = latents()
    errors = [((FlowEuler(steps=n)(velocity, z) - STD * z) / z).abs().max().item() for n in (50, 100, 200)]
    assert all(1.7 < a / b < 2.3 for a, b in pairwise(errors))
    seen = []
    FlowEuler(steps=2, shift=0.5)(lambda z, t: seen.append(float(t[0])) or z, z)
    assert seen == [1.0, pytest.approx(0.5 * 0.5 / (1 - 0.25))]


def exact_average_velocity(z, t, r):
    """Of data N(0.4, 0.3^2): the flow map of the linear path in closed form."""
    m, s = 0.4, 0.3
    sd = lambda t: ((1 - t) ** 2 * s**2 + t**2).sqrt().reshape(-1, 1, 1, 1)
    mean = lambda t: ((1 - t) * m).reshape(-1, 1, 1, 1)
    z_r = mean(r) + sd(r) / sd(t) * (z - mean(t))
    return (z - z_r) / (t - r).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler, nfe", [
    (AverageVelocitySteps(), 1), (AverageVelocitySteps(steps=4), 4), (AverageVelocitySteps(times=[0.9, 0.2]), 3),
])  # fmt: skip
def test_average_velocity_steps_are_exact_for_the_exact_velocity(sampler, nfe):
    """Any number of jumps ends at m + s e: one jump is as good as many."""
    z = latents().double()
    calls = []
    velocity = lambda z, t, r: calls.append((float(t[0]), float(r[0]))) or exact_average_velocity(z, t, r)
    torch.testing.assert_close(sampler(velocity, z), 0.4 + 0.3 * z, rtol=0, atol=1e-14)
    assert len(calls) == nfe == sampler.nfe and calls[0][0] == 1 and calls[-1][1] == 0
    assert all(before[1] == after[0] for before, after in pairwise(calls))


class Guided(torch.nn.Module):
    """Keeps the inputs of every call."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.inputs = []

    def forward(self, z, t, r, **given):
        self.inputs.append((z.dtype, t.tolist(), r.tolist(), given))
        return self.weight * z


def test_bound_velocity_tells_labels_and_guidance_in_the_type_of_the_network():
    net, z = Guided(), latents().float()
    bound = BoundVelocity(net=net, class_labels=torch.eye(2), noise_scale=2.0, guidance=(1.0, 8.0))
    out = AverageVelocitySteps(omega=7.5, t_min=0.1, t_max=0.7)(bound, z)
    assert out.dtype == torch.float32 and not out.any()  # u = z: 2 z - 2 z
    dtype, t, r, given = net.inputs[0]
    assert (dtype, t, r) == (torch.float32, [1, 1], [0, 0]) and torch.equal(given["class_labels"], torch.eye(2))
    assert [given[k].tolist() for k in ("omega", "t_min", "t_max")] == [
        [7.5, 7.5], pytest.approx([0.1, 0.1]), pytest.approx([0.7, 0.7])
    ]  # fmt: skip
    FlowEuler(steps=2)(BoundVelocity(net=net), z)
    assert [call[1:3] for call in net.inputs[1:]] == [([1, 1], [1, 1]), ([0.5, 0.5], [0.5, 0.5])]  # r = t: the velocity
    assert all("omega" not in call[3] and "class_labels" not in call[3] for call in net.inputs[1:])
    with pytest.raises(UserError, match=r"omega must lie in the trained range 1 to 8, got 9\. Set omega=8"):
        AverageVelocitySteps(omega=9.0)(bound, z)
    AverageVelocitySteps(omega=10.5, beyond=True)(bound, z)
    assert net.inputs[-1][3]["omega"].tolist() == [10.5, 10.5]
    assert AverageVelocitySteps(omega=10.5, t_min=0.4).variant == "omega10.5-t0.4-1"
    assert AverageVelocitySteps(steps=2).variant == ""
    with pytest.raises(UserError, match="omega=2 is given, but this network was trained without it"):
        AverageVelocitySteps(omega=2.0)(BoundVelocity(net=net), z)


def test_churn_adds_noise_only_inside_its_range_and_keeps_the_law():
    z = torch.randn(8000, 1, 1, 1)
    asked = []

    def noise(k):
        asked.append(k)
        return torch.randn(8000, 1, 1, 1, generator=torch.Generator().manual_seed(k))

    sampler = Heun(steps=100, churn=20, s_min=0.05, s_max=50)
    out = sampler(Oracle(), z, noise)
    inside = [k for k, sigma in enumerate(karras_grid(100)[:-1]) if 0.05 <= sigma <= 50]
    assert asked == inside
    assert abs(out.std() - STD) < 0.02
    with pytest.raises(UserError, match="Heun with churn > 0 draws fresh noise"):
        sampler(Oracle(), z)


def test_official_sampler(repo):
    """edm_sampler of the official code, plain and with churn, around one made-up denoiser and the same fresh draws."""

    def by_formula(count, salt):
        k = torch.arange(count, dtype=torch.int64) + 1
        return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1

    def denoiser(x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + 0.25
        raw = torch.sin(3 * x / total.sqrt() + sigma.log() / 4)
        return 0.25 / total * x + 0.5 * sigma / total.sqrt() * raw

    names = {"num_steps": "steps", "S_churn": "churn", "S_min": "s_min", "S_max": "s_max", "S_noise": "s_noise"}
    z = 1.7 * by_formula(6, 3).reshape(2, 3, 1, 1)
    cases = json.loads((repo / "tests/fixtures/diffusion/edm_official.json").read_text())["heun"]
    assert sum("S_churn" in case["options"] for case in cases) == 2
    for case in cases:
        sampler = Heun(**{names.get(key, key): value for key, value in case["options"].items()})
        out = sampler(denoiser, z, lambda k: 1.7 * by_formula(6, 50 + k).reshape(2, 3, 1, 1))
        torch.testing.assert_close(out.flatten().tolist(), case["image"], rtol=1e-8, atol=1e-10)


def test_every_solver_reaches_the_closed_form_of_data_with_a_mean():
    """x ~ N(0.3, STD^2): z_r = (1-r) m + sd_r/sd_t (z_t - (1-t) m) on the linear path, the same ODE in sigma."""
    mean, z = 0.3, latents()

    def denoiser(x, sigma):
        return mean + (x - mean) * (STD**2 / (STD**2 + sigma**2)).reshape(-1, 1, 1, 1)

    def velocity(x, t):
        c = t.reshape(-1, 1, 1, 1)
        gain = (c - (1 - c) * STD**2) / ((1 - c) ** 2 * STD**2 + c**2)
        return gain * (x - (1 - c) * mean) - mean

    def linear_end(t, start):
        return mean + STD / math.sqrt((1 - t) ** 2 * STD**2 + t**2) * (start - (1 - t) * mean)

    sigma_end = mean + STD / math.sqrt(STD**2 + 80**2) * (80 * z - mean)
    solvers = [
        (lambda n: Heun(steps=n)(denoiser, z), sigma_end, 2),
        (lambda n: Euler(steps=n)(denoiser, z), sigma_end, 1),
        (lambda n: FlowEuler(steps=n)(velocity, z), linear_end(1.0, z), 1),
        (lambda n: DDIM(path=Linear(), steps=n, t_max=0.9)(denoiser, z), linear_end(0.9, 0.9 * z), 1),
    ]
    for solve, exact, order in solvers:
        errors = [(solve(n) - exact).abs().max().item() for n in (64, 128, 256)]
        assert errors[-1] < 0.02
        assert all(order - 0.1 < math.log2(a / b) < order + 0.2 for a, b in pairwise(errors))


def test_grid_respects_what_the_network_supports():
    class Limited(Oracle):
        sigma_min, sigma_max = 0.02, 50.0

        @staticmethod
        def round_sigma(sigma):
            return (sigma * 10).ceil() / 10

    net = Limited()
    Euler(steps=6)(net, latents())
    assert net.calls[0] == pytest.approx(50) and net.calls[-1] == pytest.approx(0.1)
    assert all(abs(sigma * 10 - round(sigma * 10)) < 1e-9 for sigma in net.calls)


@pytest.mark.parametrize("seed", [0, 7])
def test_image_noise_is_the_same_in_every_batch(seed):
    make = lambda indices: ImageNoise(seed=seed, indices=indices, shape=(3, 2, 2))
    together = make(range(200))
    single = make([130])
    odd = make(torch.tensor([199, 3, 64, 63, 3]))
    assert torch.equal(together.z[130], single.z[0])
    assert torch.equal(odd.z, together.z[[199, 3, 64, 63, 3]])
    assert torch.equal(odd.noise(2), together.noise(2)[[199, 3, 64, 63, 3]])
    assert torch.equal(odd.labels(10), together.labels(10)[[199, 3, 64, 63, 3]])
    assert len(torch.unique(together.z)) == together.z.numel()  # no block repeats another
    assert not torch.equal(together.z, together.noise(0)) and not torch.equal(together.noise(0), together.noise(1))
    assert not torch.equal(make(range(200)).z, ImageNoise(seed=seed + 1, indices=range(200), shape=(3, 2, 2)).z)
    labels = make(range(5000)).labels(10)
    assert labels.dtype == torch.int64 and torch.bincount(labels, minlength=10).min() > 400
    z = make(range(5000)).z
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_image_i_does_not_depend_on_the_batch_size():
    sampler = Multistep(mids=(0.821,))
    whole = ImageNoise(seed=1, indices=range(10), shape=(1, 2, 2))
    part = ImageNoise(seed=1, indices=range(4, 7), shape=(1, 2, 2))
    assert torch.equal(sampler(Oracle(), whole.z, whole.noise)[4:7], sampler(Oracle(), part.z, part.noise))


class Labelled:
    """D depends linearly on the label; counts calls with and without one."""

    sigma_max = 60.0

    def __init__(self, gain=1.0):
        self.gain, self.with_label, self.without = gain, 0, 0

    def __call__(self, x, sigma, class_labels=None):
        if class_labels is None:
            self.without += 1
            return self.gain * x
        self.with_label += 1
        return self.gain * x + class_labels[:, :1].reshape(-1, 1, 1, 1)


LABELS = torch.eye(4)[[0, 1, 0]]


def test_cfg_formula_interval_and_channels():
    x, sigma = torch.randn(3, 4, 2, 2), torch.tensor([0.1, 1.0, 10.0])
    conditional, free = Labelled()(x, sigma, LABELS), Labelled()(x, sigma)
    guided = CFG(net=Labelled(), class_labels=LABELS, scale=3.0)(x, sigma)
    torch.testing.assert_close(guided, free + 3 * (conditional - free))
    part = CFG(net=Labelled(), class_labels=LABELS, scale=3.0, channels=3)(x, sigma)
    torch.testing.assert_close(part[:, :3], guided[:, :3])
    assert torch.equal(part[:, 3:], conditional[:, 3:])
    limited = CFG(net=Labelled(), class_labels=LABELS, scale=3.0, interval=(0.5, 10.0))(x, sigma)
    torch.testing.assert_close(limited[1:], guided[1:])
    assert torch.equal(limited[0], conditional[0])


def test_guidance_wastes_no_evaluations():
    x = torch.randn(3, 4, 2, 2)
    net = Labelled()
    out = CFG(net=net, class_labels=LABELS, scale=1.0)(x, torch.ones(3))
    assert (net.with_label, net.without) == (1, 0) and torch.equal(out, Labelled()(x, None, LABELS))
    CFG(net=net, class_labels=LABELS, scale=2.0, interval=(5.0, 9.0))(x, torch.ones(3))
    assert (net.with_label, net.without) == (2, 0)
    CFG(net=net, class_labels=LABELS, scale=2.0, interval=(0.5, 9.0))(x, torch.ones(3))
    assert (net.with_label, net.without) == (3, 1)


def test_autoguidance_and_conditional():
    x, sigma = torch.randn(3, 4, 2, 2), torch.ones(3)
    good, bad = Labelled(1.0), Labelled(0.5)
    out = Autoguidance(net=good, guide=bad, class_labels=LABELS, scale=2.0)(x, sigma)
    torch.testing.assert_close(out, bad(x, sigma, LABELS) + 2 * (good(x, sigma, LABELS) - bad(x, sigma, LABELS)))
    bound = Conditional(net=good, class_labels=LABELS)
    assert torch.equal(bound(x, sigma), good(x, sigma, LABELS)) and bound.sigma_max == 60.0
    assert not hasattr(bound, "round_sigma")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Heun(steps=0), "steps must be a whole number >= 1, got 0"),
        (lambda: Heun(sigma_min=-0.002), "negative sigma: sigma_min must be > 0"),
        (lambda: Euler(sigma_min=1.0, sigma_max=0.5), "sigma_min must be below sigma_max"),
        (lambda: Heun(sigma_max=math.inf), "both finite"),
        (lambda: Heun(churn=-1), "churn must be >= 0"),
        (lambda: Multistep(sigma_max=-80.0), "negative sigma: sigma_max"),
        (lambda: Multistep(mids=(-0.8,)), "negative sigma: mids"),
        (lambda: Multistep(mids=(0.2, 0.8)), "mids must decrease"),
        (lambda: Multistep(mids=(0.8,))(Oracle(), latents()), "Multistep with mids draws fresh noise"),
        (lambda: DDIM(path=Linear(), steps=4), "t_max must leave some data weight on Linear"),
        (lambda: FlowEuler(steps=-1), "steps must be"),
        (lambda: AverageVelocitySteps(steps=0), "steps must be a whole number >= 1"),
        (lambda: AverageVelocitySteps(times=[0.2, 0.5]), "times must decrease and lie between 1 and 0"),
        (lambda: AverageVelocitySteps(times=[1.0]), "times must decrease"),
        (lambda: AverageVelocitySteps(omega=0.5), "omega must be >= 1"),
        (lambda: AverageVelocitySteps(t_min=0.8, t_max=0.2), "t_max must be >= 0.8"),
        (lambda: ImageNoise(seed=0, indices=[], shape=(1, 2, 2)), "at least one image number"),
        (lambda: ImageNoise(seed=0, indices=[-1], shape=(1, 2, 2)), "at least one image number"),
        (lambda: CFG(net=Labelled(), class_labels=None, scale=2.0), "class_labels must be given"),
        (lambda: CFG(net=Labelled(), class_labels=LABELS, interval=(2.0, 1.0)), "interval high must be > 2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
