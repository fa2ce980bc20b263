"""DEQ-Flow against numbers of the released code, its sizes, and what an equilibrium of flow must do.

tests/fixtures/nets/deq_flow_zoo.json was recorded by running deq-zoo/deq-flow of locuslab/torchdeq (commit 4f6bd5f) at
its tiny size: 12 plain iterations in evaluation mode, then losses and gradient norms of training steps of 6 with
frozen batch norms; weights and images by the formulas below. `counts` are of the same classes, "v1 huge wn" of
locuslab/deq-flow 869d4bc, code.v.1.0; its flow head is at most 256 wide.
"""

import copy
import json
import math
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.deq.grads import Backprop, OneStep, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import WeightNorm, apply_norm
from common.deq.solvers import Anderson, Broyden, Picard
from common.errors import UserError
from common.weights.load import load_into
from projects.deq_flow.raft.network import FlowEquilibrium, grid
from projects.deq_flow.weights import official_state

REPO = Path(__file__).parents[4]
RECORD = json.loads((REPO / "tests" / "fixtures" / "nets" / "deq_flow_zoo.json").read_text())
TINY = dict(
    feature_channels=64, hidden_channels=32, corr_channels=(64, 48), flow_channels=(32, 16), motion_channels=32,
    head_channels=64,
)  # fmt: skip
SMALL = dict(
    feature_channels=8, hidden_channels=6, corr_channels=(8, 8), flow_channels=(4, 4), motion_channels=6,
    head_channels=8, encoder_channels=(4, 6, 8), levels=2, radius=1,
)  # fmt: skip


def plain(steps, **options):
    return DEQ(solver=Picard(max_iter=steps, stop="never"), **options)


def small(deq=None, seed=0, **options):
    torch.manual_seed(seed)
    return FlowEquilibrium(deq=deq or plain(3), **{**SMALL, **options})


def pair(batch=2, height=32, width=40, seed=5):
    torch.manual_seed(seed)
    return torch.rand(batch, 3, height, width) * 2 - 1, torch.rand(batch, 3, height, width) * 2 - 1


# Against the released code --------------------------------------------------------------------------------------------


def noise(count, salt):
    """`count` float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(count, dtype=torch.int64) + 1
    return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1


def weights_by_formula(shapes):
    state = {}
    for salt, (name, shape) in enumerate(sorted(shapes.items())):
        values = noise(math.prod(shape), salt).view(shape)
        if len(shape) == 4 and not name.endswith("weight_g"):
            values = values * (3 / values[0].numel()) ** 0.5
        elif name.endswith(("weight", "weight_g", "running_var", "gamma")):
            values = 0.8 + 0.2 * values
        else:
            values = 0.1 * values
        state[name] = values.float()
    return state


def images():
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(160.0), indexing="ij")
    wave = lambda k, dx, dy: torch.sin((x - dx) * (0.11 + 0.03 * k) + k) * torch.cos((y - dy) * (0.17 - 0.04 * k) - k)
    return tuple(torch.stack([wave(k, dx, dy) for k in range(3)])[None] for dx, dy in ((0, 0), (3, 2)))


def few(x):
    return x.detach().double().flatten()[:: max(1, x.numel() // 16)][:16].tolist()


def official(case, deq, **options):
    net = FlowEquilibrium(deq=deq, attention=case == "gma", norm=partial(apply_norm, kind="weight"), **TINY, **options)
    shapes = RECORD["cases"][case]["tensors"]
    load_into(net, official_state(weights_by_formula(shapes)), ignore=["*num_batches_tracked"])
    return net


@pytest.mark.parametrize("lookup", ["dense", "on_demand"])
@pytest.mark.parametrize("case", ["plain", "gma"])
def test_flow_after_twelve_iterations_is_the_released_codes(case, lookup):
    record = RECORD["cases"][case]
    net = official(case, plain(12), lookup=lookup).eval()
    with torch.no_grad():
        flow = net(*images())
    assert few(flow) == pytest.approx(record["flow"], abs=1e-4)
    assert flow.abs().mean().item() == pytest.approx(record["flow_mean_abs"], rel=1e-5)
    assert few(net.state[0]) == pytest.approx(record["hidden"], abs=1e-5)


@pytest.mark.parametrize(
    ("case", "step", "options", "all_grad"),
    [
        ("plain", "indexed", dict(states=3, grad=OneStep()), False),
        ("gma", "indexed_all_grad", dict(states=2, grad=Unrolled(steps=3, tau=1.0)), True),
        ("plain", "sliced", dict(states=2, grad=Unrolled(steps=3, tau=1.0), sliced=True), False),
        ("gma", "sliced", dict(states=2, grad=Unrolled(steps=3, tau=1.0), sliced=True), False),
    ],
)
def test_a_training_step_is_the_released_codes(case, step, options, all_grad):
    record = RECORD["cases"][case][step]
    net = official(case, plain(6, **options), all_grad=all_grad).train()
    net.freeze_batch_norm()
    flows = net.outputs(*images())
    weight = noise(flows[0].numel(), 5).view_as(flows[0]).float()
    loss = sum(0.8 ** (len(flows) - i - 1) * (flow * weight).mean() for i, flow in enumerate(flows))
    assert loss.item() == pytest.approx(record["loss"], rel=1e-4)
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    norms, gates = record["grad_norms"], {}
    largest = max(norms.values())
    for name, norm in norms.items():
        if ".gru." in name:  # three released tensors are one of ours
            gates.setdefault(re.sub("conv[zrq]", "conv", name), []).append((name, norm))
            continue
        (ours,) = official_state({name: torch.empty(0)})
        assert grads[ours].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5 * largest), name
    assert len(gates) == 6
    for parts in gates.values():
        assert len(parts) == 3
        (ours,) = official_state({name: torch.empty(0) for name, _ in parts})
        together = math.hypot(*(norm for _, norm in parts))
        assert grads[ours].norm().item() == pytest.approx(together, rel=1e-3, abs=1e-5 * largest), ours


def from_conf(name, **changes):
    with initialize_config_dir(str(REPO / "conf"), version_base=None):
        cfg = compose(config_name=f"net/{name}").net
    with torch.device("meta"):
        return instantiate(cfg, **changes)


@pytest.mark.filterwarnings("ignore:.*_self_")
@pytest.mark.parametrize("size", ["tiny", "base", "large", "huge", "gigantic"])
@pytest.mark.parametrize("attention", [False, True])
def test_parameters_of_the_published_networks(size, attention):
    net = from_conf(f"deq_flow_{size}{'_gma' if attention else ''}")
    assert sum(p.numel() for p in net.parameters()) == RECORD["counts"][f"{size} {attention} weight_norm"]


@pytest.mark.filterwarnings("ignore:.*_self_")
def test_parameters_of_the_first_version_and_of_raft():
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert count(from_conf("deq_flow_huge", head_channels=256)) == RECORD["counts"]["v1 huge wn"] == 12_799_808
    assert count(from_conf("deq_flow_base", hidden_init="tanh_context", norm=None)) == 5_257_536  # torchvision's table


# The equilibrium ------------------------------------------------------------------------------------------------------


def contractive(deq):
    """A network whose flow settles: h follows minus the flow plus what context and correlation add; c follows h."""
    net = small(deq).double().eval()
    cell, width = net.cell, SMALL["hidden_channels"]
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(0.1)
        for layer, centre in ((cell.gru.rows, (0, 2)), (cell.gru.columns, (2, 0))):
            layer.bias[:width] = -1.0
            for axis in (0, 1):
                layer.weight[2 * width + axis, -2 + axis][centre] = -0.5  # the last two motion features are the flow
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            unit = 2 * axis + (sign < 0)
            cell.head.conv1.weight[unit, axis, 1, 1] = float(sign)
            cell.head.conv2.weight[axis, unit, 1, 1] = 0.5 * sign
    return net


def doubles():
    return tuple(image.double() for image in pair())


SOLVERS = {
    "plain": Picard(max_iter=400, tol=1e-10),
    "anderson": Anderson(max_iter=100, tol=1e-10),
    "broyden": Broyden(max_iter=100, tol=1e-10),
}


def test_solvers_agree_on_the_equilibrium_and_the_head_is_still_there():
    flows = {}
    for name, solver in SOLVERS.items():
        net = contractive(DEQ(solver=solver))
        with torch.no_grad():
            flows[name] = net(*doubles())
            assert net.deq.solution.converged.all(), name
            assert net.cell.head(net.state[0]).abs().max() < 1e-8
    assert flows["plain"].abs().max() > 0.1
    for flow in flows.values():
        torch.testing.assert_close(flow, flows["plain"], rtol=0, atol=1e-6)


def test_started_at_the_solution_the_first_residual_is_below_tolerance():
    net = contractive(DEQ(solver=Picard(max_iter=400, tol=1e-8)))
    with torch.no_grad():
        flow = net(*doubles())
        steps = net.deq.solution.steps
        again = net(*doubles(), start=net.state)
    assert (steps > 10).all() and (net.deq.solution.steps <= 1).all()
    assert (net.deq.solution.residual_trace[1][:, 0] <= 1e-8).all()
    torch.testing.assert_close(flow, again, rtol=0, atol=1e-6)


def test_samples_that_settle_early_leave_without_changing_anything():
    net = contractive(DEQ(solver=Picard(max_iter=400, tol=1e-10)))
    first, second = doubles()
    with torch.no_grad():
        alone = net(first[:1], second[:1])
        solved = net.state
        start = tuple(torch.cat([part, torch.zeros_like(part)]) for part in solved)
        start[1][1] = grid(1, 4, 5, dtype=torch.float64)[0]
        both = net(first, second, start=start)
    assert net.deq.solution.steps[0] < net.deq.solution.steps[1]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-6)


def test_the_state_carried_to_the_next_pair_moves_its_flow():
    net = contractive(DEQ(solver=Picard(max_iter=50, tol=1e-6)))
    with torch.no_grad():
        net(*doubles())
        h, c = net.carried()
    assert torch.equal(h, net.state[0]) and c.shape == net.state[1].shape and c.dtype == torch.float64
    flows = (c - grid(2, 4, 5, dtype=torch.float64), net.state[1] - grid(2, 4, 5, dtype=torch.float64))
    known = flows[1].flatten(2).transpose(1, 2).flatten(0, 1)
    for vector in flows[0].flatten(2).transpose(1, 2).flatten(0, 1):
        assert (known - vector).abs().sum(1).min() < 1e-9  # every guess is some pixel's flow


# Training -------------------------------------------------------------------------------------------------------------


def test_the_unrolled_baseline_is_the_same_network_with_another_rule():
    net = small(plain(12, grad=Backprop(), states=12)).train()
    flows = net.outputs(*pair())
    assert len(flows) == 12 and flows[0].shape == (2, 2, 32, 40)
    short = small(plain(5)).eval()
    short.load_state_dict(net.state_dict())
    net.eval()
    net.deq.eval_solver = Picard(max_iter=5, stop="never")
    with torch.no_grad():
        torch.testing.assert_close(net(*pair()), short(*pair()))


@pytest.mark.parametrize("all_grad", [False, True])
def test_gradients_reach_the_start_only_with_all_grad(all_grad):
    net = small(plain(2, grad=Backprop()), all_grad=all_grad).train()
    h = torch.zeros(2, 6, 4, 5)
    c = (grid(2, 4, 5) + 0.3).requires_grad_()
    net.outputs(*pair(), start=(h, c))[-1].sum().backward()
    assert (c.grad is not None and bool(c.grad.any())) == all_grad


def test_every_parameter_is_trained_and_training_gives_a_flow_per_state():
    net = small(plain(6, grad=Unrolled(steps=2, tau=1.0), states=3), attention=True, norm=apply_norm).train()
    with torch.no_grad():
        net.cell.gather.scale.fill_(0.5)
    flows = net.outputs(*pair())
    assert len(flows) == 3
    sum(flow.square().sum() for flow in flows).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert not any(part.requires_grad for part in net.state)
    assert len(net.eval().outputs(*pair())) == 1


def test_normalised_weights_are_computed_once_per_forward(monkeypatch):
    net = small(plain(6, grad=Unrolled(steps=2, tau=1.0), states=3), norm=apply_norm).train()
    computed = []
    compute = WeightNorm.compute
    monkeypatch.setattr(WeightNorm, "compute", lambda self, *g_v: computed.append(self) or compute(self, *g_v))
    net(*pair()).sum().backward()
    assert len(computed) == len(set(map(id, computed))) == 9


def test_frozen_batch_norms_stay_frozen_through_validation():
    net = small().train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.training for m in norms)
    net.freeze_batch_norm()
    net.eval()
    net.train()
    assert net.training and not any(m.training for m in norms)
    before = norms[0].running_mean.clone()
    net(*pair())
    assert torch.equal(before, norms[0].running_mean)
    net.freeze_batch_norm(False)
    assert all(m.training for m in norms)


def test_copies_and_pickles_start_without_a_state():
    net = small().eval()
    with torch.no_grad():
        flow = net(*pair())
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert other.state is None and net.state is not None
            assert torch.equal(other(*pair()), flow)


def test_mixed_precision_is_near_full_precision_and_trains():
    net = small(plain(4, grad=OneStep()), norm=apply_norm).train()
    full = net(*pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(*pair())
        mixed.square().mean().backward()
    assert net.state[1].dtype == torch.float32
    assert (full - mixed).abs().mean() < 0.05 * full.abs().mean() + 0.05
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("lookup", ["dense", "on_demand"])
def test_a_training_step_works_on_shapes_alone(lookup):
    with FakeTensorMode():
        deq = DEQ(solver=Anderson(max_iter=4), grad=OneStep(), states=2)
        net = FlowEquilibrium(deq=deq, attention=True, lookup=lookup, norm=partial(apply_norm)).train()
        flows = net.outputs(torch.rand(2, 3, 128, 160), torch.rand(2, 3, 128, 160))
        sum(flow.mean() for flow in flows).backward()
        assert [flow.shape for flow in flows] == [(2, 2, 128, 160)] * 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: small()(pair()[0], pair(width=48)[1]), "two images of one shape"),
        (lambda: small()(*pair(1, 32, 44)), "multiples of 8 of at least 16, got 32 x 44"),
        (lambda: small()(*pair(1, 8, 40)), "at least 16, got 8 x 40"),
        (
            lambda: small()(*pair(1), start=(torch.zeros(1, 6, 3, 5), torch.zeros(1, 2, 3, 5))),
            "Start at None when the size changes",
        ),
        (lambda: small(lookup="sparse"), "lookup must be one of"),
        (lambda: small(hidden_init="one"), "hidden_init must be one of"),
        (lambda: small(corr_channels=(8,)), "corr_channels must hold 2 widths"),
        (lambda: small(motion_channels=2), "motion_channels must be a whole number >= 3"),
        (lambda: small(radius=0), "radius"),
        (lambda: small().carried(), "no state to carry on"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True])
def test_recomputed_states_give_the_same_flows_and_gradients(sliced, monkeypatch):
    first, second = pair()
    runs, decoded = {}, []
    decode = FlowEquilibrium._decode
    monkeypatch.setattr(FlowEquilibrium, "_decode", lambda *given: (decoded.append(1), decode(*given))[1])
    for recompute in (False, True):
        deq = plain(4, grad=OneStep(recompute=recompute), states=2, sliced=sliced)
        net = small(deq, norm=partial(apply_norm, kind="weight")).train()
        flows = net.outputs(first, second)
        sum(flow.square().mean() for flow in flows).backward()
        runs[recompute] = [*flows, *(p.grad for p in net.parameters())]
    assert len(decoded) == 2 + 4  # forgotten and computed again, but only where asked
    for kept, again in zip(*runs.values(), strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)
