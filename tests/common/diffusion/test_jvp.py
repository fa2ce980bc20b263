"""The total derivative against closed forms, differences and torch's own rule; rows, autocast, checkpoints, compile."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from common.diffusion.jvp import ForwardRules, total_derivative
from common.errors import UserError
from common.losses.meanflow import ImprovedMeanFlowLoss, MeanFlowLoss
from common.nets.average_velocity import AverageVelocity
from common.nets.dit import DiT
from common.nets.mit import MiT
from common.nets.mlp import MLPDenoiser
from common.nets.unet import SongUNet

REPO = Path(__file__).resolve().parents[3]


def awake(net: nn.Module) -> nn.Module:
    """Weights as after training: no layer at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    image = dict(img_resolution=8, in_channels=2)
    small = dict(**image, patch_size=4, width=16, depth=1, num_heads=2, label_dim=3)
    unet = dict(model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4], label_dim=3, num_times=2)
    made = {
        "mlp": AverageVelocity(
            model=MLPDenoiser(**image, out_channels=2, label_dim=3, width=24, num_times=2, dropout=0.3)
        ),
        "unet": AverageVelocity(model=SongUNet(**image, out_channels=2, dropout=0.2, **unet)),
        "dit": DiT(**small),
        "mit": MiT(**small, head_depth=1, v_depth=1),
    }
    return {name: awake(net) for name, net in made.items()}


NETS = ("mlp", "unet", "dit", "mit")


def batch(n: int = 6, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(n, 2, 8, 8, generator=generator, dtype=dtype)
    t = torch.rand(n, generator=generator, dtype=dtype) * 0.9 + 0.1
    r = t * torch.tensor([1.0, 0.5, 1.0, 0.0, 0.25, 1.0], dtype=dtype)[:n]
    return {"z": draw(), "v": draw(), "t": t, "r": r, "labels": torch.eye(3, dtype=dtype)[torch.arange(n) % 3]}


def plain(net, z, t, r, direction, **conditions):
    """The usual way: torch.func.jvp over the whole batch."""
    dz, dt, dr = direction
    return torch.func.jvp(
        lambda z, t, r: net(z, t, r, **conditions), (z, t, r), (dz, torch.full_like(t, dt), torch.full_like(r, dr))
    )


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_equals_the_full_batch_jvp_where_r_is_below_t_and_is_zero_elsewhere(name, direction):
    net, given = nets()[name].double(), batch(dtype=torch.float64)
    z, v, t, r = (given[k] for k in "zvtr")
    conditions = {"class_labels": given["labels"], "dropout_masks": net.draw_dropout(z) or None}
    conditions = {key: value for key, value in conditions.items() if value is not None}
    _, whole = plain(net, z, t, r, (v, *direction), **conditions)
    found = total_derivative(net, z, t, r, (v, *direction), conditions)
    live = r < t
    assert int(live.sum()) == 3 and whole[live].abs().max() > 1e-2
    torch.testing.assert_close(found[live], whole[live].detach(), rtol=1e-11, atol=1e-12)
    assert not found[~live].any() and not found.requires_grad
    same = total_derivative(net, z, t, r, (v, *direction), conditions, skip_equal=False)
    torch.testing.assert_close(same, found, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_is_the_central_difference_along_the_path(name):
    net, given, h = nets()[name].double().eval(), batch(dtype=torch.float64), 1e-5
    z, v, t, r = (given[k] for k in "zvtr")
    found = total_derivative(net, z, t, r, (v, 1.0, 0.0), {"class_labels": given["labels"]}, skip_equal=False)
    with torch.no_grad():
        ends = [net(z + s * v, t + s, r, class_labels=given["labels"]) for s in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    live = r < t
    torch.testing.assert_close(found[live], slope[live], rtol=1e-6, atol=1e-6 * float(slope.abs().max()))


def test_the_derivative_by_t_passes_through_every_time_the_network_is_told():
    """u = t + 10 (t - r): du/dt is 11, whatever the embedding; du/dr is -10."""
    u = lambda z, t, r: (t + 10 * (t - r))[:, None].expand_as(z)
    z, t, r = torch.zeros(3, 2), torch.tensor([0.5, 0.7, 1.0]), torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(total_derivative(u, z, t, r, (z, 1.0, 0.0)), torch.full_like(z, 11.0))
    assert torch.equal(total_derivative(u, z, t, r, (z, 0.0, 1.0)), torch.full_like(z, -10.0))
    assert not total_derivative(lambda z, t, r: torch.ones_like(z), z, t, r, (z, 1.0, 0.0)).any()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(x, w[:, : x.shape[-1]], w[:, 0]),
        lambda x, w: F.conv2d(x, w.view(3, 4, 2, 1), w[:, 0], padding=1, stride=2),
        lambda x, w: F.conv_transpose2d(x, w[0].expand(4, 8).reshape(4, 1, 4, 2), groups=4, stride=2),
        lambda x, w: x @ w.T[:4],
        lambda x, w: torch.matmul(w[:, :5], x),
        lambda x, w: x @ x.transpose(2, 3),
        lambda x, w: torch.bmm(x[0], x[1].transpose(1, 2) * w[0, 0]),
        lambda x, w: F.group_norm(x, 2, w[0, :4], w[1, :4], eps=1e-6),
        lambda x, w: F.group_norm(x, 4),
        lambda x, w: F.layer_norm(x, x.shape[-1:], eps=1e-6),
        lambda x, w: F.layer_norm(x, (5, 4), weight=w.flatten()[:20].view(5, 4), bias=w.flatten()[4:].view(5, 4)),
        lambda x, w: x.softmax(dim=3),
        lambda x, w: torch.softmax(x, 2) + F.silu(x) * x.softmax(dim=-1, dtype=torch.float64),
        (  # torch 2.11's own rule refuses this layout: its answer for the plain one stands in
            lambda x, w: F.group_norm(x.to(memory_format=torch.channels_last), 2, w[0, :4], w[1, :4]),
            lambda x, w: F.group_norm(x, 2, w[0, :4], w[1, :4]),
        ),
    ],
)
def test_every_rule_equals_torchs_own(function):
    generator = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 2, 4, 5, 4, generator=generator, dtype=torch.float64).unbind(0)
    w = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    function, own = function if isinstance(function, tuple) else (function, function)
    value, slope = torch.func.jvp(lambda x: own(x, w), (x,), (dx,))
    found = total_derivative(
        lambda z, t, r: function(z, w), x, torch.ones(2), torch.zeros(2), (dx, 0.0, 0.0), skip_equal=False
    ) if value.shape == x.shape else _by_rules(lambda x: function(x, w), x, dx)  # fmt: skip
    torch.testing.assert_close(found, slope, rtol=1e-11, atol=1e-12)


def _by_rules(function, x, dx):
    from torch.autograd import forward_ad

    with torch.no_grad(), ForwardRules(), forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx))).tangent


def test_moving_weights_keep_torchs_rule():
    """The rules are for constant weights; weights that move with z must not be forgotten."""
    x, dx = torch.randn(2, 3, 4, dtype=torch.float64).unbind(0)
    function = lambda x: F.linear(x, x[:2] * 2) + F.linear(x, torch.ones(2, 4, dtype=x.dtype), x[0, :2])
    _, slope = torch.func.jvp(function, (x,), (dx,))
    torch.testing.assert_close(_by_rules(function, x, dx), slope, rtol=1e-12, atol=0)


def test_only_the_rows_with_r_below_t_go_through_the_network():
    given, seen = batch(), []

    def u(z, t, r, labels, masks, shared):
        seen.append((len(z), labels[:, 0].tolist(), masks[0].tolist(), shared))
        return z * t[:, None, None, None]

    conditions = {"labels": torch.arange(6.0)[:, None], "masks": (torch.arange(6),), "shared": torch.ones(1, 2)}
    total_derivative(u, *(given[k] for k in "ztr"), (given["v"], 1.0, 0.0), conditions)
    assert seen[0][:3] == (3, [1, 3, 4], [1, 3, 4]) and seen[0][3] is conditions["shared"]
    seen.clear()
    t = given["t"]
    assert not total_derivative(u, given["z"], t, t, (given["v"], 1.0, 0.0), conditions).any() and not seen


def test_dropout_masks_are_the_same_in_value_and_derivative():
    """A unit dropped in the value has no derivative either: with one mask, u is linear in the kept units."""
    net, given = nets()["mlp"].double().train(), batch(dtype=torch.float64)
    z, v, t, r = (given[k] for k in "zvtr")
    masks = net.draw_dropout(z)
    assert any(not m.all() for m in masks)
    found = total_derivative(net, z, t, r, (v, 1.0, 0.0), {"dropout_masks": masks})
    h = 1e-6
    with torch.no_grad():
        ends = [net(z + s * v, t + s, r, dropout_masks=masks) for s in (h, -h)]
    live = r < t
    torch.testing.assert_close(found[live], ((ends[0] - ends[1]) / (2 * h))[live], rtol=1e-6, atol=1e-7)


def test_no_graph_is_built_and_none_is_lost():
    net, given = nets()["dit"], batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = total_derivative(net, *(given[k] for k in "ztr"), (given["v"], 1.0, 0.0))
    assert not kept and not found.requires_grad and torch.is_grad_enabled()
    assert net(given["z"], given["t"], given["r"]).requires_grad


@pytest.mark.parametrize("name", NETS)
def test_under_autocast_the_derivative_is_that_of_float32(name):
    net, given = nets()[name].eval(), batch()
    call = lambda: total_derivative(net, *(given[k] for k in "ztr"), (given["v"], 1.0, 0.0))
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
        assert net(given["z"], given["t"], given["r"]).sub(given["z"]).isfinite().all()
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32 and torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The whole loss and its gradient: checkpoints, compilation, two processes


LOSSES = {"meanflow": MeanFlowLoss(), "imf": ImprovedMeanFlowLoss(head="boundary")}


def gradients(net: nn.Module, loss, given: dict) -> dict:
    net.zero_grad()
    masks = () if not hasattr(net, "draw_dropout") else net.draw_dropout(given["z"], torch.Generator().manual_seed(0))
    terms = loss(
        net, given["z"], given["t"], given["r"], given["v"], class_labels=given["labels"], dropout_masks=masks or None
    )
    terms.loss.mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys() and max(float(g.abs().max()) for g in b.values()) > 1e-4
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("name", ["dit", "mit"])
def test_gradients_with_checkpoints_are_those_without(name, kind):
    net, given = nets()[name], batch()
    expected = gradients(net, LOSSES[kind], given)
    net.recompute = True
    assert_same(gradients(net, LOSSES[kind], given), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name, backend", [("mlp", "eager"), ("unet", "eager"), ("mit", "aot_eager")])
def test_gradients_of_a_network_compiled_in_place(name, backend):
    """What `speed.compile=true` does."""
    torch._dynamo.reset()
    net, given = nets()[name], batch()
    expected = gradients(net, MeanFlowLoss(), given)
    compiled = copy.deepcopy(net)
    getattr(compiled, "raw", compiled).compile(backend=backend)
    assert_same(gradients(compiled, MeanFlowLoss(), given), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, backend", [("dit", "eager"), ("mlp", "aot_eager")])
def test_the_loss_compiled_whole(name, backend):
    """One graph, the derivative inside it: every row takes the pass there, shapes stay fixed."""
    torch._dynamo.reset()
    net, given, loss = nets()[name].eval(), batch(), MeanFlowLoss()
    call = lambda z, t, r, v, labels: loss(net, z, t, r, v, class_labels=labels).loss.mean()
    inputs = [given[k] for k in ("z", "t", "r", "v", "labels")]
    expected = torch.autograd.grad(call(*inputs), list(net.parameters()), allow_unused=True)
    found = torch.autograd.grad(
        torch.compile(call, backend=backend, fullgraph=True)(*inputs), list(net.parameters()), allow_unused=True
    )
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class LossModule(nn.Module):
    """The loss as a forward pass, the way Lightning hands a training step to DistributedDataParallel."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, given):
        return self.loss(
            self.net, given["z"], given["t"], given["r"], given["v"], class_labels=given["labels"]
        ).loss.mean()


DISTRIBUTED = [("dit", "meanflow"), ("unet", "imf")]


def _work(port: str, folder: str, rank: str) -> None:
    rank = int(rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, kind in DISTRIBUTED:
        net = DistributedDataParallel(LossModule(nets()[name].eval(), LOSSES[kind]))
        own = {key: value[rank * 3 : rank * 3 + 3] for key, value in batch().items()}
        net(own).backward()
        torch.save({n: p.grad for n, p in net.module.net.named_parameters()}, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of the gradients both ranks had; programs of their own, for a fork after autograd has started its
    threads may wait for ever."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(port), str(folder)]
    ranks = [subprocess.Popen([*words, str(rank)], env=environment) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return folder


@pytest.mark.parametrize("name, kind", DISTRIBUTED)
def test_two_processes_have_the_gradients_of_one(name, kind, two_processes):
    """Also when one rank has fewer rows with r < t than the other (1 and 2 here)."""
    net, given = nets()[name].eval(), batch()
    LossModule(net, LOSSES[kind])(given).backward()
    expected = {n: p.grad for n, p in net.named_parameters()}
    ranks = [torch.load(two_processes / f"{name}-{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][n], ranks[1][n]) for n in expected)
    assert_same(ranks[0], expected, rtol=1e-4, atol=1e-6)


def test_planning_on_fake_tensors():
    with FakeTensorMode():
        net = nets()["dit"]
        z, t = torch.empty(4, 2, 8, 8), torch.empty(4)
        terms = MeanFlowLoss()(net, z, t, t, torch.empty_like(z), class_labels=torch.empty(4, 3))
        terms.loss.mean().backward()
        assert terms.loss.shape == (4,) and all(p.grad is not None for p in net.blocks.parameters())


def test_a_tangent_of_another_shape_is_refused():
    given = batch()
    with pytest.raises(UserError, match=r"tangent of z must have its shape \(6, 2, 8, 8\)"):
        total_derivative(nets()["dit"], *(given[k] for k in "ztr"), (given["v"][:3], 1.0, 0.0))


if __name__ == "__main__":
    _work(*sys.argv[1:])
