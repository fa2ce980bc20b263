"""The facade's layers: against numbers of torchdeq 0.1.0, and right where those are wrong."""

import argparse
import copy
import io
import json
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.torchdeq import api as torchdeq

# Recorded with the released torchdeq 0.1.0 in float64, z -> tanh(z W^T + x), W = .4 sin(1..9), x = cos(0..5): states,
# gradients of sum_k (k + 1) ||z_k||^2, abs_lowest, nstep. "list": the state as tensors of one and two columns.
FIXTURE = Path(__file__).parents[2] / "fixtures" / "deq" / "torchdeq_api.json"
CASES = json.loads(FIXTURE.read_text(encoding="utf-8"))
DOUBLE = torch.float64


def cell():
    w = 0.4 * torch.sin(torch.arange(9, dtype=DOUBLE) + 1).reshape(3, 3)
    return w.requires_grad_(), torch.cos(torch.arange(6, dtype=DOUBLE)).reshape(2, 3).requires_grad_()


def problem(as_list=False):
    """(func, z_init, w, x)."""
    w, x = cell()
    if not as_list:
        return lambda z: torch.tanh(z @ w.T + x), torch.zeros(2, 3, dtype=DOUBLE), w, x

    def func(a, b):
        z = torch.tanh(torch.cat([a, b], 1) @ w.T + x)
        return z[:, :1], z[:, 1:]

    return func, [torch.zeros(2, 1, dtype=DOUBLE), torch.zeros(2, 2, dtype=DOUBLE)], w, x


def joined(z):
    return z if isinstance(z, torch.Tensor) else torch.cat(list(z), 1)


def label(case):
    words = {**case["settings"], **case.get("solver_kwargs", {})}
    return ",".join([f"{k}={v}" for k, v in words.items()] + [k for k in ("eval", "list") if case.get(k)])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_states_gradients_and_info_are_those_of_torchdeq(case):
    func, z_init, w, x = problem(case.get("list", False))
    given = copy.deepcopy(case["settings"])
    deq = torchdeq.get_deq(given).train(not case.get("eval", False))
    z_out, info = deq(func, z_init, solver_kwargs=case.get("solver_kwargs"))
    assert isinstance(z_out, list) and len(z_out) == len(case["states"]) and given == case["settings"]
    # where both stop at a tolerance they are within it; the same iteration is the same to rounding
    exact = case["settings"].get("f_solver") != "anderson"
    tight = {"rtol": 1e-9, "atol": 1e-10}
    for z, expected in zip(z_out, case["states"], strict=True):
        assert type(z) is type(z_init)
        torch.testing.assert_close(joined(z).flatten().detach(), torch.tensor(expected, dtype=DOUBLE), **tight)
    if exact and case["settings"]["core"] == "indexing" and case["settings"].get("f_max_iter") != 0:
        lowest = torch.tensor(case["abs_lowest"], dtype=DOUBLE)
        torch.testing.assert_close(info["abs_lowest"], lowest, rtol=1e-6, atol=1e-13)
        if "b_solver" not in case["settings"]:  # at a residual of 0 the step is rounding
            assert info["nstep"].tolist() == case["nstep"]
    if case.get("eval"):
        assert not joined(z_out[0]).requires_grad
        return
    sum((k + 1) * joined(z).square().sum() for k, z in enumerate(z_out)).backward()
    for got, name in ((w.grad, "W"), (x.grad, "x")):
        torch.testing.assert_close(got.flatten(), torch.tensor(case[name], dtype=DOUBLE), rtol=1e-8, atol=1e-9)


def solution():
    func, z, _, _ = problem()
    with torch.no_grad():
        for _ in range(300):
            z = func(z)
    return z


# ---------------------------------------------------------------------------------------------------------- settings


class Own:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize(
    "make", [lambda **v: argparse.Namespace(**v), dict, Own, lambda **v: torchdeq.utils.config.DEQConfig(v)]
)
def test_settings_come_from_anything_and_keywords_come_first(make):
    args = make(f_solver="anderson", f_max_iter=7, f_tol=1e-4, grad=[2], learning_rate=0.1, f_maxiter="foreign, kept")
    deq = torchdeq.get_deq(args, f_max_iter=9, core="indexing")
    assert isinstance(deq, torchdeq.DEQIndexing) and isinstance(deq, torchdeq.DEQBase)
    assert (deq.f_max_iter, deq.f_tol, deq.f_solver) == (9, 1e-4, torchdeq.anderson_solver)
    assert deq.args.get("learning_rate") == 0.1 and deq.args.get("nothing", 3) == 3
    assert (deq.b_max_iter, deq.b_tol, deq.f_stop_mode, deq.b_stop_mode) == (40, 1e-6, "abs", "abs")
    assert deq.indexing == [9] and deq.hook is None


def test_the_callers_settings_are_never_changed_and_no_stat_is_heard():
    for args in ({"f_max_iter": 7}, argparse.Namespace(f_max_iter=7)):
        before = copy.deepcopy(args)
        torchdeq.get_deq(args, f_solver="broyden", core="indexing")
        torchdeq.apply_norm(nn.Linear(2, 2), args=args, clip=True)
        assert args == before
    options = {"m": 3}
    func, z_init, _, _ = problem()
    torchdeq.get_deq(f_solver="anderson")(func, z_init, solver_kwargs=options)
    assert options == {"m": 3}
    for core in ("sliced", "indexing"):
        for solver in ("fixed_point_iter", "anderson", "broyden"):
            deq = torchdeq.get_deq(no_stat=True, core=core, f_solver=solver, n_states=2)
            assert deq.no_stat is True
            info = deq(func, z_init)[1]
            assert info["abs_trace"].shape == (2, 1) and torch.equal(info["abs_trace"][:, 0], info["abs_lowest"])
    assert torchdeq.get_deq(f_solver="simple_fixed_point_iter").no_stat is True
    assert torchdeq.get_deq(f_solver="simple_fixed_point_iter", no_stat=False).no_stat is False
    assert torchdeq.get_deq().no_stat is False


@pytest.mark.parametrize(
    "name, closest",
    [
        ("f_maxiter", "f_max_iter"),
        ("max_iter", "f_max_iter"),
        ("n_state", "n_states"),
        ("grads", "grad"),
        ("tol", "f_tol"),
    ],
)
def test_keywords_that_are_no_settings_are_named_in_one_warning(name, closest):
    """get_deq(**vars(args)) works, as in torchdeq, but a misspelling does not go unnoticed."""
    with pytest.warns(UserWarning, match=rf"batch_size, {name} \(closest: {closest}\)") as warned:
        deq = torchdeq.get_deq(batch_size=64, **{name: 3})
    assert len(warned) == 1 and deq.f_max_iter == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdeq.get_deq({name: 3}, f_max_iter=12)  # in args anything may stand


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_what_torchdeq_takes_is_taken(core):
    """Numbers of numpy, steps in a tensor or an array, a tolerance of 0, a tau above 1."""
    net = nn.Linear(4, 4).double()
    with torch.no_grad():
        net.weight.mul_(0.3)
    x = torch.randn(3, 4, dtype=torch.float64)
    func = lambda z: torch.tanh(net(z)) + x
    plain = torchdeq.get_deq(core=core, f_max_iter=12, indexing=[3, 6], grad=[2, 2, 2], tau=1.0, f_solver="anderson")
    for indexing in (torch.tensor([3, 6]), np.array([3, 6]), (np.int64(3), 6)):
        numpy = torchdeq.get_deq(
            core=core, f_max_iter=np.int64(12), indexing=indexing, grad=np.array([2, 2, 2]), f_solver="anderson"
        )
        for ours, theirs in zip(numpy(func, torch.zeros_like(x))[0], plain(func, torch.zeros_like(x))[0], strict=True):
            torch.testing.assert_close(ours, theirs)
    all_steps = torchdeq.get_deq(core=core, f_max_iter=30, f_tol=0.0, f_solver="fixed_point_iter")
    _, info = all_steps(func, torch.zeros_like(x))
    trace = info["abs_trace"]
    assert trace.shape[1] == 30 and (trace[:, 20] < 1e-6).all() and (trace[:, :15].diff() < 0).all()
    states, _ = torchdeq.get_deq(core=core, f_max_iter=8, grad=2, tau=1.2)(func, torch.zeros_like(x))
    z = torch.zeros_like(x)
    for _ in range(8):
        z = func(z)
    for _ in range(2):
        z = 1.2 * func(z) - 0.2 * z
    torch.testing.assert_close(states[-1], z, rtol=1e-3, atol=1e-3)  # the solve stops at an absolute 1e-3
    found, _, info = torchdeq.anderson_solver(func, torch.zeros_like(x), tau=1.2, max_iter=40, tol=1e-10)
    torch.testing.assert_close(found, func(found), rtol=1e-8, atol=1e-8)


def test_a_remainder_of_the_steps_is_left_out_by_slices_and_put_first_by_indexing():
    """Seven steps, two states: torchdeq's slices take 3 + 3, its indexing the steps 4 and 7."""
    assert torchdeq.get_deq(core="sliced", f_max_iter=7, n_states=2).indexing == [3, 3]
    assert torchdeq.get_deq(core="indexing", f_max_iter=7, n_states=2).indexing == [4, 7]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z: torchdeq.get_deq(f_solver="andersen"), "Closest: anderson"),
        (lambda z: torchdeq.get_deq(b_solver="broiden"), "Closest: broyden"),
        (lambda z: torchdeq.get_deq(core="slices"), "Closest: sliced"),
        (lambda z: torchdeq.get_deq({"f_max_iter": -1}), "f_max_iter"),
        (lambda z: torchdeq.get_deq({"f_max_iter": 2.5}), "f_max_iter"),
        (lambda z: torchdeq.get_deq({"f_stop_mode": "relative"}), "f_stop_mode must be abs or rel"),
        (lambda z: torchdeq.get_deq({"grad": 0}), "at least 1"),
        (lambda z: torchdeq.get_deq({"grad": [1, 2], "n_states": 3}), "one per state"),
        (lambda z: torchdeq.get_deq({"tau": 0.0}), "tau must be > 0"),
        (lambda z: torchdeq.get_deq({"sup_gap": 3, "grad": 2}), "sup_gap=3"),
        (lambda z: torchdeq.get_deq({"indexing": [50]}), "indexing must list"),
        (lambda z: torchdeq.get_deq("anderson"), "Namespace"),
        (lambda z: torchdeq.get_deq()(lambda z: z[:, :2], z), "shape"),
        (lambda z: torchdeq.get_deq()(lambda z: None, z), "None"),
        (lambda z: torchdeq.get_deq()(lambda a, b: (a,), [z, z]), "structure of z0"),
        (lambda z: torchdeq.get_deq()(torch.cos, z + float("nan")), "not finite"),
        (lambda z: torchdeq.register_deq("x", "y"), "derived from DEQBase"),
        (lambda z: torchdeq.register_solver("x", "halving"), "function"),
    ],
)
def test_wrong_settings_and_calls_are_named(call, message):
    _, z_init, _, _ = problem()
    with pytest.raises(UserError, match=message):
        call(z_init)


def test_misspelt_keywords_of_a_call_are_named():
    func, z_init, _, _ = problem()
    deq = torchdeq.get_deq()
    with pytest.warns(UserWarning, match="closest: LBFGS_thres"):
        deq(func, z_init, solver_kwargs={"LBFGS_thresh": 3})
    with pytest.warns(UserWarning, match="closest: solver_kwargs"):
        deq(func, z_init, solver_kwarg={})


def test_evaluation_budget_and_radius():
    func, z_init, w, _ = problem()
    for words, steps in (
        ({"eval_factor": 1.5}, 9),
        ({"eval_factor": 0.5}, 3),
        ({"eval_f_max_iter": 4, "eval_factor": 9}, 4),
    ):
        for core in ("sliced", "indexing"):
            deq = torchdeq.get_deq(f_max_iter=6, f_tol=1e-12, core=core, n_states=2, **words).eval()
            assert deq.eval_f_max_iter == steps
            z_out, info = deq(func, z_init)
            assert len(z_out) == 1 and info["nstep"].tolist() == [steps] * 2 and info["abs_trace"].shape == (2, steps)
            assert info["sradius"].tolist() == [0.0]
            assert deq(func, z_init, solver_kwargs={"f_max_iter": 2})[1]["nstep"].tolist() == [2.0, 2.0]
    z_out, info = torchdeq.get_deq(f_tol=1e-9, f_max_iter=100).eval()(func, z_init, sradius_mode=True)
    jacobian = torch.diag_embed(1 - z_out[0].detach() ** 2) @ w.detach()
    torch.testing.assert_close(info["sradius"], torch.linalg.eigvals(jacobian).abs().amax(1), rtol=1e-3, atol=1e-3)
    training = torchdeq.get_deq()(func, z_init, sradius_mode=True)[1]
    assert training["sradius"].tolist() == [-1.0]


# ---------------------------------------------------------------------------------------------------- states, gradients


@settings(max_examples=40, deadline=None)
@given(
    core=st.sampled_from(["sliced", "indexing"]),
    solver=st.sampled_from(["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]),
    f_max_iter=st.integers(0, 12),
    n_states=st.integers(1, 5),
    as_list=st.booleans(),
    tol=st.sampled_from([1e-8, 1e-2, 10.0]),
)
def test_as_many_states_as_asked_for_whenever_the_solver_stops(core, solver, f_max_iter, n_states, as_list, tol):
    func, z_init, w, _ = problem(as_list)
    deq = torchdeq.get_deq(core=core, f_solver=solver, f_max_iter=f_max_iter, n_states=n_states, f_tol=tol)
    z_out, info = deq(func, z_init)
    assert len(z_out) == n_states and all(type(z) is type(z_init) for z in z_out)
    assert info["nstep"].shape == (2,) and (info["nstep"] <= f_max_iter).all()
    for z in z_out:
        w.grad = None
        joined(z).sum().backward(retain_graph=True)
        assert w.grad.isfinite().all()


def test_an_early_stop_loses_neither_states_nor_the_solution_nor_its_rule():
    func, z_init, w, _ = problem()
    deq = torchdeq.get_deq(core="indexing", indexing=[4, 20, 30], f_max_iter=40, f_tol=1e-8, ift=True, b_tol=1e-12)
    backward = []
    z_out, info = deq(func, z_init, backward_writer=backward.append)
    assert info["nstep"].max() < 30 and len(z_out) == 4
    torch.testing.assert_close(z_out[-1], solution(), rtol=0, atol=1e-8)
    assert (z_out[0] - solution()).abs().max() > 1e-6  # recorded at step 4
    z_out[-1].sum().backward()
    got, (_, _, w, x) = w.grad, problem()
    z = solution()
    for _ in range(100):
        z = torch.tanh(z @ w.T + x)
    z.sum().backward()
    torch.testing.assert_close(got, w.grad, rtol=1e-6, atol=1e-8)  # the exact rule, not the one-step rule
    assert len(backward) == 1 and backward[0]["nstep"].min() > 1


def diverging(rows=3):
    """One contraction per row, but the middle one overflows."""
    rate = torch.tensor([0.5, 1e30, 0.3][:rows])[:, None]
    return lambda z: rate * z + 1, torch.zeros(rows, 2)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_a_diverging_sample_spoils_neither_itself_nor_the_others(core, solver):
    func, z_init = diverging()
    z_out, info = torchdeq.get_deq(f_solver=solver, core=core, f_tol=1e-5).eval()(func, z_init)
    assert z_out[0].isfinite().all()
    torch.testing.assert_close(z_out[0][0], torch.full((2,), 2.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(z_out[0][2], torch.full((2,), 1 / 0.7), rtol=0, atol=1e-4)
    assert all(info[key][[0, 2]].isfinite().all() for key in ("abs_lowest", "rel_lowest", "nstep"))


def test_a_sample_that_is_nan_at_once_holds_nobody_up():
    func = lambda z: torch.where(torch.tensor([[True], [False]]), 0.5 * z + 1, torch.nan)
    z, _, info = torchdeq.fixed_point_iter(func, torch.zeros(2, 3))
    alone, _, single = torchdeq.fixed_point_iter(lambda z: 0.5 * z + 1, torch.zeros(1, 3))
    assert torch.equal(z[:1], alone) and torch.equal(info["nstep"][:1], single["nstep"])
    assert torch.equal(z[1], torch.zeros(3)) and info["abs_lowest"][1] == float("inf") and info["nstep"][1] == 0


def test_sliced_info_covers_all_slices():
    func, z_init, _, _ = problem()
    deq = torchdeq.get_deq(n_states=3, f_max_iter=12, f_tol=1e-12, grad=2)
    info = deq(func, z_init)[1]
    assert info["nstep"].tolist() == [12.0, 12.0] and info["abs_trace"].shape == info["rel_trace"].shape == (2, 12)
    torch.testing.assert_close(info["abs_trace"][:, -1], info["abs_lowest"])


@pytest.mark.parametrize("rule", [{"ift": True}, {"hook_ift": True}])
def test_second_derivatives_raise(rule):
    x = torch.tensor([[0.3]], requires_grad=True)
    z_out, _ = torchdeq.get_deq(f_tol=1e-7, f_max_iter=100, **rule)(lambda z: torch.cos(z) * x, torch.zeros(1, 1))
    (first,) = torch.autograd.grad(z_out[-1].sum(), x, create_graph=True)
    z = z_out[-1].item()
    assert first.item() == pytest.approx(math.cos(z) / (1 + 0.3 * math.sin(z)), abs=1e-5)
    with pytest.raises(UserError, match="Second derivatives"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("rule, calls", [({"ift": True}, 5), ({"hook_ift": True}, 4), ({"grad": 2}, 5)])
def test_how_often_the_map_is_called(rule, calls):
    func, z_init, _, _ = problem()
    counted = []
    wrapped = lambda z: counted.append(0) or func(z)
    z_out, _ = torchdeq.get_deq(f_solver="simple_fixed_point_iter", f_max_iter=3, **rule)(wrapped, z_init)
    z_out[0].sum().backward()
    assert len(counted) == calls  # ift evaluates it once more in the backward pass


# --------------------------------------------------------------------------------------------- registered by the user


def halving(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, rate=0.8, **kwargs):
    """A solver as torchdeq's users write them: drops the states after its early stop."""
    states, x = [], x0
    for k in range(max_iter):
        fx = func(x)
        x = x + rate * (fx - x)
        if indexing and k + 1 in indexing:
            states.append(x)
        if (fx - x).norm() < tol:
            break
    return x, states, torchdeq.solver_stat_from_final_step(x, func(x, tau=1.0) if kwargs.get("tau") else fx, k + 1)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_registered_solver_serves_both_passes(core, as_list):
    torchdeq.register_solver("halving_for_test", halving)
    assert torchdeq.get_solver("halving_for_test") is halving
    func, z_init, w, _ = problem(as_list)
    deq = torchdeq.get_deq(
        f_solver="halving_for_test", b_solver="halving_for_test", core=core, ift=True, f_tol=1e-9, b_tol=1e-11,
        f_max_iter=100, b_max_iter=100, n_states=4,
    )  # fmt: skip
    written = []
    z_out, info = deq(func, z_init, solver_kwargs={"rate": 0.9}, backward_writer=written.append)
    assert len(z_out) == 4 and info["nstep"].shape == (2,)
    torch.testing.assert_close(joined(z_out[-1]), solution(), rtol=0, atol=1e-8)
    joined(z_out[-1]).sum().backward()
    plain_func, plain_init, plain_w, _ = problem()
    plain = torchdeq.get_deq(ift=True, f_tol=1e-11, b_tol=1e-11, f_max_iter=200, b_max_iter=200)
    plain(plain_func, plain_init)[0][0].sum().backward()
    torch.testing.assert_close(w.grad, plain_w.grad, rtol=1e-6, atol=1e-8)
    assert len(written) == 1 and written[0]["abs_lowest"].shape == (2,)


class TwoStage(torchdeq.DEQBase):
    """A training graph as torchdeq's documentation suggests: everything else comes from the base class."""

    def __init__(self, args=None, stages=2, **kwargs):
        super().__init__(args, **kwargs)
        self.stages = self.args.get("stages", stages)
        self.rule = torchdeq.grad.backward_factory(grad_type=2, tau=0.5)

    def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, solver_kwargs=None, **kwargs):
        with torch.no_grad():
            return self.f_solver(deq_func, x0=z_init, max_iter=f_max_iter, tol=self.f_tol, stop_mode=self.f_stop_mode)

    def forward(self, func, z_init, solver_kwargs=None, sradius_mode=False, backward_writer=None, **kwargs):
        deq_func, z = torchdeq.utils.layer_utils.deq_decorator(func, z_init, no_stat=self.no_stat)
        z_out = []
        for _ in range(self.stages):
            z, _, info = self._solve_fixed_point(deq_func, z, f_max_iter=self.f_max_iter)
            z_out += self.rule(self, deq_func, deq_func.detach(z), writer=backward_writer)
        info["sradius"] = self._sradius(deq_func, z)
        return [deq_func.vec2list(each) for each in z_out], info


@pytest.mark.parametrize("as_list", [False, True])
def test_a_registered_container_uses_the_base_class(as_list):
    torchdeq.register_deq("two_stage_for_test", TwoStage)
    func, z_init, w, _ = problem(as_list)
    deq = torchdeq.get_deq(core="two_stage_for_test", stages=3, f_solver="broyden")
    z_out, info = deq(func, z_init)
    assert isinstance(deq, TwoStage) and len(z_out) == 3 and info["sradius"].shape == (2,)
    joined(z_out[-1]).sum().backward()
    assert w.grad.abs().sum() > 0
    with pytest.warns(UserWarning, match="stage .closest: stages"):
        torchdeq.get_deq(core="two_stage_for_test", stage=3)
    with pytest.raises(NotImplementedError):
        torchdeq.DEQBase()(func, z_init)


class Doubled(torchdeq.DEQIndexing):
    def _solve_fixed_point(self, deq_func, z_init, f_max_iter=None, **kwargs):
        return super()._solve_fixed_point(deq_func, z_init, f_max_iter=2 * f_max_iter, **kwargs)


def test_the_containers_can_be_derived_from():
    func, z_init, _, _ = problem()
    deq = Doubled({"f_max_iter": 5, "f_tol": 1e-12}, n_states=2).eval()
    assert deq(func, z_init)[1]["nstep"].tolist() == [10.0, 10.0]


# ---------------------------------------------------------------------------------------------------------- mechanics


def test_a_layer_can_be_copied_pickled_and_saved():
    for words in ({"ift": True}, {"core": "indexing", "n_states": 3, "grad": [1, 2, 3]}):
        deq = torchdeq.get_deq(words)
        func, z_init, _, _ = problem()
        expected = deq(func, z_init)[0][-1]
        for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
            assert torch.equal(other(func, z_init)[0][-1], expected)
        torch.save(deq.state_dict(), io.BytesIO())
        assert not list(deq.parameters())


def test_states_of_any_kind():
    deq = torchdeq.get_deq(f_tol=1e-6)
    assert torchdeq.fixed_point_iter(torch.cos, torch.tensor(0.0), tol=1e-6)[0].item() == pytest.approx(
        0.739085, abs=1e-5
    )
    z = deq(lambda z: 0.5 * z + 1, torch.zeros(3))[0][0]
    assert z.shape == (3,) and z.tolist() == pytest.approx([2, 2, 2], abs=1e-4)
    low = deq(lambda a, b: [0.5 * a + 1, 0.5 * b], (torch.zeros(2, 3, 4).bfloat16(), torch.ones(2)))[0][0]
    assert isinstance(low, tuple) and low[0].dtype == torch.bfloat16 and low[0].shape == (2, 3, 4)
    empty = deq(lambda z: z, torch.zeros(0, 4))
    assert empty[0][0].shape == (0, 4) and empty[1]["nstep"].shape == (0,)


@pytest.mark.parametrize(
    "given", [{}, {"core": "indexing", "n_states": 3}, {"f_solver": "broyden", "ift": True}, {"f_solver": "anderson"}]
)
def test_a_step_can_be_planned_without_data(given):
    with FakeTensorMode():
        layer = nn.Linear(4, 4)
        z_out, info = torchdeq.get_deq(f_max_iter=6, **given)(lambda z: torch.tanh(layer(z)), torch.zeros(2, 4))
        z_out[-1].sum().backward()
    assert layer.weight.grad.shape == (4, 4) and info["nstep"].shape == (2,)


def test_the_map_may_run_in_lower_precision():
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    x = torch.randn(4, 16)
    for words in ({"ift": True}, {"grad": 3}, {"f_solver": "anderson"}, {"f_solver": "broyden"}):
        with torch.autocast("cpu", torch.bfloat16):
            z_out, _ = torchdeq.get_deq(f_stop_mode="rel", f_tol=1e-2, **words)(
                lambda z: torch.tanh(layer(z) + x), torch.zeros(4, 16)
            )
        z_out[-1].float().sum().backward()
        assert z_out[-1].isfinite().all() and layer.weight.grad.isfinite().all()
