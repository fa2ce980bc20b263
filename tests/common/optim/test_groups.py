import pytest
import torch
from torch import nn

from common.errors import UserError
from common.optim.groups import weight_decay_groups


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
