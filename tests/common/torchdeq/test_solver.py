"""The facade's solver functions: torchdeq's triple, right where torchdeq's are wrong."""

import math

import pytest
import torch

from common.errors import UserError
from common.torchdeq import api as torchdeq

NAMES = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")
KEYS = {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius"}


def linear(width=64, radius=0.9, batch=4, seed=0, symmetric=False, dtype=torch.float64):
    """(func, x0, solution) of x -> A x + b, spectral radius of A given."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(width, width, generator=g, dtype=torch.float64) / math.sqrt(width)
    if symmetric:
        a = (a + a.T) / 2
    a = a * (radius / torch.linalg.eigvals(a).abs().max())
    b = torch.randn(batch, width, generator=g, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - a, b.T).T
    a, b = a.to(dtype), b.to(dtype)
    return lambda x: x @ a.T + b, torch.zeros_like(b), exact.to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_every_solver_finds_the_fixed_point_and_says_how(name, stop_mode):
    func, x0, exact = linear(width=16, radius=0.6)
    x, states, info = torchdeq.get_solver(name)(func, x0, max_iter=60, tol=1e-9, stop_mode=stop_mode)
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-7)
    assert states == [] and set(info) == KEYS and isinstance(info, torchdeq.SolverStat) and isinstance(info, dict)
    columns = 1 if name == "simple_fixed_point_iter" else 60
    for key in ("abs", "rel"):
        assert info[f"{key}_lowest"].shape == (4,) and info[f"{key}_trace"].shape == (4, columns)
    assert info["nstep"].shape == (4,) and info["nstep"].is_floating_point() and info["sradius"].tolist() == [-1.0]


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("return_final", [False, True])
def test_plain_iteration_is_torchdeqs_step_by_step(tau, return_final):
    func, x0, _ = linear(width=8, radius=0.7)
    x, states, info = torchdeq.fixed_point_iter(
        func, x0, max_iter=9, tol=1e-12, indexing=[2, 5], tau=tau, return_final=return_final
    )
    path, trace = [x0], []
    for _ in range(9):
        path.append(tau * func(path[-1]) + (1 - tau) * path[-1])
        trace.append(torch.linalg.vector_norm(path[-1] - path[-2], dim=1))
    assert torch.equal(x, path[9]) and torch.equal(states[0], path[2]) and torch.equal(states[1], path[5])
    torch.testing.assert_close(info["abs_trace"], torch.stack(trace, 1))
    assert info["nstep"].tolist() == [9.0] * 4
    simple = torchdeq.simple_fixed_point_iter(func, x0, max_iter=9, tau=tau, indexing=[2, 5])
    assert torch.equal(simple[0], path[9]) and torch.equal(simple[1][0], path[2])
    torch.testing.assert_close(simple[2]["abs_trace"], trace[-1][:, None])


def test_the_best_state_is_returned_unless_the_last_is_asked_for():
    func = lambda x: torch.where(x < 3.5, x + 2.0, x + torch.tensor([0.5, 1.0]))  # residual 2, 2, then .5 or 1
    x0 = torch.zeros(2)
    rough = lambda x: torch.where((x > 3) & (x < 5), x + 0.1, x + 2.0)  # smallest residual at the third step
    x, _, info = torchdeq.fixed_point_iter(rough, x0, max_iter=30)
    assert x.tolist() == pytest.approx([4.1, 4.1]) and info["nstep"].tolist() == [3.0, 3.0]
    assert info["abs_lowest"].tolist() == pytest.approx([0.1, 0.1])
    last, _, info = torchdeq.fixed_point_iter(func, x0, max_iter=4, return_final=True)
    assert last.tolist() == [5.0, 6.0] and info["nstep"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("name", NAMES)
def test_no_nan_from_a_state_that_was_fine(name):
    func = lambda x: torch.where(x.abs() < 2, 0.9 * x + 0.5, torch.nan)  # wanders to 5: not finite after a while
    x, _, info = torchdeq.get_solver(name)(func, torch.zeros(2, 3), max_iter=30)
    assert x.isfinite().all() and info["abs_lowest"].isfinite().all() and (info["nstep"] >= 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_indexing_returns_as_many_states_as_listed(name):
    func, x0, exact = linear(width=16, radius=0.5)
    solver = torchdeq.get_solver(name)
    x, states, info = solver(func, x0, max_iter=200, tol=1e-5, indexing=[3, 100, 200, 500])
    assert len(states) == 4 and (info["nstep"].max() < 200 or name == "simple_fixed_point_iter")
    assert (states[0] - exact).abs().max() > 1e-3 and torch.equal(states[-1], x)
    assert torch.equal(states[2], x)


@pytest.mark.parametrize("max_iter", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_few_steps_are_taken_none_invented(name, max_iter):
    func, x0, exact = linear(width=16, radius=0.5)
    x, _, info = torchdeq.get_solver(name)(func, x0, max_iter=max_iter)
    assert info["nstep"].tolist() == [float(max_iter)] * 4
    if max_iter == 0:
        assert torch.equal(x, x0) and (info["abs_lowest"] == float("inf")).all() and info["abs_trace"].shape[0] == 4
        return
    error = lambda z: torch.linalg.vector_norm(z - exact, dim=1)
    assert (error(x) < error(x0)).all() and (info["abs_lowest"] < 1e3).all()  # torchdeq's Anderson: x0 and 1e8


def test_the_ridge_is_relative():
    func, x0, _ = linear(width=64, radius=0.99, symmetric=True)
    steps = []
    for scale in (1.0, 1e-4):
        scaled = lambda x, s=scale: s * func(x / s)
        info = torchdeq.anderson_solver(scaled, x0, max_iter=300, tol=1e-6, stop_mode="rel")[2]
        steps.append(info["nstep"].max().item())
    assert steps[0] == steps[1] < 100  # torchdeq, with its lam of 1e-4: 300 and more
    strong = torchdeq.anderson_solver(func, x0, max_iter=300, tol=1e-6, stop_mode="rel", lam=10.0)[2]
    assert strong["nstep"].max() > 2 * steps[0]  # the setting is used


@pytest.mark.parametrize("thres", [1, 2, 5, 10])
def test_any_broyden_memory_is_valid(thres):
    func, x0, exact = linear(width=64, radius=0.9)
    x, _, info = torchdeq.broyden_solver(func, x0, max_iter=400, tol=1e-6, stop_mode="rel", LBFGS_thres=thres)
    assert info["nstep"].max() < 400
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-3)


def test_rel_does_not_depend_on_the_width():
    steps = []
    for width in (8, 512, 4096):
        func = lambda x: 0.5 * x + 1
        info = torchdeq.fixed_point_iter(func, torch.zeros(1, width), tol=1e-3, stop_mode="rel")[2]
        steps.append(info["nstep"].item())
    assert len(set(steps)) == 1


def test_the_simple_iteration_takes_raw_callables_and_serves_backward():
    x, _, info = torchdeq.simple_fixed_point_iter(torch.cos, torch.tensor(0.0), max_iter=80, tau=0.9)
    assert x.item() == pytest.approx(0.7390851, abs=1e-6) and info["nstep"].tolist() == [80.0]
    theta = torch.tensor([[0.5]], requires_grad=True)
    deq = torchdeq.get_deq(f_solver="simple_fixed_point_iter", b_solver="simple_fixed_point_iter", ift=True)
    z = deq(lambda z: theta * torch.cos(z), torch.zeros(1, 1))[0][-1]
    z.sum().backward()
    expected = math.cos(z.item()) / (1 + 0.5 * math.sin(z.item()))
    assert theta.grad.item() == pytest.approx(expected, rel=1e-5)


def test_a_trace_is_residuals_one_per_step_for_every_solver():
    func, x0, _ = linear(width=16, radius=0.5)
    for name in ("fixed_point_iter", "anderson", "broyden"):
        info = torchdeq.get_solver(name)(func, x0, max_iter=30, tol=1e-6)[2]
        trace, steps = info["abs_trace"], int(info["nstep"].max())
        assert trace.shape == (4, 30) and trace.max() < 1e3 and steps < 30
        assert (trace[:, steps:] == trace[:, steps - 1 : steps]).all()
        torch.testing.assert_close(trace.min(1).values, info["abs_lowest"])
        first = torch.linalg.vector_norm(func(x0) - x0, dim=1)
        if name == "broyden":  # its first step leads to func(x0), where the residual is measured then
            first = torch.linalg.vector_norm(func(func(x0)) - func(x0), dim=1)
        torch.testing.assert_close(trace[:, 0], first)


def test_broyden_records_the_state_after_the_step_asked_for():
    func, x0, _ = linear(width=16, radius=0.5)
    for position in (1, 2, 4):
        (state,) = torchdeq.broyden_solver(func, x0, max_iter=20, tol=1e-9, indexing=[position])[1]
        alone = torchdeq.broyden_solver(func, x0, max_iter=position, tol=1e-9)[0]
        torch.testing.assert_close(state, alone, rtol=0, atol=1e-12)


def test_a_line_search_helps_where_full_steps_do_not():
    func = lambda x: x - torch.atan(x) * 3  # full steps overshoot
    residual = {}
    for ls in (False, True):
        x0 = torch.tensor([[5.0], [10.0]])
        residual[ls] = torchdeq.broyden_solver(func, x0, max_iter=6, tol=1e-9, ls=ls)[2]["abs_lowest"]
    assert (residual[True] < 0.1 * residual[False]).all(), residual


def test_final_step_statistics_take_tensors_and_lists():
    z, fz = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)
    info = torchdeq.solver_stat_from_final_step(z, fz, 12)
    parts = torchdeq.solver_stat_from_final_step([z[:, :1], z[:, 1:]], [fz[:, :1], fz[:, 1:]], nstep=12)
    for each in (info, parts):
        assert each["abs_lowest"].tolist() == pytest.approx([math.sqrt(3)] * 2)
        assert each["rel_lowest"].tolist() == pytest.approx([1, 1]) and each["nstep"].tolist() == [12.0, 12.0]
        assert each["abs_trace"].shape == (2, 1)
    empty = torchdeq.SolverStat()
    assert set(empty) == KEYS and empty["abs_trace"].tolist() == [[-1.0]] and empty["nstep"].tolist() == [-1.0]


def test_keywords_of_other_solvers_pass_misspelt_ones_are_named():
    func, x0, _ = linear(width=8, radius=0.5)
    for name in NAMES:
        solver = torchdeq.get_solver(name)
        solver(func, x0, tau=1.0, m=5, lam=1e-3, LBFGS_thres=3, ls=False, beta=1.0, logger=None)
        with pytest.warns(UserWarning, match="LBGFS_thres .closest: LBFGS_thres"):
            solver(func, x0, LBGFS_thres=3)
    for given, words in (
        ({"stop_mode": "relative"}, "stop_mode must be abs or rel"),
        ({"max_iter": -1}, "max_iter"),
    ):
        with pytest.raises(UserError, match=words):
            torchdeq.anderson_solver(func, x0, **given)
    with pytest.raises(UserError, match="Closest: anderson"):
        torchdeq.get_solver("andersson")


def test_a_solver_written_with_torchdeqs_helpers():
    """Plain iteration by hand: best states, residuals and steps are those of fixed_point_iter."""
    func, x0, _ = linear(width=8, radius=0.5)

    def own(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, **kwargs):
        flat = torchdeq.solver.utils.batch_flatten(x0)
        trace, lowest, step = torchdeq.solver.utils.init_solver_info(len(flat), flat.device)
        best = x = flat
        for number in range(1, max_iter + 1):
            fx = torchdeq.solver.utils.batch_flatten(func(x.view_as(x0)))
            gap = (fx - x).norm(dim=1)
            relative = gap / (fx.norm(dim=1) + 1e-8)
            best = torchdeq.solver.utils.update_state(best, fx, number, stop_mode, gap, relative, trace, lowest, step)
            x = fx
        info = torchdeq.solver.utils.solver_stat_from_info(stop_mode, lowest, trace, step)
        return best.view_as(x0), [], info

    mine, _, info = own(func, x0, max_iter=12)
    theirs, _, wanted = torchdeq.fixed_point_iter(func, x0, max_iter=12, tol=0)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(info["abs_trace"][:, 1:], wanted["abs_trace"])
    torch.testing.assert_close(info["nstep"], wanted["nstep"].to(info["nstep"]))
    mixed = torchdeq.solver.utils.batch_masked_mixing(
        torch.tensor([True, False]), torch.tensor([[1.0], [math.nan]]), torch.tensor([[math.inf], [2.0]])
    )
    assert mixed.tolist() == [[1.0], [2.0]]
    with pytest.raises(UserError, match="needs a tensor"):
        torchdeq.solver.utils.batch_masked_mixing(torch.tensor([True]), 1.0, 2.0)
