import copy
import os
import pickle
import socket
from dataclasses import replace

import pytest
import torch
from torch import multiprocessing, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.deq.grads import Backprop, Implicit, Neumann, OneStep, Shine, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm, reset
from common.deq.regular import JacobianPenalty
from common.deq.solve import solve
from common.deq.solvers import Anderson, Broyden, NewtonKrylov, Picard
from common.errors import UserError

D64 = torch.float64
RULES = {
    "onestep": OneStep(),
    "unrolled": Unrolled(steps=3, recompute=True),
    "neumann": Neumann(steps=3),
    "hook": Implicit(),
    "function": Implicit(recompute=True),
    "shine": Shine(),
    "backprop": Backprop(steps=9),
}
EVERY = pytest.mark.parametrize("name", RULES)


class Cell(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.lin = nn.Linear(width, width, dtype=D64)
        with torch.no_grad():
            self.lin.weight.mul_(0.7 / torch.linalg.matrix_norm(self.lin.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.lin(z) + x)


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.cell, self.deq, self.head = Cell(), DEQ(**options), nn.Linear(4, 2, dtype=D64)

    def forward(self, x):
        return self.head(self.deq(self.cell, torch.zeros_like(x), (x,))[-1])


def inputs(batch=5):
    return torch.randn(batch, 4, dtype=D64)


def test_the_layer_is_the_solution_of_its_solver():
    cell, x = Cell(), inputs()
    for solver in (Picard(), Anderson(), Broyden(), NewtonKrylov()):
        deq = DEQ(solver=solver, grad=Unrolled(steps=2))
        (state,) = deq.eval()(cell, torch.zeros_like(x), (x,))
        found = solve(cell, torch.zeros_like(x), (x,), solver=solver)
        assert torch.equal(state, found.z) and not state.requires_grad and torch.equal(deq.solution.steps, found.steps)
        (trained,) = deq.train()(cell, torch.zeros_like(x), (x,))
        assert trained.requires_grad and not torch.equal(trained, found.z), "two steps further"
        with torch.no_grad():
            (quiet,) = deq(cell, torch.zeros_like(x), (x,))
        assert torch.equal(quiet, found.z) and not quiet.requires_grad
    assert not list(DEQ().parameters()) and not DEQ().state_dict()


def test_evaluation_has_its_own_budget():
    assert DEQ(solver=Anderson(max_iter=20), eval_factor=1.5).eval_solver == Anderson(max_iter=30)
    assert DEQ(solver=Anderson(max_iter=20), eval_solver=Picard(max_iter=7)).eval_solver == Picard(max_iter=7)
    deq = DEQ(solver=Picard(max_iter=4, tol=1e-30), eval_factor=2.5, states=2)
    cell, x = Cell(), inputs()
    assert len(deq(cell, torch.zeros_like(x), (x,))) == 2 and deq.solution.steps.tolist() == [4] * 5
    assert len(deq.eval()(cell, torch.zeros_like(x), (x,))) == 1 and deq.solution.steps.tolist() == [10] * 5


@EVERY
@pytest.mark.parametrize("states", [1, 3, (2, 5)])
@pytest.mark.parametrize("tol", [1e-30, 1e-1])
def test_as_many_states_as_asked_for_under_early_stop_the_last_is_the_solution(name, states, tol):
    cell, x = Cell(), inputs()
    solver = Broyden(max_iter=9, tol=tol)
    for sliced in (False, True):
        if sliced and name == "backprop":
            continue
        deq = DEQ(solver=solver, grad=RULES[name], states=states, sliced=sliced)
        got = deq(cell, torch.zeros_like(x), (x,))
        wanted = {1: 1, 3: 3, (2, 5): 3}[states]
        assert len(got) == wanted and all(state.requires_grad for state in got)
        assert deq.positions == {1: (9,), 3: (3, 6, 9), (2, 5): (2, 5, 9)}[states]
        full = solve(cell, torch.zeros_like(x), (x,), solver=solver)
        if not sliced and name != "backprop":
            last = RULES[name].attach(lambda z: cell(z, x), full.z, None, solution=full)[-1]
            torch.testing.assert_close(got[-1], last, rtol=1e-9, atol=1e-10)
            assert torch.equal(deq.solution.steps, full.steps)
        cell.zero_grad()
        sum(state.square().sum() for state in got).backward()
        assert cell.lin.weight.grad.isfinite().all() and cell.lin.weight.grad.abs().max() > 0


def test_intermediate_states_are_those_of_the_positions():
    cell, x = Cell(), inputs()
    solver = Picard(max_iter=12, tol=1e-30)
    got = DEQ(solver=solver, grad=OneStep(), states=3)(cell, torch.zeros_like(x), (x,))
    z, by_hand = torch.zeros_like(x), []
    for step in range(1, 13):
        z = cell(z, x)
        if step % 4 == 0:
            by_hand.append(cell(z, x))
    torch.testing.assert_close(got, by_hand)
    # sliced: each slice goes on from the differentiated state, one step further
    got = DEQ(solver=solver, grad=OneStep(), states=3, sliced=True)(cell, torch.zeros_like(x), (x,))
    z, by_hand = torch.zeros_like(x), []
    for step in range(1, 16):
        z = cell(z, x)
        if step % 5 == 0:
            by_hand.append(z)
    torch.testing.assert_close(got, by_hand)


def test_slices_go_on_from_the_solver_if_wanted_and_have_equal_lengths():
    """DEQ-Flow's first version goes on from the solver's state; 7 steps in two slices are 3 + 3, as in TorchDEQ."""
    cell, x = Cell(), inputs()
    deq = DEQ(solver=Picard(max_iter=7, tol=1e-30), grad=OneStep(), states=2, sliced="solver")
    got = deq(cell, torch.zeros_like(x), (x,))
    z, by_hand = torch.zeros_like(x), []
    for step in range(1, 7):
        z = cell(z, x)
        if step % 3 == 0:
            by_hand.append(cell(z, x))
    torch.testing.assert_close(got, by_hand)
    assert deq.positions == (3, 6) and deq.solution.steps.tolist() == [6] * 5
    assert DEQ(solver=Picard(max_iter=7), states=2).positions == (4, 7), "gradient branches beside one solve"
    with pytest.raises(UserError, match=r"deq\.sliced must be true, false or solver"):
        DEQ(sliced="solve")


def test_a_rule_with_a_gap_multiplies_the_states():
    cell, x = Cell(), inputs()
    got = DEQ(solver=Picard(max_iter=8), grad=Unrolled(steps=4, gap=2), states=2)(cell, torch.zeros_like(x), (x,))
    assert len(got) == 4
    assert len(DEQ(grad=Unrolled(steps=4, gap=2)).eval()(cell, torch.zeros_like(x), (x,))) == 1


def test_slices_are_recorded_together():
    cell, x = Cell(), inputs()
    deq = DEQ(solver=Picard(max_iter=9, tol=1e-30), grad=OneStep(), states=3, sliced=True)
    deq(cell, torch.zeros_like(x), (x,))
    record = deq.solution
    assert (
        record.steps.tolist() == record.evaluations.tolist() == [9] * 5 and record.calls == 9 and record.samples == 45
    )
    assert record.residual_trace[0].shape == (5, 9) and (record.residual_abs == record.residual_trace[0][:, -1]).all()
    assert record.max_iter == 9 and "in 9 steps" in record.message


def test_training_without_a_solve():
    """The zoo's language model: max_iter 0 and a long differentiable unrolling."""
    cell, x = Cell(), inputs()
    deq = DEQ(
        solver=Picard(max_iter=0), grad=Unrolled(steps=12, tau=1.0), eval_solver=Picard(max_iter=12, stop="never")
    )
    (state,) = deq(cell, torch.zeros_like(x), (x,))
    (evaluated,) = deq.eval()(cell, torch.zeros_like(x), (x,))
    torch.testing.assert_close(state, evaluated)


@EVERY
def test_what_is_kept_holds_no_graph(name):
    cell, x = Cell(), inputs().requires_grad_()
    deq = DEQ(solver=Broyden(max_iter=30), grad=RULES[name], penalty=JacobianPenalty())
    state = deq(cell, torch.zeros_like(x), (x,))[-1]
    assert deq.last is None and deq.solution.z is None and deq.solution.solver_state is None
    tensors = [v for v in vars(deq.solution).values() if isinstance(v, torch.Tensor)]
    assert tensors and not any(t.requires_grad for t in tensors)
    assert deq.penalty_value.requires_grad and deq.penalty_value.dim() == 0
    deq.keep_last = True
    deq(cell, torch.zeros_like(x), (x,))
    assert deq.last[0] is cell and not deq.last[1].requires_grad and deq.last[2][0] is x
    assert state.requires_grad


def test_the_penalty_is_of_the_training_step_alone():
    cell, x = Cell(), inputs()
    deq = DEQ(solver=Picard(), penalty=JacobianPenalty(weight=3.0, vectors=200))
    deq.generator = torch.Generator().manual_seed(0)
    z = deq(cell, torch.zeros_like(x), (x,))[-1].detach()
    jacobian = torch.vmap(torch.func.jacrev(lambda v, u: cell(v, u)))(z, x)
    expected = 3 * jacobian.square().sum() / z.numel()
    torch.testing.assert_close(deq.penalty_value, expected, rtol=0.15, atol=0)
    (gradient,) = torch.autograd.grad(deq.penalty_value, cell.lin.weight)
    assert gradient.abs().max() > 0
    before = deq.generator.get_state()
    deq.generator.manual_seed(0)
    value = deq.penalty_value.detach()
    deq(cell, torch.zeros_like(x), (x,))
    assert torch.equal(deq.penalty_value.detach(), value) and torch.equal(deq.generator.get_state(), before)
    deq.eval()(cell, torch.zeros_like(x), (x,))
    assert deq.penalty_value is None
    with torch.no_grad():
        deq.train()(cell, torch.zeros_like(x), (x,))
    assert deq.penalty_value is None


@EVERY
def test_copies_and_pickles_of_a_used_layer(name):
    x = inputs()
    net = Net(solver=Broyden(max_iter=30, tol=1e-8), grad=RULES[name], penalty=JacobianPenalty())
    net.deq.keep_last = True
    loss = net(x).square().sum() + net.deq.penalty_value
    loss.backward()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.deq.solution is None and other.deq.penalty_value is None and other.deq.last is None
        assert other.deq.solver == net.deq.solver and type(other.deq.grad) is type(net.deq.grad)
        torch.manual_seed(3)
        other.zero_grad()
        other(x).square().sum().backward()
        net.zero_grad()
        torch.manual_seed(3)
        net(x).square().sum().backward()
        assert torch.equal(other.cell.lin.weight.grad, net.cell.lin.weight.grad)
    assert net.deq.solution is not None


@EVERY
def test_two_calls_of_one_layer_in_one_graph(name):
    net, x = Net(solver=Broyden(max_iter=60, tol=1e-12), grad=RULES[name]), inputs(6)
    together = torch.autograd.grad(net(x).square().sum(), net.cell.lin.weight)[0]
    split = net(x[:2]).square().sum() + net(x[2:]).square().sum()
    torch.testing.assert_close(torch.autograd.grad(split, net.cell.lin.weight)[0], together, rtol=1e-9, atol=1e-10)


@EVERY
def test_accumulated_over_micro_batches(name):
    # Shine reads Broyden's last pairs: changes of size tol, whose rounding is eps / tol of them
    tol = 1e-6 if name == "shine" else 1e-12
    net, x = Net(solver=Broyden(max_iter=60, tol=tol), grad=RULES[name]), inputs(6)
    net(x).square().sum().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for part in x.split(2):
        net(part).square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], whole, rtol=1e-9, atol=1e-10)


@EVERY
@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_with_normalised_weights_held_for_the_solve(name, kind):
    """Same gradient as with the weights written out; the held weight's graph serves every step of the rule."""
    torch.manual_seed(0)
    net, x = Net(solver=Broyden(max_iter=60, tol=1e-10), grad=RULES[name]), inputs()
    apply_norm(net.cell, kind=kind)
    weight = net.cell.lin.weight.detach().clone()
    plain = Net(solver=Broyden(max_iter=60, tol=1e-10), grad=RULES[name])
    plain.load_state_dict(
        {"cell.lin.weight": weight, "cell.lin.bias": net.cell.lin.bias, "head.weight": net.head.weight,
         "head.bias": net.head.bias}
    )  # fmt: skip
    net.eval()  # no power iteration: the weights of `plain`
    net.deq.train()
    for _ in range(2):
        reset(net)
        net.zero_grad()
        plain.zero_grad()
        net(x).square().sum().backward()
        plain(x).square().sum().backward()
        torch.testing.assert_close(net.cell.lin.bias.grad, plain.cell.lin.bias.grad, rtol=1e-7, atol=1e-9)
        through = dict(net.cell.named_parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in through.values())


def test_the_options_of_the_solve_are_passed_on():
    cell, x = Cell(), inputs(8)
    x[:6] *= 30  # saturated: these converge at once
    sizes = []
    fn = lambda z, x: sizes.append(len(z)) or cell(z, x)
    DEQ(solver=Picard(tol=1e-8))(fn, torch.zeros_like(x), (x,))
    assert min(sizes) < 8
    sizes.clear()
    DEQ(solver=Picard(tol=1e-8), compact=False)(fn, torch.zeros_like(x), (x,))
    DEQ(solver=Broyden(tol=1e-8), grad=Shine())(fn, torch.zeros_like(x), (x,))  # reads every row's history
    assert set(sizes) == {8}
    often, seldom = DEQ(solver=Picard(tol=1e-4)).eval(), DEQ(solver=Picard(tol=1e-4), check_every=5).eval()
    a, b = (deq(cell, torch.zeros_like(x), (x,))[0] for deq in (often, seldom))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert seldom.solution.calls % 5 == 0


def test_states_of_several_tensors():
    cell, x = Cell(), inputs()
    fn = lambda z, x: {
        "a": (cell(torch.cat([z["a"][0], z["b"]], 1), x)[:, :2],),
        "b": cell(z["a"][0].repeat(1, 2), x)[:, 2:],
    }
    start = {"a": (torch.zeros(5, 2, dtype=D64),), "b": torch.zeros(5, 2, dtype=D64)}
    for name in RULES:
        deq = DEQ(solver=Broyden(max_iter=30), grad=RULES[name], states=2, penalty=JacobianPenalty())
        got = deq(fn, start, (x,))
        assert len(got) == 2 and got[-1]["a"][0].shape == (5, 2) and got[-1]["b"].requires_grad
        (got[0]["b"].sum() + got[-1]["a"][0].sum() + deq.penalty_value).backward()


@EVERY
def test_shapes_alone(name):
    with FakeTensorMode():
        net = Net(solver=Broyden(max_iter=4), grad=RULES[name], states=2, penalty=JacobianPenalty())
        x = torch.zeros(3, 4, dtype=D64)
        (net(x).square().sum() + net.deq.penalty_value).backward()
        assert net.cell.lin.weight.grad.shape == (4, 4)
        assert net.eval()(x).shape == (3, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DEQ(eval_factor=0), "deq.eval_factor must be > 0, got 0"),
        (lambda: DEQ(states=0), "deq.states must be >= 1, got 0"),
        (lambda: DEQ(solver=Picard(max_iter=3), states=4), "deq.states=4 is more than solver.max_iter=3"),
        (
            lambda: DEQ(solver=Picard(max_iter=9), states=(5, 2)),
            r"increasing steps in 1 .. solver.max_iter=9, got \[5, 2\]",
        ),
        (lambda: DEQ(solver=Picard(max_iter=9), states=(5, 5)), "must list increasing steps"),
        (lambda: DEQ(solver=Picard(max_iter=9), states=(0, 5)), "must list increasing steps"),
        (lambda: DEQ(solver=Picard(max_iter=9), states=(10,)), "must list increasing steps"),
        (lambda: DEQ(states=()), "must list increasing steps"),
        (lambda: DEQ(grad=Backprop(), sliced=True), "deq.sliced does not work with Backprop"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_bad_input_reaches_the_user_from_a_layer():
    for call in (
        lambda: DEQ()(lambda z: None, torch.zeros(2, 3)),
        lambda: DEQ().eval()(lambda z: None, torch.zeros(2, 3)),
        lambda: DEQ(grad=Backprop(steps=2))(lambda z: None, torch.zeros(2, 3)),
    ):
        with pytest.raises(UserError, match="fn returned None"):
            call()
    with pytest.raises(UserError, match="Shine reuses the inverse of a Broyden solve"):
        DEQ(solver=Anderson(), grad=Shine())(lambda z: z * torch.ones((), requires_grad=True), torch.zeros(2, 3))


# Two processes


def _train_on_one_of_two(rank, port, name, state, x, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results[rank] = {name: _ddp_gradients(name, state, x.chunk(2)[rank]) for name in name}
    torch.distributed.destroy_process_group()


def _net_of(name, state):
    net = Net(solver=Broyden(max_iter=60, tol=1e-12), grad=RULES[name])
    net.load_state_dict(state)
    return net


def _ddp_gradients(name, state, x):
    net = nn.parallel.DistributedDataParallel(_net_of(name, state), find_unused_parameters=False)
    for _ in range(2):  # the second pass uses the buckets rebuilt after the first
        net.zero_grad()
        net(x).square().mean().backward()
    return [p.grad.numpy() for p in net.module.parameters()]


def test_two_processes_have_the_gradient_of_one():
    x = inputs(8)
    state = Net(solver=Picard()).state_dict()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        children = [
            context.Process(target=_train_on_one_of_two, args=(rank, port, list(RULES), state, x, results))
            for rank in (0, 1)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0]
        found = dict(results)
    for name in RULES:
        net = _net_of(name, state)
        net(x).square().mean().backward()
        for a, b, p in zip(found[0][name], found[1][name], net.parameters(), strict=True):
            assert (a == b).all()
            torch.testing.assert_close(torch.from_numpy(a), p.grad, rtol=1e-9, atol=1e-10)


def test_solvers_can_be_swapped_on_a_layer():
    deq = DEQ(solver=Anderson(max_iter=10))
    deq.solver = replace(deq.solver, max_iter=20)
    cell, x = Cell(), inputs()
    assert deq(cell, torch.zeros_like(x), (x,))[0].requires_grad
