import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.diffusion import ema
from common.diffusion.ema import ConstantDecay, HalfLife, PowerFunction
from common.errors import UserError


def run(profile, values, batch=1):
    """Average of the scalar sequence `values`, one update each, starting from a wrong value."""
    average = [torch.tensor([1e3], dtype=torch.float64)]
    for step, value in enumerate(values, start=1):
        b = profile.decay(step=step, batch_size=batch, images_seen=step * batch)
        ema.update_(average, [torch.tensor([value], dtype=torch.float64)], b)
    return average[0].item()


@pytest.mark.parametrize("std, gamma", [(0.01, 96.995), (0.05, 16.972), (0.075, 10.289), (0.10, 6.937), (0.15, 3.558)])
def test_gamma_table(std, gamma):
    assert ema.gamma_of_std(std) == pytest.approx(gamma, abs=1e-3)
    assert ema.std_of_gamma(ema.gamma_of_std(std)) == pytest.approx(std, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.0, 200.0))
def test_std_and_gamma_are_inverse(gamma):
    assert ema.gamma_of_std(ema.std_of_gamma(gamma)) == pytest.approx(gamma, rel=1e-6, abs=1e-6)


def test_betas_of_known_cases():
    profile = PowerFunction(std=0.05)
    assert profile.decay(step=100, batch_size=128, images_seen=12800) == pytest.approx(0.834747, abs=1e-6)
    assert profile.decay(step=10000, batch_size=128, images_seen=1_280_000) == pytest.approx(0.998204, abs=1e-6)
    assert profile.decay(step=1, batch_size=128, images_seen=128) == 0.0  # the first update copies


def test_half_life_is_edms_formula():
    profile = HalfLife(images=500_000, ramp=0.05)
    assert profile.decay(step=1, batch_size=512, images_seen=512) == 0.0
    early = profile.decay(step=101, batch_size=512, images_seen=101 * 512)
    assert early == pytest.approx(0.5 ** (512 / (0.05 * 100 * 512)))
    late = profile.decay(step=10**6, batch_size=512, images_seen=512 * 10**6)
    assert late == pytest.approx(0.5 ** (512 / 500_000))
    plain = HalfLife(images=1000.0, ramp=None)
    assert plain.decay(step=1, batch_size=1000, images_seen=1000) == 0.5


def test_constant_and_its_power():
    assert ConstantDecay(decay=0.9999).decay(step=5, batch_size=1, images_seen=5) == 0.9999
    assert ConstantDecay(decay=0.999, every=16).decay(step=16, batch_size=16, images_seen=16) == 0.999**16


@pytest.mark.parametrize("profile", [ConstantDecay(decay=0.9), HalfLife(images=50), PowerFunction(std=0.1)])
def test_constant_weights_are_a_fixed_point(profile):
    average = [torch.full((3,), 2.5), torch.tensor([[-1.0]])]
    for step in range(1, 40):
        b = profile.decay(step=step, batch_size=4, images_seen=4 * step)
        ema.update_(average, [torch.full((3,), 2.5), torch.tensor([[-1.0]])], b)
    assert torch.equal(average[0], torch.full((3,), 2.5)) and torch.equal(average[1], torch.tensor([[-1.0]]))


@pytest.mark.parametrize("std", [0.05, 0.1, 0.15])
def test_power_average_of_a_linear_ramp_has_the_closed_form_mean(std):
    """theta(t) = t averages to (gamma+1)/(gamma+2) T, and its spread around that is std T."""
    gamma, steps = ema.gamma_of_std(std), 4000
    ramp = [step / steps for step in range(1, steps + 1)]
    mean = run(PowerFunction(std=std), ramp)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    second = run(PowerFunction(std=std), [value**2 for value in ramp])
    assert math.sqrt(second - mean**2) == pytest.approx(std, rel=5e-3)


def test_half_life_of_a_step_function():
    """A jump is half forgotten after `images` images."""
    values = [0.0] * 4000 + [1.0] * 100
    assert run(HalfLife(images=100, ramp=None), values) == pytest.approx(0.5, abs=1e-6)


def test_update_works_in_place_and_across_types():
    average, weight = torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)
    ema.update_([average], [weight], 0.75)
    torch.testing.assert_close(average, torch.full((3,), 0.25))
    parameter = torch.nn.Parameter(torch.ones(3))
    ema.update_([average], [parameter], 0.0)
    assert torch.equal(average, torch.ones(3)) and not average.requires_grad
    ema.update_([], [], 0.5)


def profile_values(std, time, grid):
    gamma = ema.gamma_of_std(std)
    return np.where(grid <= time, (gamma + 1) * np.clip(grid / time, 0, 1) ** gamma / time, 0.0)


def test_posthoc_returns_a_stored_profile_exactly():
    times, stds = [1e6, 2e6, 3e6, 1e6, 2e6, 3e6], [0.05] * 3 + [0.1] * 3
    for k in range(6):
        weights = ema.posthoc_weights(times=times, stds=stds, time=times[k], std=stds[k])
        np.testing.assert_allclose(weights, np.eye(6)[k], atol=1e-6)
    doubled = ema.posthoc_weights(times=[1e6, 1e6], stds=[0.05, 0.05], time=1e6, std=0.05)
    assert doubled.sum() == pytest.approx(1)


def test_posthoc_is_the_least_squares_solution_on_a_grid():
    """Against a brute-force fit of the sampled profiles (Algorithm 3 without its closed-form integrals)."""
    times, stds = [0.5, 1.0, 0.5, 1.0], [0.05, 0.05, 0.1, 0.1]
    grid = (np.arange(200_000) + 0.5) / 200_000
    basis = np.stack([profile_values(s, t, grid) for t, s in zip(times, stds)], axis=1)
    brute = np.linalg.lstsq(basis, profile_values(0.075, 1.0, grid), rcond=None)[0]
    weights = ema.posthoc_weights(times=times, stds=stds, time=1.0, std=0.075)
    np.testing.assert_allclose(weights, brute / brute.sum(), atol=1e-4)


def test_posthoc_reconstructs_the_average_of_a_known_trajectory():
    """theta(t) = sin(3t): snapshots of two widths give an average of a third width that was never tracked."""
    steps = 2000
    values = [math.sin(3 * step / steps) for step in range(1, steps + 1)]
    snapshots, times, stds = [], [], []
    for std in (0.05, 0.1):
        for until in range(steps // 16, steps + 1, steps // 16):
            snapshots.append({"w": torch.tensor([run(PowerFunction(std=std), values[:until])], dtype=torch.float64)})
            times.append(until)
            stds.append(std)
    weights = ema.posthoc_weights(times=times, stds=stds, time=steps, std=0.075)
    rebuilt = ema.combine(snapshots, weights)["w"].item()
    assert rebuilt == pytest.approx(run(PowerFunction(std=0.075), values), abs=1e-4)
    assert abs(rebuilt - run(PowerFunction(std=0.1), values)) > 1e-3


def test_combine_keeps_types():
    snapshots = [{"a": torch.ones(2), "b": torch.tensor(1.0, dtype=torch.float64)}] * 2
    out = ema.combine(snapshots, [0.25, 0.75])
    assert out["a"].dtype == torch.float32 and torch.equal(out["a"], torch.ones(2)) and out["b"].dtype == torch.float64


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ConstantDecay(decay=1.5), "decay must be >= 0 and <= 1"),
        (lambda: ConstantDecay(every=0), "every must be a whole number >= 1"),
        (lambda: HalfLife(images=0), "images must be > 0"),
        (lambda: PowerFunction(std=0.5), "std must be > 0 and <= "),
        (lambda: ema.posthoc_weights(times=[1.0], stds=[], time=1.0, std=0.1), "equally long"),
        (lambda: ema.posthoc_weights(times=[-1.0], stds=[0.1], time=1.0, std=0.1), "times must be > 0"),
        (lambda: ema.combine([], []), "equally many"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
