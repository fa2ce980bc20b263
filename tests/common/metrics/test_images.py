"""Rounding to 8 bits."""

import pytest
import torch

from common.errors import UserError
from common.metrics.images import ROUNDINGS, from_uint8, to_uint8


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_ends_and_clipping(rule):
    x = torch.tensor([-9.0, -1.0, 1.0, 9.0]).view(1, 1, 2, 2)
    assert to_uint8(x, rule).flatten().tolist() == [0, 0, 255, 255]


def test_rules_differ_where_they_should():
    x = torch.tensor([0.0, 0.001, 0.9999, -0.9999]).view(1, 1, 2, 2)
    assert to_uint8(x, "edm").flatten().tolist() == [128, 128, 255, 0]
    assert to_uint8(x, "floor255").flatten().tolist() == [127, 127, 254, 0]
    assert to_uint8(x, "nearest").flatten().tolist() == [128, 128, 255, 0]


@pytest.mark.parametrize("rule", ["edm", "nearest"])
def test_round_trip_of_every_grey_level(rule):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(levels), rule), levels)
    assert torch.equal(to_uint8(from_uint8(levels).double(), rule), levels)


def test_uint8_passes_and_bfloat16_is_widened_first():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert to_uint8(levels) is levels
    x = torch.linspace(-1, 1, 256).to(torch.bfloat16).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


@pytest.mark.parametrize(
    "x, rule, words",
    [
        (torch.zeros(1), "flor255", "Closest: floor255"),
        (torch.zeros(1, dtype=torch.int64), "edm", "int64"),
        (torch.tensor([float("nan"), 0.0]), "edm", "1 non-finite"),
    ],
)
def test_bad_input_is_named(x, rule, words):
    with pytest.raises(UserError, match=words):
        to_uint8(x, rule)
