import copy
import math
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.deq.solve import solve
from common.deq.solvers import Anderson, Broyden, NewtonKrylov, Picard
from common.errors import UserError

D64 = torch.float64


def linear(width, radius, batch=2, symmetric=False, normal=False, seed=0, dtype=D64):
    """(A, b, exact) of z = A z + b with spectral radius (`normal`: spectral norm) `radius`."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(width, width, dtype=D64, generator=generator)
    if symmetric:
        q = torch.linalg.qr(a)[0]
        a = q @ torch.diag(torch.linspace(-radius, radius, width, dtype=D64)) @ q.T
    a = a * radius / (torch.linalg.matrix_norm(a, 2) if normal else torch.linalg.eigvals(a).abs().max())
    b = torch.randn(batch, width, dtype=D64, generator=generator)
    exact = torch.linalg.solve(torch.eye(width, dtype=D64) - a, b.T).T
    return a.to(dtype), b.to(dtype), exact.to(dtype)


def bend(z, x, a):
    return torch.tanh(z @ a.T + x)


def points_of(fn, z0, args, solver, steps):
    """The points a solver visits one sample at a time, (steps + 1) x (B, D)."""
    found = solve(fn, z0, args, solver=replace(solver, max_iter=steps + 1, tol=1e-300), trajectory=True)
    return found.trajectory[: steps + 1], found


# Picard


@settings(deadline=None, max_examples=30)
@given(tau=st.floats(0.05, 1), steps=st.integers(1, 12), seed=st.integers(0, 20))
def test_damped_iteration_is_its_closed_form(tau, steps, seed):
    a, b, _ = linear(5, 0.9, seed=seed)
    found = solve(lambda z: z @ a.T + b, torch.zeros_like(b), solver=Picard(max_iter=steps, tau=tau, stop="never"))
    damped = (1 - tau) * torch.eye(5, dtype=D64) + tau * a
    expected = sum(torch.linalg.matrix_power(damped, t) for t in range(steps)) @ (tau * b.T)
    torch.testing.assert_close(found.z, expected.T, rtol=1e-10, atol=1e-12)


def test_a_linear_rate():
    a, b, exact = linear(6, 0.7, symmetric=True)
    points, _ = points_of(lambda z: z @ a.T + b, torch.zeros_like(b), None, Picard(), 60)
    errors = torch.stack([(z - exact).norm() for z in points])
    assert float((errors[60] / errors[30]) ** (1 / 30)) == pytest.approx(0.7, rel=0.02)


# Anderson


def mixed(images, residuals, tau):
    """Dense least squares per sample: weights of sum 1 that make the mixed residual smallest."""
    rows = []
    for f, g in zip(torch.stack(images, 1), torch.stack(residuals, 1), strict=True):
        change = (g[:-1] - g[-1]).T
        theta = torch.linalg.lstsq(change, -g[-1:].T, driver="gelsd").solution[:, 0] if len(g) > 1 else g.new_zeros(0)
        weights = torch.cat([theta, 1 - theta.sum()[None]])
        rows.append(weights @ f - (1 - tau) * (weights @ g))
    return torch.stack(rows)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 8),
    width=st.integers(8, 16),
    tau=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 30),
    bent=st.booleans(),
)
def test_anderson_is_least_squares_while_nothing_is_forgotten(m, width, tau, seed, bent):
    a, x, _ = linear(width, 0.9, batch=3, seed=seed)
    fn = (lambda z: bend(z, x, a)) if bent else lambda z: z @ a.T + x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Anderson, "GAIN", math.inf)  # no plain steps in between
        points, _ = points_of(fn, torch.zeros_like(x), None, Anderson(m=m, tau=tau, ridge=0), m)
    images, residuals = [fn(z) for z in points], [fn(z) - z for z in points]
    for n in range(1, m + 1):
        expected = mixed(images[:n], residuals[:n], tau)
        torch.testing.assert_close(points[n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m", [2, 3])
def test_a_short_memory_holds_the_newest_points(m):
    a, x, _ = linear(12, 0.9, batch=3)
    fn = lambda z: bend(z, x, a)
    points, found = points_of(fn, torch.zeros_like(x), None, Anderson(m=m, ridge=0, safeguard=1e6), 12)
    for n in range(m, 13):
        window = points[max(n - m, 0) : n]
        expected = mixed([fn(z) for z in window], [fn(z) - z for z in window], 1.0)
        torch.testing.assert_close(points[n], expected, rtol=1e-5, atol=1e-7)
    assert found.solver_state["born"].sort(1)[0].tolist() == [list(range(13 - m, 13))] * 3


@pytest.mark.parametrize("m", [4, 6])
def test_the_three_newest_points_stay(m):
    a, x, _ = linear(20, 0.97, batch=4)
    for steps in range(m, 25):
        _, found = points_of(lambda z: bend(z, x, a), torch.zeros_like(x), None, Anderson(m=m, safeguard=1e6), steps)
        born = found.solver_state["born"]
        assert {steps, steps - 1, steps - 2} <= set(born[0].tolist()) and len(set(born[0].tolist())) == m


def test_the_gram_matrix_updated_by_rows_is_the_gram_matrix():
    a, x, _ = linear(20, 0.97, batch=4)
    _, found = points_of(lambda z: bend(z, x, a), torch.zeros_like(x), None, Anderson(m=5), 17)
    state = found.solver_state
    torch.testing.assert_close(state["gram"], state["residuals"] @ state["residuals"].mT, rtol=1e-10, atol=1e-20)
    again = state["images"] - state["residuals"]
    torch.testing.assert_close(bend(again, x[:, None], a), state["images"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-10, 2.0**12, 2.0**60])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Broyden(memory=4), NewtonKrylov()], ids=str)
def test_acceleration_does_not_depend_on_the_scale(solver, scale):
    a, b, _ = linear(30, 0.95)
    run = lambda s: solve(
        lambda z: z @ a.T + s * b, torch.zeros_like(b), solver=replace(solver, max_iter=100, tol=1e-6 * s, stop="abs")
    )
    one, other = run(1.0), run(scale)
    assert one.converged.all() and other.steps.tolist() == one.steps.tolist()
    torch.testing.assert_close(other.z / scale, one.z, rtol=1e-9, atol=1e-9)


def fails_at(fn, number, value):
    """fn whose call `number` (from 1) returns `value`."""
    calls = []

    def failing(z):
        calls.append(z)
        return torch.full_like(z, value) if len(calls) == number else fn(z)

    return failing


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("number", [1, 2, 4, 9])
@pytest.mark.parametrize("solver", [Anderson(m=4), Broyden(), Broyden(memory=2), Broyden(line_search=True)], ids=str)
def test_a_lost_sample_starts_again_from_its_best(solver, number, value):
    a, x, _ = linear(12, 0.9, batch=1)
    solver = replace(solver, max_iter=80, tol=1e-9)
    fn = fails_at(lambda z: bend(z, x, a), number, value)
    found = solve(fn, torch.zeros_like(x), solver=solver, trajectory=True)
    clean = solve(lambda z: bend(z, x, a), torch.zeros_like(x), solver=solver)
    assert found.converged.all() and clean.converged.all()
    torch.testing.assert_close(found.z, clean.z, rtol=1e-6, atol=1e-8)
    assert found.steps <= 2 * clean.steps + 12, "the acceleration comes back"
    if not getattr(solver, "line_search", False) and number > 1:  # a search shortens the step instead
        best = min(
            found.trajectory[: number - 1], key=lambda z: float((bend(z, x, a) - z).norm() / bend(z, x, a).norm())
        )
        torch.testing.assert_close(found.trajectory[number], solver.finish(best, bend(best, x, a), None))


def test_a_lost_sample_loses_nobody_elses_history():
    a, x, _ = linear(8, 0.9, batch=3)
    for solver in (Anderson(m=4, max_iter=60, tol=1e-9), Broyden(max_iter=60, tol=1e-9)):
        calls = []

        def failing(z, calls=calls):
            calls.append(z)
            image = bend(z, x, a)
            return torch.cat([image[:1], image[1:2] * math.nan, image[2:]]) if len(calls) == 4 else image

        found = solve(failing, torch.zeros_like(x), solver=solver)
        clean = solve(lambda z: bend(z, x, a), torch.zeros_like(x), solver=solver)
        for key in ("z", "steps", "residual_abs"):
            assert torch.equal(getattr(found, key)[[0, 2]], getattr(clean, key)[[0, 2]])
        assert found.converged.all() and found.steps[1] != clean.steps[1]


def test_going_back_is_not_for_ever():
    """The best state may look lost itself: its residual is that of the point before it."""
    x = torch.full((2, 3), 10.0, dtype=D64)
    fn = lambda z: x * torch.exp(-z * z)  # f(0) = 10 has a relative residual of 1, f(10) = 0 one of 1e10
    for solver in (Anderson(max_iter=100, tol=1e-8), Broyden(max_iter=100, tol=1e-8)):
        found = solve(fn, torch.zeros_like(x), solver=solver, trajectory=True)
        last = [float(z[0, 0]) for z in found.trajectory[-4:]]
        assert found.converged.all() or len(set(last)) > 1, last


@pytest.mark.parametrize("solver", [Anderson(max_iter=50), Broyden(max_iter=50)], ids=str)
def test_a_sample_that_stays_lost_ends_by_itself(solver):
    found = solve(lambda z: z * math.nan, torch.ones(1, 3), solver=solver)
    assert int(found.evaluations) == solver.RESTARTS + 1


def test_equal_residuals_and_exact_points_are_no_trouble():
    """Singular Gram matrices and steps of length zero."""
    for solver in (Anderson(ridge=0), Anderson(), Broyden(), Broyden(memory=1), Broyden(line_search=True)):
        for stop in ("rel", "never"):
            solver = replace(solver, max_iter=30, stop=stop)
            shifted = solve(lambda z: z + 1, torch.zeros(2, 3), solver=solver)  # no fixed point, all residuals equal
            assert shifted.z.isfinite().all() and (shifted.residual_abs == 3**0.5).all()
            exact = solve(lambda z: torch.ones_like(z), torch.ones(2, 3), solver=solver)
            assert exact.z.isfinite().all() and exact.converged.all() and torch.equal(exact.z, torch.ones(2, 3))
            low = solve(lambda z: torch.full_like(z, 2.0) + 0 * z, torch.zeros(2, 3), solver=solver)
            assert torch.equal(low.z, torch.full((2, 3), 2.0)) and low.converged.all()


# Broyden


def inverse_of(pairs, width):
    """Good Broyden from -I, by the textbook update of the inverse, pair after pair: (D, D)."""
    h = -torch.eye(width, dtype=D64)
    for s, y in pairs:
        hy = h @ y
        h = h + torch.outer(s - hy, s @ h) / (s @ hy)
    return h


@settings(deadline=None, max_examples=40)
@given(
    memory=st.sampled_from([None, 1, 2, 5, 50]),
    width=st.integers(3, 12),
    bent=st.booleans(),
    seed=st.integers(0, 30),
)
def test_broyden_is_the_textbook_matrix_of_the_pairs_remembered(memory, width, bent, seed):
    a, x, _ = linear(width, 0.8, batch=2, normal=True, seed=seed)
    fn = (lambda z: bend(z, x, a)) if bent else lambda z: z @ a.T + x
    solver = Broyden(memory=memory, safeguard=math.inf)
    points, _ = points_of(fn, torch.zeros_like(x), None, solver, 14)
    residuals = [fn(z) - z for z in points]
    for row in range(2):
        z, g = [p[row] for p in points], [r[row] for r in residuals]
        pairs = [
            (after - before, up - down) for (before, after), (down, up) in zip(pairwise(z), pairwise(g), strict=True)
        ]
        for n in range(len(points) - 1):
            if g[n].norm() < 1e-7:
                break
            kept = pairs[:n][-memory:] if memory else pairs[:n]
            expected = z[n] - inverse_of(kept, width) @ g[n]
            torch.testing.assert_close(z[n + 1], expected, rtol=1e-5, atol=1e-5 * float(g[n].norm()) + 1e-11)


@pytest.mark.parametrize("memory", [None, 1, 2, 5, 20, 500])
@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_any_memory_converges_and_stays_accurate(memory, dtype):
    """Forgetting hundreds of pairs one after another leaves a valid matrix (torchdeq's diverges)."""
    a, b, exact = linear(64, 0.95, batch=4, dtype=dtype)
    solver = Broyden(max_iter=500, tol=1e-4 if dtype == torch.float32 else 1e-8, memory=memory)
    found = solve(lambda z: z @ a.T + b, torch.zeros_like(b), solver=solver)
    assert found.converged.all(), found.message
    tolerance = 1e-2 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(found.z, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    never = replace(solver, stop="never", max_iter=300)
    ended = solve(lambda z: z @ a.T + b, torch.zeros_like(b), solver=never)
    assert ended.z.isfinite().all() and ended.residual_rel.max() < (1e-5 if dtype == torch.float32 else 1e-12)


def test_the_memory_is_as_large_as_said():
    z = torch.zeros(2, 7)
    assert Broyden(max_iter=9).init(z)["s"].shape == (2, 9, 7)
    assert Broyden(max_iter=9, memory=4).init(z)["s"].shape == (2, 4, 7)
    assert Broyden(max_iter=3, memory=40).init(z)["s"].shape == (2, 3, 7)
    assert Anderson(m=5).init(z)["images"].shape == (2, 5, 7)


@pytest.mark.parametrize("memory", [None, 3])
def test_the_left_inverse_is_that_of_the_forward_solve(memory):
    a, x, _ = linear(9, 0.8, batch=2, normal=True)
    fn = lambda z: bend(z, x, a)
    solver = Broyden(memory=memory, safeguard=math.inf)
    points, found = points_of(fn, torch.zeros_like(x), None, solver, 8)
    residuals = [fn(z) - z for z in points]
    v = torch.randn(2, 9, dtype=D64)
    pairs = list(zip(pairwise(points), pairwise(residuals), strict=True))[-(memory or 99) :]
    for row in range(2):
        # the last pair is not in: the solve ended with measuring it
        dense = inverse_of([((q - p)[row], (h - g)[row]) for (p, q), (g, h) in pairs], 9)
        torch.testing.assert_close(
            Broyden.left_inverse(found.solver_state, v)[row], -v[row] @ dense, rtol=1e-7, atol=1e-9
        )


def test_a_sample_that_waits_keeps_what_it_learnt():
    """Shine reads the history of samples that ended long before the slowest one."""
    a, x, _ = linear(6, 0.5, batch=1, normal=True)
    slow, b = torch.tensor([[0.0], [1.0]], dtype=D64), linear(6, 1.5, seed=3)[0]
    fn = lambda z: torch.where(slow > 0, torch.tanh(z @ b.T + x), 0.4 * torch.tanh(z @ a.T + x))
    z0, solver = torch.zeros(2, 6, dtype=D64), Broyden(max_iter=80, tol=1e-6, memory=3)
    both = solve(fn, z0, solver=solver)
    alone = solve(lambda z: 0.4 * torch.tanh(z @ a.T + x), z0[:1], solver=solver)
    assert both.steps[0] + 3 < both.steps[1] and both.converged.all()
    v = torch.randn(2, 6, dtype=D64)
    torch.testing.assert_close(
        Broyden.left_inverse(both.solver_state, v)[:1], Broyden.left_inverse(alone.solver_state, v[:1])
    )


def test_superlinear_convergence():
    a, x, _ = linear(10, 0.9, batch=1, normal=True)
    points, _ = points_of(lambda z: bend(z, x, a), torch.zeros_like(x), None, Broyden(), 25)
    residuals = torch.stack([(bend(z, x, a) - z).norm() for z in points])
    rates = residuals[1:] / residuals[:-1]
    reached = int((residuals < 1e-9).nonzero()[0])
    assert rates[reached - 2 : reached].max() < 0.2 * rates[:3].max()


def test_a_search_lowers_the_residual_and_is_counted():
    """From far away full Broyden steps overshoot; halving them keeps the residual from rising."""
    x = torch.linspace(-2, 2, 8, dtype=D64).reshape(2, 4)
    fn = lambda z: x - 3 * torch.arctan(2 * z)
    solver = Broyden(max_iter=60, tol=1e-10, line_search=True)
    found = solve(fn, torch.full_like(x, 3.0), solver=solver, compact=False)
    assert found.converged.all(), found.message
    extra = found.evaluations - found.steps - 1
    assert extra.max() > 0 and found.calls >= int(found.evaluations.max())
    easy = solve(lambda z: 0.1 * z + x, torch.zeros_like(x), solver=solver)
    assert easy.evaluations.tolist() == (easy.steps + 1).tolist() and easy.calls == int(easy.evaluations.max())


# Newton


def test_newton_converges_quadratically():
    a, x, _ = linear(8, 0.9, batch=1)
    fn = lambda z: bend(z, x, a)
    exact = solve(fn, torch.zeros_like(x), solver=NewtonKrylov(max_iter=20, forcing=1e-12, tol=1e-15)).z
    points, _ = points_of(fn, torch.zeros_like(x), None, NewtonKrylov(forcing=1e-13), 6)
    errors = [float((z - exact).norm()) for z in points]
    errors = [e for e in errors if 1e-13 < e < 0.3]
    orders = [math.log(e2 / e1) / math.log(e1 / e0) for e0, e1, e2 in zip(errors, errors[1:], errors[2:], strict=False)]
    assert orders and orders[-1] == pytest.approx(2, abs=0.35), (errors, orders)


def test_newton_solves_a_linear_map_in_one_step():
    a, b, exact = linear(20, 5.0)  # expands
    found = solve(lambda z: z @ a.T + b, torch.zeros_like(b), solver=NewtonKrylov(forcing=1e-12, tol=1e-9))
    assert found.steps.tolist() == [1, 1] and found.converged.all()
    torch.testing.assert_close(found.z, exact, rtol=1e-8, atol=1e-9)
    assert found.evaluations.tolist() == [2 + 20] * 2, "products count"


def test_a_krylov_space_that_is_too_small_still_makes_progress():
    a, b, exact = linear(30, 0.9, normal=True)
    found = solve(lambda z: z @ a.T + b, torch.zeros_like(b), solver=NewtonKrylov(krylov=3, max_iter=60, tol=1e-9))
    assert found.converged.all() and found.steps.min() > 1
    torch.testing.assert_close(found.z, exact, rtol=1e-6, atol=1e-7)


# Numbers


@pytest.mark.parametrize(
    "symmetric, radius, tol, solver, most",
    [
        (False, 0.95, 1e-5, Broyden(max_iter=300), 70),
        (False, 0.95, 1e-5, Anderson(max_iter=300), 76),
        (False, 0.95, 1e-5, Anderson(max_iter=300, m=300), 64),
        (True, 0.99, 1e-4, Anderson(max_iter=300), 55),
    ],
    ids=["broyden", "anderson", "anderson_whole", "anderson_symmetric"],
)
def test_acceleration_pays(symmetric, radius, tol, solver, most):
    """Linear map, D=256, B=8; TorchDEQ's Anderson needs 153 steps, plain iteration 200."""
    a, b, _ = linear(256, radius, batch=8, symmetric=symmetric, seed=1, dtype=torch.float32)
    fn = lambda z: z @ a.T + b
    fast = solve(fn, torch.zeros_like(b), solver=replace(solver, tol=tol))
    assert fast.converged.all() and int(fast.steps.max()) <= most, fast.steps
    plain = solve(fn, torch.zeros_like(b), solver=Picard(max_iter=2000, tol=tol))
    assert int(plain.steps.max()) >= 2.5 * int(fast.steps.max())


# Settings


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Picard(max_iter=-1), "solver.max_iter must be >= 0, got -1"),
        (lambda: Anderson(tol=0), "solver.tol must be > 0, got 0. For a fixed number of steps set solver.stop=never"),
        (lambda: Broyden(tol=-1e-3), "solver.tol must be > 0"),
        (lambda: Picard(tol=math.nan), "solver.tol must be > 0, got nan"),
        (lambda: Picard(stop="relative"), "solver.stop must be one of rel, abs, never, got relative. Closest: rel"),
        (lambda: Picard(tau=0), r"solver.tau must lie in \(0, 1\], got 0. 1 is undamped"),
        (lambda: Anderson(tau=1.5), r"solver.tau must lie in \(0, 1\], got 1.5"),
        (lambda: Anderson(m=0), "solver.m must be >= 1, got 0. 6 is usual"),
        (lambda: Anderson(ridge=-1), "solver.ridge must be >= 0 or null"),
        (lambda: Anderson(safeguard=1), "solver.safeguard must be > 1"),
        (lambda: Broyden(safeguard=0.5), "solver.safeguard must be > 1"),
        (lambda: Broyden(memory=0), "solver.memory must be >= 1 or null, got 0"),
        (lambda: NewtonKrylov(krylov=0), "solver.krylov must be >= 1"),
        (lambda: NewtonKrylov(forcing=1.0), r"solver.forcing must lie in \(0, 1\), got 1.0"),
        (lambda: NewtonKrylov(forcing=0), "solver.forcing must lie in"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("solver", [Picard(tau=0.5), Anderson(m=3), Broyden(memory=2), NewtonKrylov()], ids=str)
def test_solvers_are_values(solver):
    assert copy.deepcopy(solver) == solver == pickle.loads(pickle.dumps(solver)) == replace(solver)
    with pytest.raises(AttributeError):
        solver.tol = 1.0
    with pytest.raises(UserError, match=r"has no setting 'max_itr'\. Closest: max_iter\. Its settings are"):
        type(solver)(max_itr=3)
    with pytest.raises(TypeError):
        type(solver)(max_itr=3)
    with pytest.raises(TypeError):
        type(solver)(50)
