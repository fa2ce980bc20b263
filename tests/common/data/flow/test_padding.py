"""Padding to multiples and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.flow.padding import Padder
from common.errors import UserError


@pytest.mark.parametrize("mode", ["sintel", "kitti"])
@pytest.mark.parametrize("size", [(436, 1024), (375, 1242), (8, 16), (1, 1), (13, 7)])
def test_round_trip_is_exact(mode, size):
    x = torch.rand(2, 3, *size)
    padder = Padder(*size, mode=mode)
    (padded,) = padder.pad(x)
    assert padded.shape[2] % 8 == padded.shape[3] % 8 == 0
    assert padded.shape[2] - size[0] < 8 and padded.shape[3] - size[1] < 8
    assert torch.equal(padder.unpad(padded), x)


def test_where_the_padding_goes():
    x = torch.arange(35.0).view(1, 1, 5, 7)
    (sintel,), (kitti,) = Padder(5, 7).pad(x), Padder(5, 7, mode="kitti").pad(x)
    # three rows: one above and two below, or all below; one column: to the right
    assert torch.equal(sintel[0, 0, 1:6, :7], x[0, 0]) and torch.equal(kitti[0, 0, :5, :7], x[0, 0])
    assert torch.equal(sintel[0, 0, 0], sintel[0, 0, 1]) and torch.equal(kitti[0, 0, 7], kitti[0, 0, 4])
    one, two = Padder(5, 7, multiple=4).pad(x, x + 1)
    assert one.shape == (1, 1, 8, 8) and torch.equal(two, one + 1)


def test_wrong_input():
    with pytest.raises(UserError, match=r"mode must be one of sintel, kitti, got 'kiti'. Closest: kitti"):
        Padder(5, 7, mode="kiti")
    with pytest.raises(UserError, match=r"for 5x7, got a picture of \(7, 5\)"):
        Padder(5, 7).pad(torch.zeros(1, 1, 7, 5))
    with pytest.raises(UserError, match=">= 1"):
        Padder(5, 7, multiple=0)


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(["sintel", "kitti"]))
def test_small_pictures_reach_the_least_size(h, w, mode):
    padder = Padder(h, w, multiple=8, mode=mode, least=64)
    picture = torch.rand(1, 3, h, w)
    padded = padder.pad(picture)[0]
    assert min(padded.shape[2:]) >= 64 and not any(side % 8 for side in padded.shape[2:])
    assert torch.equal(padder.unpad(padded), picture)
    assert padded.shape[2] - h < max(8, 65 - h) and padded.shape[3] - w < max(8, 65 - w)  # and no more than needed
