"""CIFAR ResNets: published sizes, and the published accuracy of the weights the metrics use."""

import pytest
import torch
from torch import nn

from common.nets.resnet import Block, CifarResNet


@pytest.mark.parametrize("blocks, parameters, layers", [(3, 269_722, 20), (9, 853_018, 56)])
def test_published_size(blocks, parameters, layers):
    with torch.device("meta"):
        network = CifarResNet(blocks=blocks)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == layers
    keys = set(network.state_dict())
    assert {"conv1.weight", "layer1.0.bn2.running_var", f"layer3.{blocks - 1}.conv2.weight", "linear.bias"} <= keys


def test_shortcut_subsamples_and_pads_channels_on_both_sides():
    block = Block(in_channels=16, out_channels=32, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_features_are_what_the_linear_layer_reads():
    network = CifarResNet(blocks=1).eval()
    x = torch.randn(2, 3, 32, 32)
    assert network.features(x).shape == (2, 64)
    assert torch.equal(network.linear(network.features(x)), network(x))
