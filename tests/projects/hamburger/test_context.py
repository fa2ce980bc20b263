"""Context modules: the interface, what each does against a slow re-statement, sizes of the paper's table."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from projects.hamburger import context
from projects.hamburger.context import (
    AtrousPyramid,
    ConvNormReLU,
    DoubleAttention,
    EMAttention,
    NonLocal,
    PyramidPooling,
    make_norm,
)

ALL = [NonLocal, DoubleAttention, EMAttention, PyramidPooling, AtrousPyramid]


def found(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module adds before its last convolution, seen by a hook."""
    seen = []
    handle = module.up.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0]))
    module(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
def test_same_shape_everything_learns_and_a_picture_stands_alone(kind, norm):
    torch.manual_seed(0)
    module = kind(16, 32, norm=norm, norm_groups=2)
    x = torch.randn(3, 16, 7, 5, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape and (y >= 0).all()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x)[1:2], module(x[1:2]), rtol=1e-4, atol=1e-5)
        assert module(torch.randn(1, 16, 1, 1)).shape == (1, 16, 1, 1)


@pytest.mark.parametrize("kind", [NonLocal, DoubleAttention, EMAttention])
def test_the_order_of_the_pixels_means_nothing(kind):
    torch.manual_seed(0)
    module = kind(8, 8, norm="none").eval()
    x, order = torch.randn(2, 8, 4, 6), torch.randperm(24)
    mixed = x.flatten(2)[:, :, order].view_as(x)
    with torch.no_grad():
        expected = module(x).flatten(2)[:, :, order].view_as(x)
        torch.testing.assert_close(module(mixed), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [NonLocal, DoubleAttention, EMAttention, PyramidPooling, AtrousPyramid])
def test_the_far_corner_is_seen(kind):
    torch.manual_seed(0)
    module = kind(8, 8, norm="none").eval()
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    module(x)[0, :, 0, 0].sum().backward()
    assert x.grad[0, :, -1, -1].abs().sum() > 0


def test_attention_pixel_by_pixel():
    torch.manual_seed(0)
    module, x = NonLocal(6, 4, norm="none"), torch.randn(1, 6, 3, 2)
    q, k, v = module.project(x).flatten(2)[0].split(4)
    expected = torch.stack([(v * ((q[:, i] @ k) / 4**0.5).softmax(0)).sum(1) for i in range(6)], dim=1)
    torch.testing.assert_close(found(module, x).flatten(2)[0], expected)


def test_double_attention_gathers_and_distributes():
    torch.manual_seed(0)
    module, x = DoubleAttention(6, 4, descriptors=3, norm="none"), torch.randn(1, 6, 3, 2)
    a, p, r = module.project(x).flatten(2)[0].split([4, 3, 3])
    descriptors = [(a * p[i].softmax(0)).sum(1) for i in range(3)]
    shares = r.softmax(0)
    expected = sum(descriptor[:, None] * shares[i] for i, descriptor in enumerate(descriptors))
    torch.testing.assert_close(found(module, x).flatten(2)[0], expected)


def test_expectation_maximisation_step_by_step():
    torch.manual_seed(0)
    module, x = EMAttention(6, 4, rank=3, steps=2, norm="none"), torch.randn(2, 6, 3, 2)
    for i in range(2):
        pixels, bases = module.lower(x)[i].flatten(1), module.bases[0]
        for _ in range(2):
            z = (pixels.T @ bases).softmax(1)
            bases = pixels @ (z / (1e-6 + z.sum(0)))
            bases = bases / bases.norm(dim=0)
        torch.testing.assert_close(found(module, x)[i].flatten(1), bases @ z.T)


def test_stored_bases_move_only_when_asked():
    torch.manual_seed(0)
    module, x = EMAttention(6, 4, rank=3, momentum=0.75), torch.randn(2, 6, 3, 2)
    before = module.bases.clone()
    module.eval()(x)
    module.update_bases()
    assert torch.equal(module.bases, before)
    module.train()(x)
    assert torch.equal(module.bases, before)
    mean = module.last_bases
    module.update_bases()
    torch.testing.assert_close(module.bases, 0.75 * before + 0.25 * mean)
    moved = module.bases.clone()
    module.update_bases()
    assert torch.equal(module.bases, moved), "once for each step"
    assert "bases" in module.state_dict()


def test_pooling_of_a_constant_picture_is_that_constant():
    module = PyramidPooling(4, 8, norm="none")
    x = torch.rand(1, 4, 1, 1).expand(1, 4, 9, 7)
    pooled = found(module, x)[:, 4:]
    each = torch.cat([F.relu(branch(x[:, :, :1, :1])) for branch in module.branches], dim=1)
    torch.testing.assert_close(pooled, each.expand_as(pooled))


def test_sizes_of_the_papers_table():
    """hamburger.md: self-attention 1.00 M, A2 1.01 M (of 2^20) at 512 channels."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        assert count(NonLocal(512, norm="none")) == 2**20
        assert count(DoubleAttention(512)) == 1_051_136
        assert count(EMAttention(512)) == 525_824
        assert count(PyramidPooling(512)) == 787_968


@pytest.mark.parametrize("kind", ALL)
def test_one_interface(kind):
    names = list(inspect.signature(kind).parameters)
    assert names[:2] == ["in_channels", "channels"] and {"norm", "norm_groups"} <= set(names)
    assert kind.__doc__ and kind in vars(context).values()


def test_a_convolution_has_a_bias_where_no_norm_has_one():
    assert ConvNormReLU(2, 4, norm="none")[0].bias is not None
    assert ConvNormReLU(2, 4, 3, dilation=2)[0].bias is None
    assert ConvNormReLU(2, 4, 3, dilation=2)(torch.randn(2, 2, 5, 6)).shape == (2, 4, 5, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_norm("nb", 8), "norm must be one of bn, gn, none, got 'nb'"),
        (lambda: make_norm("gn", 8, 3), r"channels must be a multiple of 3 \(norm_groups\), got 8"),
        (lambda: EMAttention(8, 8, steps=0), "context.steps must be a whole number >= 1, got 0"),
        (lambda: PyramidPooling(8, 6), r"context.channels must be a multiple of 4 \(the grids share them\), got 6"),
        (lambda: AtrousPyramid(8, 6), r"context.channels must be a multiple of 4 \(the branches share them\), got 6"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()
