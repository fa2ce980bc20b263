"""MDEQ against numbers of the released code, its sizes, and what the equilibrium asks of its cell.

tests/fixtures/nets/mdeq_official.json was recorded by running `MDEQClsNet` of Gsunshine/phantom_grad (commit 9d321cf,
MDEQ/MDEQ_CIFAR) at a tiny size, weights by the formula below over the released names: stem, f at a given state, and
head, in evaluation mode. `parameters` are counted on the released classes, also those of locuslab/torchdeq 4f6bd5f.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.deq.layers import apply_norm, reset
from common.errors import UserError
from common.nets.mdeq import MDEQ, from_official

RECORD = json.loads((Path(__file__).parents[2] / "fixtures" / "nets" / "mdeq_official.json").read_text())
LARGE = dict(channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680)
IMAGENET = dict(
    channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192), final_channels=2048, downsample=2,
    num_classes=1000, img_resolution=224,
)  # fmt: skip
TINY = dict(img_resolution=16, num_classes=4, channels=(8, 16, 8), head_channels=(2, 3, 2), final_channels=6, groups=4)


class Plain(nn.Module):
    """Stands in for the equilibrium layer: a few plain steps, one state."""

    def __init__(self, steps=2):
        super().__init__()
        self.steps = steps

    def forward(self, fn, z, args):
        for _ in range(self.steps):
            z = fn(z, *args)
        return [z]


def norm(*skip):
    return functools.partial(apply_norm, kind="weight", skip=skip)


def noise(count, salt):
    """`count` float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(count, dtype=torch.int64) + 1
    return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1


def weights_by_formula(shapes):
    """The state dict of the released names: {name: tensor}."""
    state = {}
    for salt, (key, shape) in enumerate(sorted(shapes.items())):
        values = noise(torch.Size(shape).numel(), salt).view(shape)
        if (len(shape) == 4 and not key.endswith("weight_g")) or len(shape) == 2:
            values = values * (3 / values[0].numel()) ** 0.5
        elif key.endswith(("weight", "weight_g", "running_var")):
            values = 0.8 + 0.2 * values
        else:
            values = 0.2 * values
        state[key] = values.float()
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
    return state


@pytest.fixture(scope="module")
def official():
    net = MDEQ(deq=Plain(), norm=norm("fuse"), **RECORD["sizes"])
    net.load_state_dict(from_official(weights_by_formula(RECORD["names"])), strict=True)
    return net.eval()


def some(t):
    return t.flatten()[:: max(1, t.numel() // 12)][:12]


@torch.no_grad()
def test_stem_map_and_head_are_the_released_ones(official):
    x = (1.7 * noise(2 * 3 * 16 * 16, 1)).view(2, 3, 16, 16).float()
    u = official.stem(x)
    torch.testing.assert_close(some(u), torch.tensor(RECORD["u"]), rtol=1e-5, atol=1e-5)
    z = [noise(2 * c * (8 >> i) ** 2, 10 + i).view(2, c, 8 >> i, 8 >> i).float() for i, c in enumerate((8, 16, 8))]
    f = official.cell(z, u)
    for got, want, length in zip(f, RECORD["f"], RECORD["f_norms"], strict=True):
        torch.testing.assert_close(some(got), torch.tensor(want), rtol=1e-5, atol=1e-5)
        assert got.norm().item() == pytest.approx(length, rel=1e-5)
    torch.testing.assert_close(official.head(z), torch.tensor(RECORD["logits"]), rtol=1e-5, atol=1e-5)


def test_names_of_a_parallel_wrapper_and_of_torchdeq_are_understood():
    state = weights_by_formula(RECORD["names"])
    plain = from_official(state)
    wrapped = {f"module.{key.replace('fullstage', 'full_stage')}": value for key, value in state.items()}
    assert from_official(wrapped).keys() == plain.keys()
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight is no tensor of the released MDEQ code"):
        from_official({"layer1.0.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("sizes", "skip", "count"),
    [
        ({}, ("fuse",), 158_986),
        (LARGE, ("fuse",), 11_098_398),
        (IMAGENET, ("fuse",), 16_808_936),
        ({}, (), 159_034),
        (LARGE, (), 11_099_998),
        (IMAGENET, ("fuse", "post"), 16_808_456),
    ],
)
def test_parameters_of_the_published_networks(sizes, skip, count):
    with FakeTensorMode():
        net = MDEQ(deq=Plain(), norm=norm(*skip), **sizes)
    assert sum(p.numel() for p in net.parameters()) == count


def test_the_map_does_not_mix_samples_and_takes_any_rows():
    net = MDEQ(deq=Plain(), norm=norm("fuse"), dropout=0.5, **TINY).train()
    u = torch.randn(5, 8, 16, 16)
    z = [torch.randn_like(t) for t in net.state(u)]
    masks = net.cell.masks(z)
    assert [tuple(m.shape) for m in masks] == [(5, 8, 1, 1), (5, 16, 1, 1), (5, 8, 1, 1)]
    reset(net)
    whole = net.cell(z, u, *masks)
    rows = torch.tensor([3, 0])
    part = net.cell([t[rows] for t in z], u[rows], *[m[rows] for m in masks])
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[rows], b, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only_and_drops_whole_channels():
    net = MDEQ(deq=Plain(), dropout=0.5, **TINY)
    u = torch.randn(2, 8, 16, 16)
    z = net.state(u)
    assert net.eval().cell.masks(z) == []
    first, second = net.train().cell.masks(z)[0], net.cell.masks(z)[0]
    assert set(first.unique().tolist()) <= {0.0, 2.0} and not torch.equal(first, second)


def test_upsampling_is_nearest_and_fusion_a_sum():
    """Against the plain statement: every scale brought to scale 0 on its own, then added."""
    net = MDEQ(deq=Plain(), **TINY).eval()
    x = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate((8, 16, 8))]
    fuse = net.cell.fuse[0]
    plain = x[0]
    for j in (1, 2):
        plain = plain + fuse[str(j)](x[j]).repeat_interleave(2**j, 2).repeat_interleave(2**j, 3)
    torch.testing.assert_close(net.cell._fused(x, 0), plain)
    lowest = x[2] + net.cell.fuse[2]["0"](x[0]) + net.cell.fuse[2]["1"](x[1])
    torch.testing.assert_close(net.cell._fused(x, 2), lowest)


def test_gradients_reach_every_parameter():
    net = MDEQ(deq=Plain(3), norm=norm("fuse"), **TINY).train()
    reset(net)
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_initial_weights_are_what_the_released_training_used():
    torch.manual_seed(0)
    net = MDEQ(deq=Plain(), norm=norm("fuse"), **LARGE)
    assert net.head.grow[3].conv1.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.cell.fuse[3]["2"][0].conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    # normalised: torch's default, uniform in +-1/sqrt(fan in), not 0.01
    weight = net.cell.block[3].conv1.weight
    assert weight.std().item() == pytest.approx((1 / (3 * 256 * 9)) ** 0.5, rel=0.05)


def test_batch_statistics_stay_outside_the_equilibrium():
    net = MDEQ(deq=Plain(), **TINY)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.cell.modules())


def test_runs_on_fake_tensors_and_in_channels_last():
    with FakeTensorMode():
        net = MDEQ(deq=Plain(), norm=norm("fuse"), **TINY).train()
        reset(net)
        net(torch.empty(2, 3, 16, 16)).sum().backward()
    net = MDEQ(deq=Plain(), **TINY).eval()
    x = torch.randn(2, 3, 16, 16)
    want = net(x)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(channels=(8,), head_channels=(2,)), r"channels must name at least two scales, got \[8\].*ConvDEQ"),
        (dict(head_channels=(2, 3)), "head_channels must hold one width per scale, got 2 for 3 scales"),
        (dict(channels=(8, 18, 8)), r"channels\[1\] must be a multiple of 4 \(groups\), got 18"),
        (dict(groups=3), "groups must be a multiple of 2, got 3"),
        (dict(downsample=3), "downsample must be one of 0, 1, 2, got 3"),
        (dict(img_resolution=18), r"img_resolution must be a multiple of 4 \(3 scales, downsample=0\), got 18"),
        (dict(final_channels=0), "final_channels must be a whole number >= 1, got 0"),
        (dict(channels=(8, 0, 8)), r"channels\[1\] must be a whole number >= 1"),
        ({}, r"takes images of shape \(batch, 3, 16, 16\), got \(2, 3, 32, 32\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(UserError, match=message):
        MDEQ(deq=Plain(), **TINY | change)(torch.zeros(2, 3, 32, 32))
