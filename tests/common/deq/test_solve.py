import math
from collections import namedtuple
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from common.deq.grads import Backprop, OneStep
from common.deq.solve import NotConverged, solve
from common.deq.solvers import Anderson, Broyden, NewtonKrylov, Picard
from common.errors import UserError

SOLVERS = {
    "picard": Picard(max_iter=200),
    "damped": Picard(max_iter=200, tau=0.7),
    "anderson": Anderson(max_iter=60),
    "anderson3": Anderson(max_iter=60, m=3, tau=0.8),
    "broyden": Broyden(max_iter=60),
    "broyden3": Broyden(max_iter=60, memory=3),
    "search": Broyden(max_iter=60, line_search=True),
    "newton": NewtonKrylov(max_iter=30),
}
EVERY = pytest.mark.parametrize("name", SOLVERS)
PER_SAMPLE = ("z", "converged", "residual_abs", "residual_rel", "steps", "evaluations")


def tight(name, tol=1e-9, **changes):
    return replace(SOLVERS[name], tol=tol, **changes)


def bent(z, a, x):
    """A smooth map of each sample alone; a (B, 1) sets how fast it contracts: about 1.2 a, none above 1."""
    return x + a * (z.roll(1, 1) - 0.3 * z * z + 0.2 * z.roll(2, 1) * z)


def sample_inputs(batch=6, width=5, dtype=torch.float64):
    return torch.rand(batch, 1, dtype=dtype) * 0.55 + 0.05, torch.rand(batch, width, dtype=dtype) * 0.4


def start(x):
    return torch.zeros_like(x)


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in PER_SAMPLE)


# Solutions that are known


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(SOLVERS)),
    batch=st.integers(1, 4),
    width=st.integers(1, 12),
    radius=st.floats(0, 0.8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    stop=st.sampled_from(["rel", "abs"]),
    check_every=st.integers(1, 4),
    compact=st.booleans(),
    seed=st.integers(0, 100),
)
def test_linear_maps(name, batch, width, radius, dtype, stop, check_every, compact, seed):
    torch.manual_seed(seed)
    matrix = torch.randn(width, width, dtype=torch.float64)
    matrix = (matrix * radius / torch.linalg.matrix_norm(matrix, 2)).to(dtype)
    b = torch.randn(batch, width, dtype=dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    solver = replace(SOLVERS[name], tol=tol, stop=stop)
    found = solve(
        lambda z, b: z @ matrix.T + b, start(b), (b,), solver=solver, check_every=check_every, compact=compact
    )
    exact = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - matrix.double(), b.double().T).T
    assert found.converged.all(), found.message
    scale = 1 if stop == "abs" else exact.norm(dim=1).max() + 1
    assert (found.z - exact).norm(dim=1).max() <= 20 * tol * scale / (1 - radius)
    assert (found.residual <= tol).all() and found.z.dtype == dtype
    assert (found.steps <= solver.max_iter).all() and (found.evaluations >= found.steps).all()
    if not solver.returns_image:  # what is returned is what was measured
        gz = found.z @ matrix.T + b - found.z
        torch.testing.assert_close(gz.norm(dim=1), found.residual_abs, rtol=0.1, atol=10 * torch.finfo(dtype).eps)


@EVERY
def test_every_solver_agrees_on_a_bent_map(name):
    a, x = sample_inputs()
    found = solve(bent, start(x), (a, x), solver=tight(name))
    assert found.converged.all() and "All 6 samples converged within" in found.message
    again = bent(found.z, a, x)
    assert ((again - found.z).norm(dim=1) / again.norm(dim=1)).max() <= 1e-9
    z = start(x)
    for _ in range(500):
        z = bent(z, a, x)
    torch.testing.assert_close(found.z, z, rtol=1e-7, atol=1e-9)


@EVERY
@pytest.mark.parametrize("z0", [0.0, 2.0, -3.0])
def test_zero_constant_and_identity(name, z0):
    z0 = torch.full((3, 4), z0, dtype=torch.float64)
    for fn, answer in (
        (torch.zeros_like, torch.zeros_like(z0)),
        (lambda z: torch.full_like(z, 7.0), torch.full_like(z0, 7.0)),
        (lambda z: z, z0),
        (lambda z: z.clone(), z0),
    ):
        found = solve(fn, z0, solver=SOLVERS[name])
        damped = SOLVERS[name].max_iter > 0 and getattr(SOLVERS[name], "tau", 1) != 1
        # relative to an f(z) of zero, a damped step never gets small, but for underflow
        if not (damped and answer.eq(0).all() and z0.ne(0).any()):
            assert found.converged.all(), found.message
            torch.testing.assert_close(found.z, answer, rtol=1e-2 if damped else 1e-12, atol=1e-12)
        if fn(z0).equal(z0):
            assert torch.equal(found.z, z0) and found.calls == 1


@EVERY
def test_one_element_and_no_dimension(name):
    solver = tight(name)
    dottie = 0.7390851332151607  # cos x = x
    for z0 in (torch.zeros(1, 1), torch.zeros(1), torch.zeros(())):
        z0 = z0.double()
        found = solve(lambda z: z.cos(), z0, solver=solver)
        assert found.converged.tolist() == [True] and found.z.shape == z0.shape and found.z.dtype == z0.dtype
        assert float(found.z) == pytest.approx(dottie, abs=1e-8)
    found = solve(lambda z, x: 0.5 * z.cos() + x.sum(), torch.zeros(()), (torch.ones(1, 2),), solver=solver)
    assert found.z.shape == () and found.z.dtype == torch.float32


@EVERY
@pytest.mark.parametrize("tree", ["tensor", "dict"])
def test_empty_batches_and_empty_states(name, tree):
    make = (
        (lambda b: torch.zeros(b, 3))
        if tree == "tensor"
        else lambda b: {"a": torch.zeros(b, 3), "b": (torch.zeros(b),)}
    )
    half = (lambda z, x: 0.5 * z) if tree == "tensor" else lambda z, x: {"a": z["a"] * 0.5, "b": (z["b"][0] * 0.5,)}
    found = solve(half, make(0), (torch.zeros(0, 2),), solver=SOLVERS[name], throw=True, states_at=(1, 3))
    assert found.message == "The batch is empty." and found.calls == 0 and len(found.states) == 2
    assert found.converged.shape == found.steps.shape == (0,) and found.residual_trace[0].shape == (0, 0)
    found = solve(lambda z: z, torch.zeros(2, 0), solver=SOLVERS[name])
    assert found.z.shape == (2, 0) and found.converged.all()


# Budgets


@EVERY
def test_no_steps(name):
    a, x = sample_inputs()
    z0 = torch.randn_like(x)
    found = solve(None, z0, (a, x), solver=tight(name, max_iter=0), states_at=(1,))
    assert torch.equal(found.z, z0) and torch.equal(found.states[0], z0) and found.calls == 0
    assert not found.converged.any() and found.residual_abs.isinf().all() and not found.steps.any()
    assert "max_iter=0" in found.message
    with pytest.raises(NotConverged, match="No steps were asked for"):
        solve(None, z0, solver=tight(name, max_iter=0), throw=True)


def test_one_and_two_steps_by_hand():
    a, x = sample_inputs()
    z0 = torch.randn_like(x) * 0.1
    f = lambda z: bent(z, a, x)
    one, two = f(z0), f(f(z0))
    run = lambda solver: solve(bent, z0, (a, x), solver=solver)
    for solver in (Picard(max_iter=1), Anderson(max_iter=1), Broyden(max_iter=1), Picard(max_iter=1, stop="never")):
        found = run(solver)
        torch.testing.assert_close(found.z, one, rtol=1e-13, atol=0)
        assert found.steps.tolist() == [1] * 6 and found.calls == (2 if isinstance(solver, Broyden) else 1)
    torch.testing.assert_close(run(Picard(max_iter=1, tau=0.3)).z, 0.3 * one + 0.7 * z0)
    torch.testing.assert_close(run(Anderson(max_iter=1, tau=0.3)).z, 0.3 * one + 0.7 * z0)
    torch.testing.assert_close(run(Picard(max_iter=2)).z, two)
    torch.testing.assert_close(run(Anderson(max_iter=2)).z, two)  # one pair is nothing to mix: z_1 = f(z_0)
    # Broyden: z_1 = f(z_0), then one secant pair
    g0, g1 = one - z0, f(one) - one
    s, y = one - z0, g1 - g0
    d = ((s + y) * (s * g1).sum(1, True)) / (s * y).sum(1, True)
    torch.testing.assert_close(run(Broyden(max_iter=2)).z, one + g1 - d)


@EVERY
def test_a_budget_that_runs_out_is_said(name):
    a, x = sample_inputs()
    found = solve(bent, start(x), (a, x), solver=tight(name, tol=1e-30, max_iter=3))
    assert not found.converged.any() and found.steps.tolist() == [3] * 6
    assert "6 of 6 samples did not reach rel residual 1e-30 in 3 steps (worst" in found.message
    assert "Raise max_iter or tol" in found.message
    with pytest.raises(NotConverged, match="Raise max_iter or tol") as raised:
        solve(bent, start(x), (a, x), solver=tight(name, tol=1e-30, max_iter=3), throw=True)
    assert isinstance(raised.value, UserError)


# Maps that are no contraction


@pytest.mark.parametrize("name", ["anderson", "broyden", "broyden3", "search", "newton"])
def test_accelerated_solvers_find_fixed_points_that_repel(name):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    repel = lambda z, x: x - 2.5 * z + 0.1 * z.sin()
    found = solve(repel, start(x), (x,), solver=tight(name))
    assert found.converged.all(), found.message
    torch.testing.assert_close(repel(found.z, x), found.z, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["picard", "damped"])
def test_plain_iteration_reports_divergence(name):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    repel = lambda z, x: x - 12.0 * z
    solver = tight(name)
    found = solve(repel, start(x), (x,), solver=solver)
    assert not found.converged.any() and "3 of 3 samples diverged: the map is not a contraction" in found.message
    assert "Damp it (tau < 1), normalise its weights" in found.message and "NewtonKrylov" in found.message
    assert found.z.isfinite().all()
    with pytest.raises(NotConverged, match=r"diverged.*Broyden or NewtonKrylov"):
        solve(repel, start(x), (x,), solver=solver, throw=True)
    assert solve(repel, start(x), (x,), solver=NewtonKrylov(tol=1e-10), throw=True).steps.max() <= 3


def test_damping_makes_an_overshooting_map_converge():
    z0 = torch.ones(2, 3, dtype=torch.float64)
    overshoot = lambda z: -1.5 * z + 5
    assert not solve(overshoot, z0, solver=Picard(max_iter=100)).converged.any()
    found = solve(overshoot, z0, solver=Picard(max_iter=100, tau=0.5, tol=1e-9))
    torch.testing.assert_close(found.z, torch.full_like(z0, 2.0))


@EVERY
def test_the_best_state_is_returned_and_it_is_finite(name):
    """A map that approaches, then leaves: the state of the smallest residual comes back, whatever happens later."""
    calls = []

    def leaves(z):
        calls.append(z)
        factor = (0.5, 0.1, 3.0, 1e100, math.inf, math.nan)[min(len(calls) - 1, 5)]
        return z + factor * torch.ones_like(z)

    found = solve(leaves, torch.ones(1, 2, dtype=torch.float64), solver=replace(SOLVERS[name], max_iter=8))
    assert found.z.isfinite().all() and not found.converged.any() and found.residual_abs.isfinite().all()
    if name != "newton":  # its Jacobian products are calls, too
        assert float(found.residual_abs) <= 0.1 * 2**0.5 + 1e-12
    if name == "picard":
        torch.testing.assert_close(found.z, torch.full((1, 2), 1.6, dtype=torch.float64))
        assert found.steps.tolist() == [5], "it ends with the first residual that is not finite"


@EVERY
@pytest.mark.parametrize("stop", ["rel", "abs", "never"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_that_is_never_finite(name, stop, bad):
    z0 = torch.ones(2, 3)
    found = solve(lambda z: z * bad, z0, solver=replace(SOLVERS[name], max_iter=12, stop=stop))
    assert torch.equal(found.z, z0) and not found.converged.any() and found.residual.isinf().all()
    assert "2 of 2 samples" in found.message


@pytest.mark.parametrize("solver", [Picard(max_iter=3), Anderson(max_iter=3), Broyden(max_iter=3)], ids=str)
def test_norms_that_overflow_are_no_convergence(solver):
    huge = torch.full((1, 4), 1e20)  # its norm is inf in single precision; that of the step, 2e18, is not
    found = solve(lambda z: z * 1.01, huge, solver=solver)
    measurable = found.z.norm(dim=1) < math.inf  # Anderson comes back to where norms are numbers
    assert not found.converged.any() and (found.residual_rel.isinf() | measurable).all(), (
        "x / inf must not pass for a residual of zero"
    )
    found = solve(lambda z: torch.full_like(z, 1e25), torch.zeros(1, 4), solver=replace(solver, max_iter=1))
    assert not found.converged.any()


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("search", "newton")])
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e-12), (torch.float32, 1e-30), (torch.float64, 1e-200)])
def test_tiny_states_are_solved_like_large_ones(name, dtype, scale):
    b = torch.linspace(1, 2, 4, dtype=dtype) * scale
    found = solve(lambda z: 0.9 * z + b, torch.zeros(2, 4, dtype=dtype), solver=tight(name, tol=1e-4, max_iter=300))
    assert found.converged.all() and (found.steps > 0).all()
    torch.testing.assert_close(found.z / scale, (10 * b / scale).expand(2, 4), rtol=2e-3, atol=0)
    assert (found.residual_rel <= 1e-4).all()
    short = solve(lambda z: 0.9 * z + b, torch.zeros(2, 4, dtype=dtype), solver=Picard(max_iter=40, tol=1e-4))
    assert not short.converged.any(), "an error of 1.5 % is no convergence at any scale"


def test_a_relative_residual_that_only_the_growth_of_the_state_makes_small_is_mentioned():
    found = solve(lambda z: 1.0005 * z + 1, torch.zeros(2, 3), solver=Picard(max_iter=3000, tol=1e-3))
    assert found.converged.all() and "running away. Test it with solver.stop=abs" in found.message
    quiet = solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=Picard())
    assert quiet.message.endswith("steps.") and "running away" not in quiet.message


@pytest.mark.parametrize("solver", [Picard(max_iter=3), Anderson(max_iter=3), Broyden(max_iter=3)], ids=str)
def test_more_steps_are_no_remedy_for_overflow(solver):
    found = solve(lambda z: z * 1e30 + 1e38, torch.full((2, 4), 1e30), solver=solver)
    assert not found.converged.any()
    assert "overflows float32" in found.message and "max_iter" not in found.message


@EVERY
def test_the_record_says_which_point_its_residual_belongs_to(name):
    a, x = sample_inputs(batch=1)
    found = solve(bent, start(x), (a, x), solver=tight(name, tol=1e-4), trajectory=True)
    residual = lambda z: (bent(z, a, x) - z).norm(dim=1)
    if found.z_is_image:
        measured = torch.stack([residual(point) for point in found.trajectory])
        torch.testing.assert_close(measured.amin(0), found.residual_abs, rtol=1e-6, atol=1e-12)
        assert (residual(found.z) < found.residual_abs).all()
    else:
        torch.testing.assert_close(residual(found.z), found.residual_abs, rtol=1e-6, atol=1e-12)


def test_a_record_prints_as_one_line():
    found = solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=Picard())
    assert repr(found) == (
        "Solution(2 of 2 samples converged, 10 to 10 steps, rel residual at the point the image of which is z at most "
        "0.00098)"
    )
    assert "residual at z at most" in repr(solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=Broyden()))
    assert repr(solve(lambda z: z, torch.zeros(0, 3), solver=Picard())) == "Solution(empty batch)"
    with FakeTensorMode():
        fake = solve(lambda z: 0.5 * z, torch.zeros(2, 3), solver=Picard(max_iter=2))
    assert repr(fake) == "Solution(shapes only, 2 samples)"


# Samples do not see each other


@EVERY
@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e30, 40.0])
def test_a_failing_neighbour_changes_no_bit_of_the_others(name, wrong):
    a, x = sample_inputs(width=8)
    solver, others = tight(name, max_iter=40), torch.tensor([0, 1, 2, 4, 5])
    calm = solve(bent, start(x), (a, x), solver=solver, compact=False)
    a[3], x[3] = wrong, 2.0
    for options in ({"compact": False}, {"compact": True}, {"compact": False, "check_every": 3}):
        found = solve(bent, start(x), (a, x), solver=solver, **options)
        if found.converged[3]:  # there may be a solution even so
            torch.testing.assert_close(bent(found.z, a, x)[3], found.z[3])
        for key in PER_SAMPLE:
            mine, alone = getattr(found, key)[others], getattr(calm, key)[others]
            if options["compact"]:
                torch.testing.assert_close(mine, alone, rtol=1e-6, atol=1e-9 if key == "z" else 1e-7)
            else:
                assert torch.equal(mine, alone), (key, options)
        assert found.z.isfinite().all()
        traced = found.residual_trace[0][others]
        assert traced.isfinite().all()


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(SOLVERS)),
    batch=st.integers(1, 7),
    width=st.integers(1, 9),
    compact=st.booleans(),
    check_every=st.integers(1, 5),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_the_batch_does_not_matter(name, batch, width, compact, check_every, seed, data):
    torch.manual_seed(seed)
    a, x = sample_inputs(batch, width)
    solver = tight(name, tol=1e-7)
    whole = solve(bent, start(x), (a, x), solver=solver)
    rows = torch.tensor(data.draw(st.permutations(range(batch)))[: data.draw(st.integers(1, batch))])
    part = solve(bent, start(x)[rows], (a[rows], x[rows]), solver=solver, compact=compact, check_every=check_every)
    assert part.steps.tolist() == whole.steps[rows].tolist() and part.converged.all()
    assert part.evaluations.tolist() == whole.evaluations[rows].tolist()
    torch.testing.assert_close(part.z, whole.z[rows], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(part.residual_rel, whole.residual_rel[rows], rtol=1e-4, atol=1e-12)


@EVERY
def test_permuting_the_batch_permutes_the_answer(name):
    a, x = sample_inputs(7, 6)
    order = torch.randperm(7)
    solver = tight(name)
    found = solve(bent, start(x), (a, x), solver=solver, compact=False)
    permuted = solve(bent, start(x), (a[order], x[order]), solver=solver, compact=False)
    for key in PER_SAMPLE:
        assert torch.equal(getattr(permuted, key), getattr(found, key)[order]), key


@EVERY
def test_runs_repeat_bit_for_bit_and_draw_nothing(name):
    a, x = sample_inputs()
    a[2] = 1.6
    z0 = torch.randn_like(x)
    before, kept = torch.random.get_rng_state(), z0.clone()
    first, second = (solve(bent, z0, (a, x), solver=tight(name, max_iter=15)) for _ in range(2))
    assert same(first, second) and torch.equal(torch.random.get_rng_state(), before) and torch.equal(z0, kept)


# Compaction


def spread(batch=40, slow=4, width=16):
    """Contraction factors such that a tenth of the samples needs ten times the steps of the others."""
    a = torch.full((batch, 1), 0.5)
    a[:slow] = 0.5**0.1
    return a.double(), torch.rand(batch, width, dtype=torch.float64)


@pytest.mark.parametrize("solver", [Picard(max_iter=400, tol=1e-6), Anderson(max_iter=400, tol=1e-6)])
def test_easy_samples_stop_costing(solver):
    a, x = spread()
    signs = torch.linspace(-1, 1, 16, dtype=torch.float64)
    sizes = []

    def linear(z, a, x):
        sizes.append(len(z))
        return a * signs * z.roll(1, 1) + x if isinstance(solver, Anderson) else a * z + x

    off = solve(linear, start(x), (a, x), solver=solver, compact=False)
    assert set(sizes) == {40} and off.samples == 40 * off.calls == sum(sizes)
    sizes.clear()
    on = solve(linear, start(x), (a, x), solver=solver)
    assert on.converged.all() and on.samples == sum(sizes) and on.calls == len(sizes) == off.calls
    if isinstance(solver, Picard):
        assert on.steps[0] > 8 * on.steps[-1]
        assert on.samples <= 0.6 * off.samples
    assert on.samples <= off.samples and sorted(sizes, reverse=True) == sizes
    torch.testing.assert_close(on.z, off.z, rtol=1e-12, atol=1e-14)
    assert torch.equal(on.steps, off.steps) and torch.equal(on.evaluations, off.evaluations)


@EVERY
def test_inputs_follow_their_sample(name):
    a, x = sample_inputs(9, 4)
    mark = torch.arange(9.0, dtype=torch.float64)

    def checked(z, a2, x2, nested):
        rows = nested["mark"].long()
        assert torch.equal(a2, a[rows]) and torch.equal(x2, x[rows]) and nested["name"] == "n" and len(z) == len(a2)
        return bent(z, a2, x2)

    found = solve(checked, start(x), (a, x, {"mark": mark, "name": "n"}), solver=tight(name))
    assert found.converged.all() and found.samples <= 9 * found.calls


def test_a_closure_always_sees_the_whole_batch():
    a, x = spread()
    found = solve(lambda z: a * z + x, start(x), solver=Picard(max_iter=400, tol=1e-6))
    assert found.converged.all() and found.samples == 40 * found.calls


# States along the way


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(SOLVERS)),
    positions=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    compact=st.booleans(),
    check_every=st.integers(1, 3),
    seed=st.integers(0, 50),
)
def test_as_many_states_as_asked_for_each_the_best_of_its_steps(name, positions, compact, check_every, seed):
    torch.manual_seed(seed)
    a, x = sample_inputs(4, 3)
    solver = tight(name, tol=1e-6, max_iter=25)
    found = solve(bent, start(x), (a, x), solver=solver, states_at=positions, compact=compact, check_every=check_every)
    assert len(found.states) == len(positions)
    for position, state in zip(positions, found.states, strict=True):
        shorter = solve(bent, start(x), (a, x), solver=replace(solver, max_iter=position))
        torch.testing.assert_close(state, shorter.z, rtol=1e-9, atol=1e-11)
        if position >= int(found.steps.max()):
            assert torch.equal(state, found.z), "after an early stop it is the solution"


@EVERY
def test_the_last_state_is_the_solution_however_early_it_stopped(name):
    a, x = sample_inputs()
    solver = tight(name, tol=1e-4)
    found = solve(bent, start(x), (a, x), solver=solver, states_at=(solver.max_iter // 2, solver.max_iter))
    assert found.steps.max() < solver.max_iter // 2 and len(found.states) == 2
    assert torch.equal(found.states[0], found.z) and torch.equal(found.states[1], found.z)


@EVERY
@pytest.mark.parametrize("compact", [True, False])
def test_trajectory(name, compact):
    a, x = sample_inputs()
    solver = tight(name)
    found = solve(bent, start(x), (a, x), solver=solver, trajectory=True, compact=compact)
    points = found.trajectory
    assert torch.equal(points[0], start(x)) and len(points) == found.residual_trace[0].shape[1]
    gz = torch.stack([(bent(z, a, x) - z).norm(dim=1) for z in points], dim=1)
    for row in range(6):
        last = int(found.steps[row]) + (0 if solver.returns_image else 1)
        torch.testing.assert_close(found.residual_trace[0][row, :last], gz[row, :last], rtol=1e-6, atol=1e-12)
        assert found.residual_trace[0][row, :last].min() == found.residual_abs[row]
    if name == "picard":
        for before, after in pairwise(points[:4]):
            torch.testing.assert_close(after, bent(before, a, x))
    assert solve(bent, start(x), (a, x), solver=solver).trajectory is None


def test_never_takes_every_step_and_looks_at_nothing(monkeypatch):
    a, x = sample_inputs()
    looks = []
    for method in ("__bool__", "__int__", "__float__", "tolist", "item"):
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(torch.Tensor, method, lambda t, o=original, m=method: looks.append(m) or o(t))
    for name, solver in SOLVERS.items():
        if name in ("search", "newton"):
            continue
        counts = {}
        for steps in (5, 12):
            looks.clear()
            found = solve(bent, start(x), (a, x), solver=replace(solver, max_iter=steps, stop="never"))
            counts[steps] = len(looks)
            assert found.steps.tolist() == [steps] * 6
        assert counts[5] == counts[12] == 1, "z0 is checked once, then the device is left alone"
        looks.clear()
        solve(bent, start(x), (a, x), solver=replace(solver, max_iter=24, tol=1e-30))
        every = len(looks)
        looks.clear()
        solve(bent, start(x), (a, x), solver=replace(solver, max_iter=24, tol=1e-30), check_every=8)
        assert len(looks) <= every / 4 and every <= 2 * 25 + 1
    monkeypatch.undo()
    z = start(x)
    for _ in range(12):
        z = bent(z, a, x)
    assert torch.equal(solve(bent, start(x), (a, x), solver=Picard(max_iter=12, stop="never")).z, z)


def test_never_returns_the_last_state_that_was_finite():
    calls = []

    def breaks(z):
        calls.append(0)
        return z + 1 if len(calls) < 4 else z * math.nan

    found = solve(breaks, torch.zeros(1, 2), solver=Picard(max_iter=9, stop="never"))
    assert torch.equal(found.z, torch.full((1, 2), 3.0)) and found.calls == 9


@EVERY
def test_looking_less_often_changes_nothing_but_the_calls(name):
    a, x = sample_inputs()
    often, seldom = (solve(bent, start(x), (a, x), solver=tight(name), check_every=n, compact=False) for n in (1, 7))
    assert same(often, seldom) and often.calls <= seldom.calls


# States of any structure and precision


Pair = namedtuple("Pair", "h c")


@EVERY
@pytest.mark.parametrize(
    "split, join",
    [
        (lambda z: (z[:, :2], z[:, 2:]), lambda z: torch.cat(tuple(z), 1)),
        (
            lambda z: [z[:, :2].reshape(-1, 2, 1), z[:, 2], z[:, 3:]],
            lambda z: torch.cat([z[0][..., 0], z[1][:, None], z[2]], 1),
        ),
        (lambda z: {"a": Pair(z[:, :1], z[:, 1:4]), "b": [z[:, 4:]]}, lambda z: torch.cat([*z["a"], *z["b"]], 1)),
    ],
    ids=["tuple", "list", "nested"],
)  # fmt: skip
def test_a_structure_is_the_vector_of_its_parts(name, split, join):
    a, x = sample_inputs()
    solver = tight(name)
    flat = solve(bent, start(x), (a, x), solver=solver, states_at=(2,), trajectory=True)
    nested = solve(
        lambda z, a, x: split(bent(join(z), a, x)), split(start(x)), (a, x), solver=solver, states_at=(2,),
        trajectory=True,
    )  # fmt: skip
    assert torch.equal(join(nested.z), flat.z) and torch.equal(join(nested.states[0]), flat.states[0])
    assert torch.equal(nested.steps, flat.steps) and torch.equal(nested.residual_abs, flat.residual_abs)
    assert all(torch.equal(join(u), v) for u, v in zip(nested.trajectory, flat.trajectory, strict=True))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states(name, dtype):
    a, x = sample_inputs(dtype=torch.float32)
    seen = set()

    def half(z, a, x):
        seen.add(z.dtype)
        return bent(z, a.to(dtype), x.to(dtype))

    found = solve(half, start(x).to(dtype), (a, x), solver=tight(name, tol=2e-2))
    assert found.converged.all() and found.z.dtype == dtype and seen == {dtype}
    assert found.residual_abs.dtype == torch.float32, "measured and mixed in single precision"
    exact = solve(bent, start(x), (a, x), solver=Picard(max_iter=100, tol=1e-6)).z
    assert ((found.z.float() - exact).norm(dim=1) / exact.norm(dim=1)).max() < 0.1


def test_leaves_keep_their_own_type():
    found = solve(
        lambda z: {"a": z["a"] * 0.5 + 1, "b": (z["b"].float() * 0.5 + z["a"].mean(1)).to(z["b"].dtype)},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float16)},
        solver=Picard(tol=1e-2),
    )
    assert (found.z["a"].dtype, found.z["b"].dtype) == (torch.float64, torch.float16) and found.converged.all()
    assert found.residual_abs.dtype == torch.float64


@EVERY
def test_under_autocast_only_the_map_is_in_low_precision(name):
    torch.manual_seed(1)
    cell = torch.nn.Linear(16, 16)
    with torch.no_grad():
        cell.weight.mul_(0.9 / torch.linalg.matrix_norm(cell.weight, 2))
    x = torch.randn(5, 16)
    seen = set()

    def fn(z, x):
        y = cell(z)
        seen.add((z.dtype, y.dtype))
        return torch.tanh(y + x)

    exact = solve(fn, start(x), (x,), solver=tight(name, tol=1e-6))
    assert exact.converged.all() and seen == {(torch.float32, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = solve(fn, start(x), (x,), solver=tight(name, tol=5e-3))
        assert torch.is_autocast_enabled("cpu")
    assert seen == {(torch.float32, torch.bfloat16)} and mixed.z.dtype == torch.float32
    assert mixed.converged.all() and (mixed.z - exact.z).abs().max() < 0.05
    assert mixed.steps.max() <= exact.steps.max(), "mixing in bfloat16 would keep it from converging"


@EVERY
def test_autocast_does_not_reach_the_mixing(name):
    """A map that autocast leaves alone gives the same bits with it."""
    a, x = sample_inputs(dtype=torch.float32)
    for make in (lambda z: z, lambda z: z.double()):
        z0 = make(start(x))
        plain = solve(bent, z0, (a, x), solver=tight(name, tol=1e-6))
        with torch.autocast("cpu", torch.bfloat16):
            assert same(solve(bent, z0, (a, x), solver=tight(name, tol=1e-6)), plain)


# Surroundings


@EVERY
def test_autograd_is_off_inside_and_untouched_outside(name):
    a, x = sample_inputs()
    a.requires_grad_()
    z0 = start(x).requires_grad_()
    found = solve(bent, z0, (a, x), solver=SOLVERS[name], states_at=(1,))
    assert torch.is_grad_enabled() and not found.z.requires_grad and not found.states[0].requires_grad
    with torch.inference_mode():
        again = solve(bent, start(x), (a.detach(), x), solver=SOLVERS[name])
    torch.testing.assert_close(again.z.clone(), found.z, rtol=1e-12, atol=1e-14)


@EVERY
def test_shapes_alone(name):
    with FakeTensorMode():
        cell = torch.nn.Linear(4, 4)
        for stop in ("rel", "never"):
            found = solve(
                lambda z, x: {"a": torch.tanh(cell(z["a"]) + x), "b": z["b"] * 0.5},
                {"a": torch.zeros(3, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}, (torch.zeros(3, 4),),
                solver=replace(SOLVERS[name], max_iter=4, stop=stop), states_at=(2, 4), check_every=2,
            )  # fmt: skip
            assert found.z["a"].shape == (3, 4) and found.z["b"].dtype == torch.bfloat16
            assert found.converged.shape == found.steps.shape == (3,) and len(found.states) == 2
            assert found.calls >= 4


def test_a_module_is_a_map():
    cell = torch.nn.Linear(3, 3)
    with torch.no_grad():
        cell.weight.mul_(0.5)
    found = solve(cell, torch.zeros(2, 3), solver=Anderson(tol=1e-5))
    torch.testing.assert_close(cell(found.z), found.z, rtol=1e-4, atol=1e-5)


def test_the_record_without_its_states():
    a, x = sample_inputs()
    found = solve(bent, start(x), (a, x), solver=Anderson(), states_at=(3,))
    record = found.detached()
    assert record.z is None and record.states == [] and record.solver_state is None
    assert record.message == found.message and torch.equal(record.residual, found.residual)
    assert torch.equal(record.residual_trace[1], found.residual_trace[1])


def test_residuals_of_those_who_left_stay():
    a, x = spread(10, 1, 4)
    found = solve(lambda z, a, x: a * z + x, start(x), (a, x), solver=Picard(max_iter=400, tol=1e-6))
    trace = found.residual_trace[1]
    assert trace.shape == (10, int(found.steps.max())) and trace.isfinite().all()
    assert (trace[1, int(found.steps[1]) - 1 :] <= 1e-6).all() and trace[0, -2] > 1e-6
    torch.testing.assert_close(
        trace[0, 1:] / trace[0, :-1], torch.full((trace.shape[1] - 1,), 0.5**0.1).double(), rtol=0.6, atol=0
    )


# Bad input, in one sentence


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(z0=torch.full((2, 3), math.nan)), "z0 is not finite. Start from a finite state, for example zeros."),
        (dict(z0=torch.tensor([[0.0], [math.inf]])), "z0 is not finite"),
        (dict(z0=torch.zeros(2, 3, dtype=torch.int32)), "z0 must be a floating-point tensor"),
        (dict(z0=[]), "z0 must be a floating-point tensor"),
        (dict(fn=lambda z: None), "fn returned None. Return the next state"),
        (dict(fn=lambda z: z[:, :2]), r"fn changed the shape of the state: \(2, 3\) became \(2, 2\)"),
        (dict(fn=lambda z: z[:1]), r"\(2, 3\) became \(1, 3\)"),
        (dict(fn=lambda z: (z, z)), r"fn returned \(tensor, tensor\), but z0 is tensor"),
        (dict(fn=lambda z: {"z": z}), r"fn returned \{z: tensor\}"),
        (dict(fn=lambda z: z.mul_(0.5)), "fn wrote into its state in place. Return a new tensor"),
        (
            dict(args=(torch.zeros(3, 1),)),
            r"args of solve must be per-sample tensors with 2 rows like z0, got shape \(3, 1\)",
        ),
        (dict(args=({"x": torch.zeros(())},)), "Close over what all samples share"),
        (
            dict(solver="anderson"),
            r"solver must be an object of common.deq.solvers, got 'anderson'. Pass an object such",
        ),
        (dict(solver=Anderson), "got the class Anderson. Pass an object such as Anderson"),
        (dict(grad="implicit"), r"grad must be an object of common.deq.grads, got 'implicit'"),
        (dict(check_evry=2), "solve has no argument 'check_evry'. Closest: check_every. It takes fn, z0"),
        (dict(max_iter=2), "solve has no argument 'max_iter'. It is a setting of the solver: "),
        (dict(check_every=0), "check_every must be >= 1, got 0"),
        (dict(states_at=(0,)), r"states_at must lie in 1 .. max_iter=50, got 0"),
        (dict(states_at=(3, 51)), "got 51. Change the position"),
    ],
)
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), NewtonKrylov()], ids=lambda s: type(s).__name__)
def test_bad_input(change, message, solver):
    options = {"fn": lambda z, *_: 0.5 * z + 1, "z0": torch.zeros(2, 3), "args": None, "solver": solver} | change
    with pytest.raises(UserError, match=message) as raised:
        solve(options.pop("fn"), options.pop("z0"), options.pop("args"), **options)
    assert "\n" not in str(raised.value)


def test_an_error_of_the_map_comes_through():
    def wrong(z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solve(wrong, torch.zeros(1, 1), solver=Picard())


def test_throw_with_a_gradient_rule():
    x = torch.ones(2, 3)
    for grad in (OneStep(), Backprop()):
        with pytest.raises(NotConverged, match="2 of 2 samples"):
            solve(lambda z: -3 * z + x, start(x), solver=Picard(max_iter=20), grad=grad, throw=True)
