"""Layout and compilation by configuration word; what they compute is tested by tests/tools/test_bench.py."""

import pytest
import torch
from omegaconf import OmegaConf

from common.diffusion.precond import EDMPrecond
from common.nets.unet import SongUNet
from common.runtime.speed import apply_speed


class Holder:
    def __init__(self):
        self.net = EDMPrecond(model=SongUNet(
            img_resolution=8, in_channels=3, out_channels=3, model_channels=16, channel_mult=[1], num_blocks=1,
            attn_resolutions=[],
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("word", "accelerator", "cuda", "expected"),
    [
        (None, "cpu", True, True), (None, "auto", False, True), (None, "auto", True, False),
        (True, "gpu", True, True), (False, "cpu", False, False),
    ],
)  # fmt: skip
def test_layout(monkeypatch, word, accelerator, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    held = Holder()
    keys = list(held.net.state_dict())
    cfg = {"speed": {"channels_last": word, "compile": False}, "trainer": {"accelerator": accelerator}}
    apply_speed(held, OmegaConf.create(cfg))
    weight = held.net.raw.enc["8x8_block0"].conv0.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is expected
    assert list(held.net.state_dict()) == keys
