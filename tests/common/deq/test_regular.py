import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.deq.layers import apply_norm, reset
from common.deq.regular import (
    JacobianPenalty,
    arnoldi,
    hutchinson,
    jacobian_penalty,
    power_iteration,
    spectral_radius,
)
from common.errors import UserError


def linear(matrix):
    return lambda z: z @ matrix.T


def rotation(angle, scale=1.0):
    c, s = math.cos(angle), math.sin(angle)
    return scale * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def test_the_mean_over_probes_is_the_squared_norm_over_numel():
    torch.manual_seed(0)
    a = torch.randn(12, 12, dtype=torch.float64)
    z = torch.randn(3, 12, dtype=torch.float64)
    expected = a.square().sum() / 12  # each of the 3 samples has this block; numel is 3 * 12
    estimate = jacobian_penalty(linear(a), z, vectors=3000)
    assert abs(estimate / expected - 1) < 0.03


def test_one_probe_is_its_formula():
    a = torch.randn(5, 5)
    z = torch.randn(4, 5)
    torch.manual_seed(7)
    value = jacobian_penalty(linear(a), z, vectors=2)
    torch.manual_seed(7)
    probes = torch.stack([torch.randn(4, 5), torch.randn(4, 5)])
    torch.testing.assert_close(value, (probes @ a).square().sum() / 2 / 20)


def test_gradient_of_the_penalty_against_finite_differences():
    z = torch.randn(3, 4, dtype=torch.float64)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def value(w, x):
        g = torch.Generator().manual_seed(1)
        return jacobian_penalty(lambda z, x: torch.tanh(z @ w.T + x), z, (x,), vectors=2, generator=g)

    assert torch.autograd.gradcheck(value, (w, x))


def test_the_penalty_does_not_pull_at_z_and_takes_structures():
    z = {"a": torch.randn(2, 3, requires_grad=True), "b": (torch.randn(2, 2, 2),)}
    w = torch.randn(3, 3, requires_grad=True)

    def fn(z):
        return {"a": torch.tanh(z["a"] @ w + z["b"][0].sum((1, 2))[:, None]), "b": (z["b"][0] * 0.5,)}

    with torch.no_grad():
        value = jacobian_penalty(fn, z)
    value.backward()
    assert z["a"].grad is None and w.grad.abs().sum() > 0


def test_training_with_the_penalty_shrinks_the_jacobian():
    torch.manual_seed(0)
    cell = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    apply_norm(cell)
    z = torch.randn(16, 8)
    before = spectral_radius(cell, z).mean()
    penalty = JacobianPenalty(weight=2.0)
    optimizer = torch.optim.Adam(cell.parameters(), lr=0.05)
    for _ in range(20):
        reset(cell)
        optimizer.zero_grad()
        penalty(cell, z).backward()
        optimizer.step()
    assert spectral_radius(cell, z).mean() < before / 2


def test_frequency_is_a_probability_and_reproducible():
    penalty = JacobianPenalty(frequency=0.3)
    z = torch.randn(1, 2)
    torch.manual_seed(0)
    hits = [penalty(torch.tanh, z) is not None for _ in range(400)]
    assert abs(sum(hits) / 400 - 0.3) < 0.08
    torch.manual_seed(0)
    assert hits == [penalty(torch.tanh, z) is not None for _ in range(400)]
    assert JacobianPenalty(frequency=0.0)(torch.tanh, z) is None
    assert JacobianPenalty(weight=0.0)(torch.tanh, z) is None
    first = JacobianPenalty(weight=3.0)(torch.tanh, z, None, torch.Generator().manual_seed(1))
    torch.testing.assert_close(first, 3 * jacobian_penalty(torch.tanh, z, generator=torch.Generator().manual_seed(1)))


def test_the_penalty_under_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        cell = nn.Conv2d(2, 2, 3, padding=1)
        value = JacobianPenalty(frequency=0.1)(cell, torch.randn(2, 2, 5, 5))
        value.backward()
        assert value.shape == () and cell.weight.grad is not None


def test_a_map_that_ignores_z_has_no_jacobian():
    z, x = torch.randn(2, 3), torch.randn(2, 3)
    assert jacobian_penalty(lambda z: x, z) == 0
    for method in ("power", "arnoldi"):
        for product in ("vjp", "jvp"):
            assert torch.equal(spectral_radius(lambda z: x, z, method=method, product=product), torch.zeros(2))


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 12),
    batch=st.integers(1, 4),
    product=st.sampled_from(["vjp", "jvp"]),
    seed=st.integers(0, 999),
)
def test_arnoldi_over_the_whole_space_is_exact(size, batch, product, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, size, size, dtype=torch.float64, generator=g)
    z = torch.randn(batch, size, dtype=torch.float64, generator=g)
    got = spectral_radius(
        lambda z, a: (a @ z[:, :, None])[:, :, 0], z, (a,), iterations=size, product=product, generator=g
    )
    torch.testing.assert_close(got, torch.linalg.eigvals(a).abs().amax(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["power", "arnoldi"])
@pytest.mark.parametrize("angle", [0.3, 1.0, math.pi / 2, 2.5])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_complex_pairs(method, angle, skew):
    p = torch.tensor([[1.0, skew], [0.0, 1.0]], dtype=torch.float64)
    a = torch.zeros(6, 6, dtype=torch.float64)
    a[:2, :2] = p @ rotation(angle, 0.9) @ torch.linalg.inv(p)
    a[2:, 2:] = torch.diag(torch.tensor([0.5, -0.4, 0.2, 0.0], dtype=torch.float64))
    z = torch.randn(3, 6, dtype=torch.float64)
    got = spectral_radius(linear(a), z, method=method, iterations=60 if method == "power" else 6)
    torch.testing.assert_close(got, torch.full((3,), 0.9, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method, iterations, rtol", [("power", 100, 0.03), ("arnoldi", 40, 0.03)])
def test_a_spectrum_without_a_gap(method, iterations, rtol):
    torch.manual_seed(0)
    a = torch.randn(128, 128) / 128**0.5
    radius = torch.linalg.eigvals(a.double()).abs().max().float()
    got = spectral_radius(linear(a), torch.randn(4, 128), method=method, iterations=iterations)
    torch.testing.assert_close(got, radius.expand(4), rtol=rtol, atol=0)


@pytest.mark.parametrize("method", ["power", "arnoldi"])
def test_real_eigenvalues_of_either_sign(method):
    for top in (0.95, -0.95):
        a = torch.diag(torch.tensor([top, 0.7, -0.5, 0.1]))
        got = spectral_radius(linear(a), torch.randn(3, 4), method=method, iterations=40)
        torch.testing.assert_close(got, torch.full((3,), 0.95), rtol=1e-4, atol=0)
    pair = torch.diag(torch.tensor([0.9, -0.9, 0.1]))  # a growth of 0.9 without a limit vector
    got = spectral_radius(linear(pair), torch.randn(3, 3), method=method, iterations=40)
    torch.testing.assert_close(got, torch.full((3,), 0.9), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["power", "arnoldi"])
def test_samples_are_apart_and_one_nan_stays_alone(method):
    scale = torch.tensor([0.3, 0.8, float("nan"), 1.5])
    z = torch.randn(4, 5)
    got = spectral_radius(lambda z, s: z * s[:, None], z, (scale,), method=method, iterations=8)
    torch.testing.assert_close(got, scale, equal_nan=True)


@pytest.mark.parametrize("method", ["power", "arnoldi"])
@pytest.mark.parametrize("product", ["vjp", "jvp"])
def test_the_number_of_products(method, product):
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(z):
            return z * 0.5

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return g * 0.5

        @staticmethod
        def jvp(ctx, t):
            calls.append("forward")
            return t * 0.5

    spectral_radius(lambda z: Counted.apply(z), torch.randn(2, 20), method=method, iterations=7, product=product)
    assert calls == ["backward" if product == "vjp" else "forward"] * 7


@pytest.mark.parametrize("product", ["vjp", "jvp"])
def test_at_a_tanh_layer_with_injection_in_every_mode(product):
    torch.manual_seed(0)
    cell = nn.Linear(6, 6).double()
    apply_norm(cell, "spectral", learn_scale=False, target=0.9)

    def fn(z, x):
        return torch.tanh(cell(z) + x)

    z, x = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    jacobians = torch.vmap(torch.func.jacrev(lambda z, x: fn(z[None], x[None])[0]))(z, x)
    exact = torch.linalg.eigvals(jacobians).abs().amax(1)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            reset(cell)
            got = spectral_radius(fn, z.clone(), (x.clone(),), iterations=6, product=product)
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)
        assert not got.requires_grad
    assert all(p.grad is None for p in cell.parameters())


def test_structures_and_low_precision():
    z = {"a": torch.randn(2, 3), "b": torch.randn(2, 2, 2).bfloat16()}
    got = spectral_radius(lambda z: {"a": z["a"] * 0.25, "b": z["b"] * 0.5}, z, iterations=4)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.5]), rtol=1e-2, atol=0)


def test_power_iteration_returns_the_eigenvector():
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    a = q @ torch.diag(torch.tensor([0.9, 0.4, 0.3, 0.2, -0.1], dtype=torch.float64)) @ q.T
    vector, radius = power_iteration(linear(a), torch.randn(2, 5, dtype=torch.float64), 60)
    torch.testing.assert_close((vector @ q[:, 0]).abs(), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(radius, torch.full((2,), 0.9, dtype=torch.float64))
    assert power_iteration(linear(a), torch.randn(2, 5, dtype=torch.float64), 1)[1].shape == (2,)


def test_empty_batches():
    z = torch.zeros(0, 3)
    assert spectral_radius(torch.tanh, z).shape == (0,)
    assert spectral_radius(torch.tanh, z, method="power", iterations=3).shape == (0,)
    assert arnoldi(torch.tanh, z, 3).shape == (0,)
    assert jacobian_penalty(torch.tanh, z) == 0


def test_hutchinson_without_graph():
    z = torch.randn(2, 3, requires_grad=True)
    assert not hutchinson(torch.tanh(z), z, create_graph=False).requires_grad


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: spectral_radius(torch.tanh, torch.zeros(1, 2), method="lanczos"), "method must be one of"),
        (lambda: spectral_radius(torch.tanh, torch.zeros(1, 2), product="vpj"), "Closest: vjp"),
        (lambda: spectral_radius(torch.tanh, torch.zeros(1, 2), iterations=0), "iterations must be"),
        (lambda: jacobian_penalty(torch.tanh, torch.zeros(1, 2), vectors=0), "vectors must be"),
        (lambda: jacobian_penalty(lambda z: z[:, :1], torch.zeros(1, 2)), "changed the shape"),
        (lambda: JacobianPenalty(weight=-1.0), "weight must be"),
        (lambda: JacobianPenalty(frequency=2.0), "frequency must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
