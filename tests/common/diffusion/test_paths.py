"""Every conversion on Gaussian data against its closed form, every path; maps between dialects; PF-ODE end points."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.diffusion import paths
from common.diffusion.paths import GVP, KINDS, VE, VP, DataTime, DiscreteVP, Linear
from common.errors import UserError
from common.tensors import append_dims

PATHS = {
    "linear": Linear(),
    "ve": VE(),
    "ve_geometric": VE(sigma_min=0.02, sigma_max=100.0, rho=math.inf),
    "vp": VP(),
    "gvp": GVP(),
    "discrete": DiscreteVP(),
    "sd": DiscreteVP(spacing="sqrt_linear", beta_start=0.00085, beta_end=0.012),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
MEAN, STD = 0.3, 0.5


def gaussian(path, z, t):
    """All four posterior predictions for x ~ N(MEAN, STD^2), from the joint Gaussian of (x, e, z)."""
    a, s, da, ds = (append_dims(c(t), z) for c in (path.a, path.s, path.da, path.ds))
    residual = (z - a * MEAN) / (a**2 * STD**2 + s**2)
    denoiser, eps = MEAN + a * STD**2 * residual, s * residual
    return {"denoiser": denoiser, "eps": eps, "v": da * denoiser + ds * eps, "score": -residual}


@each_path
@pytest.mark.parametrize("source, target", list(itertools.product(KINDS, KINDS)))
def test_conversions_are_exact_on_gaussian_data(path, source, target):
    t = torch.linspace(0.05, 0.9, 18, dtype=torch.float64)
    z = torch.randn(18, 1, 2, 2, dtype=torch.float64) * append_dims(path.s(t), torch.empty(18, 1, 2, 2))
    truth = gaussian(path, z, t)
    got = path.convert(truth[source], source=source, target=target, z=z, t=t)
    # eps -> denoiser divides by a, which loses digits where almost no data is left; compare on the scale of z / a
    scale = truth[target].abs().max() + (z / append_dims(path.a(t), z)).abs().max()
    assert (got - truth[target]).abs().max() <= 1e-10 * scale
    back = path.convert(got, source=target, target=source, z=z, t=t)
    assert (back - truth[source]).abs().max() <= 1e-10 * (truth[source].abs().max() + scale)


def test_formulas_of_the_linear_path():
    z, value = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c = t[:, None]

    def convert(source, target):
        return Linear().convert(value, source=source, target=target, z=z, t=t)

    torch.testing.assert_close(convert("v", "denoiser"), z - c * value)
    torch.testing.assert_close(convert("v", "eps"), z + (1 - c) * value)
    torch.testing.assert_close(convert("denoiser", "v"), (z - value) / c)
    torch.testing.assert_close(convert("denoiser", "score"), -(z - (1 - c) * value) / c**2)
    torch.testing.assert_close(convert("score", "v"), -(z + c * value) / (1 - c))


def test_score_from_velocity_formula_of_sit():
    """score = ((a/a') v - z) / (s^2 - (a/a') s' s), the form printed in the SiT paper."""
    for path in (Linear(), VP(), GVP()):
        t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        z, v = torch.randn(2, 9, dtype=torch.float64)
        a, s, da, ds = path.a(t), path.s(t), path.da(t), path.ds(t)
        printed = (a / da * v - z) / (s**2 - a / da * ds * s)
        torch.testing.assert_close(path.convert(v, source="v", target="score", z=z, t=t), printed)


@each_path
def test_derivatives_match_finite_differences(path):
    # off the nodes of the discrete table, where the derivative jumps
    t = (torch.arange(50, 900, 50, dtype=torch.float64) + 0.5) / 1000
    h = 1e-7
    for value, slope in ((path.a, path.da), (path.s, path.ds)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(slope(t), numeric, rtol=1e-6, atol=1e-6)


@each_path
@settings(deadline=None, max_examples=30)
@given(t=st.floats(0.001, 0.98))
def test_sigma_round_trip(path, t):
    t = torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(path.t_of_sigma(path.sigma(t)), t, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(path.sigma(t), path.s(t) / path.a(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("source, target", list(itertools.permutations(["linear", "vp", "gvp", "discrete", "ve"], 2)))
def test_transfer_keeps_image_and_noise(source, target):
    source, target = PATHS[source], PATHS[target]
    x, e = torch.randn(2, 6, 3, dtype=torch.float64)
    t = torch.linspace(0.2, 0.6, 6, dtype=torch.float64)
    z, new_t = paths.transfer(source.sample(x, e, t).z, t, source=source, target=target)
    torch.testing.assert_close(z, target.sample(x, e, new_t).z, rtol=1e-9, atol=1e-9)


def test_edm_to_linear_divides_by_one_plus_sigma():
    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    t = Linear().t_of_sigma(sigma)
    torch.testing.assert_close(t / (1 - t), sigma)
    x, e = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(Linear().sample(x, e, t).z, (1 - t)[:, None] * (x + sigma[:, None] * e))


@each_path
def test_ends(path):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    a, s = path.a(t), path.s(t)
    assert a[0] == 1 and s[0] < 0.021 and s[1] > 0.99
    assert bool((path.ds(torch.linspace(0.01, 0.99, 50, dtype=torch.float64)) > 0).all())  # noise grows with t
    if isinstance(path, VE):
        torch.testing.assert_close(s, torch.tensor([path.sigma_min, path.sigma_max], dtype=torch.float64))


def test_sample_velocity_is_the_time_derivative():
    x, e = torch.randn(2, 4, 3, dtype=torch.float64)
    t, h = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64), 1e-7
    for path in (Linear(), VP(), GVP(), VE()):
        got = path.sample(x, e, t)
        numeric = (path.sample(x, e, t + h).z - path.sample(x, e, t - h).z) / (2 * h)
        torch.testing.assert_close(got.v, numeric, rtol=1e-6, atol=1e-5)
        assert got.x is x and got.e is e and got.t is t
    linear = Linear().sample(x, e, t)
    torch.testing.assert_close(linear.v, e - x)


def test_data_time_flips_both_time_and_velocity():
    x, e = torch.randn(2, 4, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    theirs = DataTime(Linear()).sample(x, e, t)
    torch.testing.assert_close(theirs.z, t[:, None] * x + (1 - t)[:, None] * e)
    torch.testing.assert_close(theirs.v, x - e)
    ours = Linear().sample(x, e, 1 - t)
    back_t, back_v = paths.from_data_time(theirs.t, theirs.v)
    torch.testing.assert_close(back_t, ours.t)
    torch.testing.assert_close(back_v, ours.v)
    again_t, again_v = paths.to_data_time(back_t, back_v)
    torch.testing.assert_close((again_t, again_v), (t, theirs.v))
    # coefficients of SiT in its own time: log a = -(1-t)^2 19.9/4 - (1-t) 0.1/2, and GVP a = sin(pi t/2)
    sit = DataTime(VP())
    torch.testing.assert_close(sit.a(t).log(), -((1 - t) ** 2) * (20 - 0.1) / 4 - (1 - t) * 0.1 / 2)
    torch.testing.assert_close(DataTime(GVP()).a(t), (math.pi * t / 2).sin())
    h = 1e-7
    for seen in (sit, DataTime(GVP())):
        torch.testing.assert_close(seen.da(t), (seen.a(t + h) - seen.a(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(seen.ds(t), (seen.s(t + h) - seen.s(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)
    wrapped = paths.VelocityFromDataTime(lambda z, t: DataTime(Linear()).sample(x, e, t).v)
    torch.testing.assert_close(wrapped(ours.z, ours.t), ours.v)


def test_discrete_table_is_the_ddpm_one():
    path = DiscreteVP()
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    j = torch.arange(1000)
    torch.testing.assert_close(path.a(path.t_of_index(j)) ** 2, torch.cumprod(1 - betas, 0))
    assert torch.equal(path.index_of_t(path.t_of_index(j)), j)
    assert path.index_of_t(torch.tensor(0.0)) == 0
    assert path.a(torch.tensor([0.5])).dtype == torch.float32
    sd = PATHS["sd"]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(sd.sigma(sd.t_of_index(j)) ** 2, 1 / torch.cumprod(1 - betas, 0) - 1, rtol=1e-9, atol=0)


def test_probability_flow_closed_form_on_the_linear_path():
    """dz/dt = v integrates to z_r = (1-r) m + sd_r/sd_t (z_t - (1-t) m); the midpoint rule gains >= 4x per halving."""

    def end(steps):
        z = torch.linspace(-2, 2, 9, dtype=torch.float64)
        grid = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        for t, r in itertools.pairwise(grid):
            half = z + (r - t) / 2 * gaussian(Linear(), z, t.expand(9))["v"]
            z = z + (r - t) * gaussian(Linear(), half, ((t + r) / 2).expand(9))["v"]
        return z

    width = lambda t: math.sqrt((1 - t) ** 2 * STD**2 + t**2)
    exact = 0.95 * MEAN + width(0.05) / width(0.95) * (torch.linspace(-2, 2, 9, dtype=torch.float64) - 0.05 * MEAN)
    errors = [(end(n) - exact).abs().max().item() for n in (80, 160, 320)]
    assert errors[2] < 1e-3
    assert all(coarse / fine > 3.5 for coarse, fine in itertools.pairwise(errors))


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match=r"negative sigma: sigma_min must be > 0, got -1\.0"):
        VE(sigma_min=-1.0)
    with pytest.raises(UserError, match="sigma_min must be below sigma_max"):
        VE(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(UserError, match="Closest: denoiser"):
        Linear().convert(torch.zeros(1), source="denoisr", target="v", z=torch.zeros(1), t=torch.zeros(1))
    with pytest.raises(UserError, match="spacing must be one of"):
        DiscreteVP(spacing="cosine")
