"""The small convolutional DEQ: its map, its equilibrium, its sizes."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.deq.grads import Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm, reset
from common.deq.solvers import Anderson
from common.errors import UserError
from common.nets.conv_deq import ConvDEQ


def network(**change):
    torch.manual_seed(0)
    deq = DEQ(solver=Anderson(max_iter=60, tol=1e-5), grad=Unrolled(steps=3, tau=0.5))
    return ConvDEQ(**dict(deq=deq, norm=functools.partial(apply_norm, kind="weight")) | change)


def test_the_map_is_the_residual_layer_of_its_docstring():
    net = network(channels=8, groups=4, expansion=2)
    for parameter in net.cell.parameters():
        nn.init.normal_(parameter, mean=0.5, std=0.3)
    z, u = torch.randn(3, 8, 8, 8), torch.randn(3, 8, 8, 8)
    cell = net.cell
    inner = cell.norm1(F.relu(F.conv2d(z, cell.conv1.weight, padding=1)))
    want = cell.norm3(F.relu(z + cell.norm2(u + F.conv2d(inner, cell.conv2.weight, padding=1))))
    torch.testing.assert_close(cell(z, u), want)


def test_the_output_is_the_head_of_a_fixed_point():
    net = network().eval()
    nn.init.constant_(net.cell.norm1.weight, 0.05)  # fresh cells do not contract; this one hardly looks at z
    nn.init.constant_(net.cell.norm3.weight, 0.5)
    x = torch.randn(4, 1, 8, 8)
    reset(net)
    with torch.no_grad():
        u = net.stem(x)
        (z,) = net.deq(net.cell, torch.zeros_like(u), (u,))
        assert net.deq.solution.converged.all()
        torch.testing.assert_close(net.cell(z, u), z, rtol=0, atol=1e-3)
        torch.testing.assert_close(net(x), net.head(z))


def test_training_gives_gradients_to_every_parameter():
    net = network().train()
    reset(net)
    outputs = net.outputs(torch.randn(4, 1, 8, 8))
    assert len(outputs) == 1 and outputs[0].shape == (4, 10)
    outputs[0].square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_several_states_give_several_outputs():
    deq = DEQ(solver=Anderson(max_iter=9), grad=Unrolled(steps=1, tau=1.0), states=3)
    net = network(deq=deq).train()
    assert [tuple(y.shape) for y in net.outputs(torch.randn(2, 1, 8, 8))] == [(2, 10)] * 3
    assert len(net.eval().outputs(torch.randn(2, 1, 8, 8))) == 1


def test_parameters_and_batch_statistics():
    net = network()
    assert sum(p.numel() for p in net.parameters()) == 11_842
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.cell.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(channels=20), r"channels must be a multiple of 8 \(groups\), got 20"),
        (dict(pool=3), r"img_resolution must be a multiple of 3 \(pool\), got 8"),
        (dict(expansion=0), "expansion must be a whole number >= 1, got 0"),
        ({}, r"takes images of shape \(batch, 1, 8, 8\), got \(2, 3, 8, 8\)"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(UserError, match=message):
        network(**change)(torch.zeros(2, 3, 8, 8))
