from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.nets.edm2 import EDM2UNet
from common.nets.inputs import attention_heads, check_inputs, check_pyramid
from common.nets.mlp import MLPDenoiser
from common.nets.unet import SongUNet

RGB = dict(img_resolution=8, in_channels=3)


@settings(deadline=None, max_examples=50)
@given(levels=st.integers(1, 4), res=st.integers(1, 40), attention=st.integers(1, 50))
def test_a_pyramid_is_accepted_exactly_when_every_level_is_a_half(levels, res, attention):
    sizes = [res / 2**level for level in range(levels)]
    fits = all(s == int(s) for s in sizes) and (attention in sizes or attention > res)
    try:
        check_pyramid(res, [1] * levels, [attention])
    except UserError:
        assert not fits
    else:
        assert fits


def test_labels_come_back_ready_to_use():
    net = SimpleNamespace(img_resolution=2, in_channels=1, label_dim=3, augment_dim=0)
    x, noise = torch.zeros(2, 1, 2, 2), torch.zeros(2)
    assert torch.equal(check_inputs(net, x, noise, None, None), torch.zeros(1, 3))
    labels = torch.eye(3)[:2]
    assert check_inputs(net, x, noise, labels, None) is labels
    net.label_dim = 0
    assert check_inputs(net, x, noise, None, None) is None
    with pytest.raises(UserError, match="label_dim=0, got \\(2, 3\\)"):
        check_inputs(net, x, noise, labels, None)


def test_attention_heads():
    assert attention_heads(256, 64) == 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: attention_heads(96, 64), "96 channels cannot be cut into heads of 64"),
        (lambda: attention_heads(32, 64), "32 channels cannot be cut into heads of 64"),
        (lambda: check_pyramid(8, [1, 0], []), r"channel_mult\[1\] must be a whole number >= 1, got 0"),
        (lambda: SongUNet(**RGB, out_channels=3, label_dim=-1), "label_dim must be a whole number >= 0"),
        (lambda: MLPDenoiser(**RGB, out_channels=3, label_dim=-1), "label_dim must be a whole number >= 0"),
        (lambda: EDM2UNet(img_resolution=8, img_channels=3, label_dim=-1), "label_dim must be a whole number >= 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        make()
