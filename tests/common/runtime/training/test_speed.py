"""Layout and compilation by configuration word; what they compute is tested by tests/tools/test_bench.py."""

import pytest
import torch
from omegaconf import OmegaConf

from common.diffusion.precond import EDMPrecond
from common.nets.unet import SongUNet
from common.runtime.training.speed import apply_speed, apply_tf32, compiled_part


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


def test_an_equilibrium_is_compiled_at_its_cell_alone(toy):
    from common.deq.layer import DEQ
    from common.deq.solvers import Picard

    net = toy.Net(deq=DEQ(solver=Picard(max_iter=5)))
    made = toy.Task(net=net, optimizer=torch.optim.SGD, schedule=None, correction=None)
    assert compiled_part(made) is net.cell
    keys, x = list(net.state_dict()), torch.randn(3, 4)
    before = net.eval()(x)
    cfg = {"speed": {"channels_last": True, "compile": True}, "trainer": {"accelerator": "cpu"}}
    apply_speed(made, OmegaConf.create(cfg), backend="eager")
    assert net.cell._compiled_call_impl is not None and net._compiled_call_impl is None
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(x), before)


def test_filters_over_three_axes_keep_their_layout():
    held = Holder()
    held.net = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.Conv3d(2, 2, 3))
    cfg = {"speed": {"channels_last": True, "compile": False}, "trainer": {"accelerator": "cpu"}}
    apply_speed(held, OmegaConf.create(cfg))
    assert held.net[0].weight.is_contiguous()


@pytest.mark.parametrize(("word", "products", "convolutions"), [(True, "high", True), (False, "highest", False)])
def test_tf32_means_products_and_convolutions(monkeypatch, word, products, convolutions):
    """torch's default has it off for products and on for convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        apply_tf32(word)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (products, convolutions)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
