import pytest
import torch
from torch import nn

from common.errors import UserError
from common.optim.groups import bias_and_norm_groups, weight_decay_groups


def test_only_matrices_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2), nn.Embedding(5, 2))
    net[4].weight.requires_grad_(False)
    groups = weight_decay_groups(net, weight_decay=0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert [id(p) for p in groups[0]["params"]] == [id(net[0].weight), id(net[3].weight)]
    assert len(groups[1]["params"]) == 4
    torch.optim.AdamW(groups, lr=1e-3)


def test_names_shared_weights_and_empty_groups():
    net = nn.ModuleDict({"pos_embed": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    groups = weight_decay_groups(net, weight_decay=0.1, no_decay=["pos_embed"])
    assert groups[0]["params"][0] is net["head"].weight and groups[1]["params"][0] is net["pos_embed"].weight
    net["head"].weight = net["pos_embed"].weight
    assert [len(group["params"]) for group in weight_decay_groups(net, weight_decay=0.1)] == [1]
    with pytest.raises(UserError, match="weight_decay must be >= 0"):
        weight_decay_groups(net, weight_decay=-0.1)


def net_of_four_kinds():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.GroupNorm(1, 2))
    net.register_parameter("scalar", nn.Parameter(torch.ones(1)))
    net.register_parameter("scale", nn.Parameter(torch.ones(4)))
    return net


def named(groups, net):
    names = {id(p): name for name, p in net.named_parameters()}
    return [({names[id(p)] for p in g["params"]}, g.get("weight_decay"), g.get("lr")) for g in groups]


def test_biases_learn_twice_as_fast_and_norms_do_not_decay():
    """The recipe of HamNet: every parameter once, biases of convolutions and norms alike."""
    net = net_of_four_kinds()
    groups = bias_and_norm_groups(net, lr=0.1, bias_lr=2.0)
    assert named(groups, net) == [
        ({"0.weight", "2.weight", "scale"}, None, None),
        ({"1.weight", "3.weight", "scalar"}, 0.0, None),
        ({"0.bias", "1.bias", "2.bias", "3.bias"}, 0.0, 0.2),
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 1e-4), (0.1, 0.0), (0.2, 0.0)]
    half = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert half.get_last_lr() == [0.05, 0.05, 0.1]


def test_only_norms_without_decay_or_everything_with_it():
    net = net_of_four_kinds()
    light = named(bias_and_norm_groups(net, lr=0.1, decay_biases=True), net)
    assert light[0][0] == {"0.weight", "2.weight", "scale", "0.bias", "2.bias"} and light[1][1:] == (0.0, None)
    (everything,) = named(bias_and_norm_groups(net, lr=0.1, decay_norms=True, decay_biases=True), net)
    assert len(everything[0]) == 10 and everything[1:] == (None, None)
    net.requires_grad_(False)
    assert bias_and_norm_groups(net, lr=0.1) == []
    with pytest.raises(UserError, match="bias_lr must be > 0, got 0"):
        bias_and_norm_groups(net, lr=0.1, bias_lr=0)
