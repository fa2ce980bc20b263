import functools

import pytest
import torch

from common.errors import UserError
from common.targets import resolve
from common.weights.build import build


def test_builds_a_nested_tree():
    net = build(
        {
            "_target_": "torch.nn.Sequential",
            "_args_": [
                {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3},
                {"_target_": "torch.nn.ReLU"},
            ],
        }
    )
    assert net(torch.zeros(1, 2)).shape == (1, 3)


def test_plain_data_partial_and_lists():
    out = build({"a": [1, {"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 2}], "b": None})
    assert out["b"] is None and out["a"][0] == 1
    assert isinstance(out["a"][1], functools.partial)
    assert out["a"][1](out_features=5).weight.shape == (5, 2)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torchx.nn.Linear",
        "torch.serialization.os.system",
        "torch.serialization.os",
        "torch.nn.Linear.__init__.__globals__",
        "torch.nn",
        "common.files.os.system",
        "common.files.json.loads",
        3,
    ],
)
def test_refuses_what_lies_outside(target):
    with pytest.raises(UserError):
        build({"_target_": target})


def test_names_the_nearest():
    with pytest.raises(UserError, match="Closest: Linear"):
        resolve("torch.nn.Linaer")
    with pytest.raises(UserError, match=r"in_feature is not an option of torch\.nn\.Linear\. Closest: in_features"):
        build({"_target_": "torch.nn.Linear", "in_feature": 2, "out_features": 3})
    with pytest.raises(UserError, match="does not exist"):
        resolve("common.nothing.At")


def test_a_narrower_list_is_kept():
    with pytest.raises(UserError, match="not allowed"):
        build({"_target_": "torch.hub.load"}, allowed=("torch.nn.",))
