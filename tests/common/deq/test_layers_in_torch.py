"""The normalised layers within torch: copies, moves, state, transforms, compilation, processes, gradient rules."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.deq.dropout import VariationalDropout
from common.deq.grads import Backprop, Implicit, Neumann, OneStep, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm, reset
from common.deq.regular import JacobianPenalty
from common.deq.solvers import Picard
from common.runtime.training.ema import averaged

KINDS = ("weight", "spectral")


def net(kind="weight", **options):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    apply_norm(made, kind, **options)
    return made


def g_and_v(layer):
    return layer.parametrizations.weight.original0, layer.parametrizations.weight.original1


def fresh(layer):
    g, v = (p.detach() for p in g_and_v(layer))
    return g * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)


def step(cell):
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    for p in cell.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stand_on_their_own(kind):
    cell = net(kind)
    x = torch.randn(3, 4)
    reset(cell)
    out = cell(x)
    twin = copy.deepcopy(cell)
    torch.testing.assert_close(twin(x), out)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3)
    torch.testing.assert_close(cell(x), out)
    assert not torch.allclose(twin(x), out)
    average = AveragedModel(cell)  # what Lightning's WeightAveraging keeps
    average.update_parameters(cell)
    torch.testing.assert_close(average(x), out)
    out.sum().backward()


def test_running_averages_exchange_data_and_back():
    cell = net()
    x = torch.randn(3, 4)
    reset(cell)
    raw = cell(x).detach()
    tensors = {name: p.detach() * 2 for name, p in cell.named_parameters()}
    with averaged(cell, tensors):
        torch.testing.assert_close(cell[0].weight.detach(), fresh(cell[0]))
        reset(cell)
        assert not torch.allclose(cell(x), raw)
    torch.testing.assert_close(cell(x).detach(), raw)


@pytest.mark.parametrize("kind", KINDS)
def test_moves_change_the_weight_with_the_parameters(kind):
    cell = net(kind)
    x = torch.randn(3, 4)
    reset(cell)
    out = cell(x)
    cell.double()
    assert cell[0].weight.dtype == torch.float64
    torch.testing.assert_close(cell(x.double()).float(), out, rtol=1e-5, atol=1e-6)
    cell.to(torch.bfloat16)
    reset(cell)
    assert cell(x.bfloat16()).dtype == torch.bfloat16
    assert cell.to("meta")[0].weight.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind):
    cell, other = net(kind), net(kind)
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(torch.randn_like(p))
    reset(cell)
    file = io.BytesIO()
    torch.save(cell.state_dict(), file)
    file.seek(0)
    reset(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 4)
    torch.testing.assert_close(other.eval()(x), cell.eval()(x), rtol=0, atol=0)
    buffers = {name for name, _ in cell.named_buffers()}
    assert (buffers == set()) == (kind == "weight")


def test_functional_calls_use_what_they_are_given():
    cell = net()
    reset(cell)
    x = torch.randn(3, 4)
    doubled = {name: 2 * p.detach() for name, p in cell.named_parameters()}
    expected = copy.deepcopy(cell)
    expected.load_state_dict(doubled)
    torch.testing.assert_close(torch.func.functional_call(cell, doubled, x), expected(x))
    assert cell[0].parametrizations.weight[0].held is not None  # the held weight is still there afterwards

    def loss(params):
        return torch.func.functional_call(cell, params, x).square().sum()

    by_func = torch.func.grad(loss)({n: p.detach() for n, p in cell.named_parameters()})
    loss(dict(cell.named_parameters())).backward()
    for name, p in cell.named_parameters():
        torch.testing.assert_close(by_func[name], p.grad)


def test_forward_and_batched_derivatives_pass_through():
    cell = net()
    reset(cell)
    z = torch.randn(4)
    forward = torch.func.jacfwd(cell)(z)
    torch.testing.assert_close(torch.func.jacrev(cell)(z), forward)
    with torch.no_grad():
        reset(cell)  # held without a graph, then asked for inside a transform with gradients on
    torch.testing.assert_close(torch.func.jacrev(cell)(z), forward)
    torch.testing.assert_close(torch.func.jvp(cell, (z,), (z,))[1], forward @ z)
    cell(z).sum().backward()
    torch.testing.assert_close(cell[2].weight @ torch.diag(1 - cell[:2](z).square()) @ cell[0].weight, forward)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_cells_follow_resets(kind):
    cell = net(kind)
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4)
    for _ in range(3):
        reset(cell)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), cell(x))
        out = compiled(compiled(x))
        torch.testing.assert_close(out, cell(cell(x)))
        cell.zero_grad()
        out.square().sum().backward()
        got = [p.grad.clone() for p in cell.parameters()]
        cell.zero_grad()
        reset(copy.deepcopy(cell))
        cell(cell(x)).square().sum().backward()
        if kind == "weight":
            for a, p in zip(got, cell.parameters(), strict=True):
                torch.testing.assert_close(a, p.grad)
        step(cell)
    torch.testing.assert_close(compiled(x), cell(x))  # without reset after the step: fresh


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    cell = net(kind)
    x = torch.randn(3, 4)
    exact = cell[0].weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        reset(cell)
        assert cell[0].weight.dtype == torch.float32
        torch.testing.assert_close(cell[0].weight.detach(), exact)
        out = cell(cell(x))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in cell.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors(kind):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        cell = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        apply_norm(cell, kind)
        reset(cell)
        cell(cell(torch.randn(2, 3, 8, 8))).sum().backward()
        assert cell[0].parametrizations.weight.original0.grad.shape == (3, 1, 1, 1)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for kind in KINDS:
            cell, plain = net(kind), net(kind)
            parallel = DistributedDataParallel(cell)
            x = torch.randn(3, 4)
            for _ in range(2):
                reset(cell)
                reset(plain)
                cell.zero_grad()
                plain.zero_grad()
                parallel(x).sum().backward()
                plain(x).sum().backward()
                for a, b in zip(cell.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(a.grad, b.grad)
    finally:
        dist.destroy_process_group()


RULES = {
    "one step": OneStep(),
    "unrolled": Unrolled(steps=4, tau=0.5),
    "unrolled, recomputed": Unrolled(steps=4, tau=0.5, recompute=True),
    "neumann": Neumann(steps=4, tau=0.5),
    "implicit": Implicit(),
    "implicit, recomputed": Implicit(recompute=True),
    "backprop": Backprop(),
    "backprop, recomputed": Backprop(recompute=True),
}


class Cell(nn.Module):
    def __init__(self, kind, dropout=0.0):
        super().__init__()
        self.linear, self.drop = nn.Linear(12, 12), VariationalDropout(dropout)
        with torch.no_grad():  # a contraction, with one largest singular value
            self.linear.weight.mul_(0.8 / torch.linalg.matrix_norm(self.linear.weight, 2))
        apply_norm(self, kind, power_iterations=50)

    def forward(self, z, x, mask=None):
        return torch.tanh(self.drop(self.linear(z), mask) + x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_gradient_rule_agrees_with_fresh_weights(rule, states, kind):
    """Two training steps each: the second must not meet the graph of the first."""
    x = torch.randn(6, 12)

    def gradients(hold):
        torch.manual_seed(1)
        cell = Cell(kind)
        solver = Picard(max_iter=60, tol=1e-6)
        deq = DEQ(solver=solver, grad=RULES[rule], states=states, penalty=JacobianPenalty(weight=0.1))
        for _ in range(2):
            if hold:
                reset(cell)
            cell.zero_grad()
            found = deq(cell, torch.zeros(6, 12), (x,))
            (sum(z.square().mean() for z in found) + deq.penalty_value).backward()
        return torch.cat([p.grad.flatten() for p in cell.parameters()])

    expected = gradients(False)
    assert (gradients(True) - expected).norm() <= 2e-6 * expected.norm()


def test_masks_among_the_arguments_follow_samples_out_of_the_batch():
    cell = Cell("weight", dropout=0.5)
    x, z0 = torch.randn(6, 12) * torch.tensor([0.01, 0.1, 1, 2, 5, 10])[:, None], torch.zeros(6, 12)
    deq = DEQ(solver=Picard(max_iter=60, tol=1e-6), grad=OneStep())
    reset(cell)
    mask = cell.drop.mask_for(z0)
    (whole,) = deq(cell, z0, (x, mask))
    assert deq.solution.samples < 6 * deq.solution.calls  # some left early
    for row in range(6):
        (alone,) = deq(cell, z0[row : row + 1], (x[row : row + 1], mask[row : row + 1]))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)
