import math

import pytest
import torch

from common.errors import UserError
from common.nets.edm2 import (
    SILU_GAIN,
    SIZES,
    Block,
    EDM2UNet,
    MPConv,
    MPFourier,
    mp_cat,
    mp_sum,
    normalize,
    resample,
    weights_kept,
)

SMALL = dict(img_resolution=8, img_channels=3, model_channels=64, channel_mult=[1, 2], num_blocks=1)


def rms(x):
    return x.double().square().mean().sqrt().item()


def test_every_operation_keeps_unit_magnitude():
    a, b = torch.randn(400, 64), torch.randn(400, 32)
    assert rms(torch.nn.functional.silu(a) * SILU_GAIN) == pytest.approx(1, abs=0.01)
    assert rms(mp_sum(a, torch.randn(400, 64), 0.3)) == pytest.approx(1, abs=0.02)
    both = mp_cat(a, b, 0.5)
    assert rms(both) == pytest.approx(1, abs=0.02)
    # Parts of unequal width carry equal energy.
    assert rms(both[:, :64]) * 64**0.5 == pytest.approx(rms(both[:, 64:]) * 32**0.5, rel=0.02)
    assert rms(MPFourier(500)(torch.randn(400))) == pytest.approx(1, abs=0.02)
    assert rms(MPConv(64, 50)(a)) == pytest.approx(1, abs=0.05)
    image = torch.randn(4, 16, 20, 20)
    assert rms(MPConv(16, 40, (3, 3))(image)[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(normalize(3 * image, dim=1).square().mean(1), torch.ones(4, 20, 20), rtol=1e-2, atol=0)


def test_forced_normalisation_happens_in_training_only():
    layer = MPConv(20, 6, (3, 3))
    with torch.no_grad():
        layer.weight.mul_(5)
    before = layer.weight.detach().clone()
    x = torch.randn(2, 20, 5, 5)
    evaluated = layer.eval()(x)
    assert torch.equal(layer.weight, before)
    trained = layer.train()(x)
    rows = layer.weight.detach().square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rows, torch.ones(6), rtol=2e-4, atol=0)
    torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-4)


def test_output_does_not_depend_on_the_scale_of_the_weight_and_gradient_is_orthogonal():
    layer = MPConv(9, 4).double().eval()
    x = torch.randn(7, 9, dtype=torch.float64)
    out = layer(x, gain=torch.tensor(0.7))
    (out**3).sum().backward()
    radial = (layer.weight.grad * layer.weight).sum(1).abs()
    assert (radial < 1e-3 * layer.weight.grad.norm(dim=1) * layer.weight.norm(dim=1)).all()
    with torch.no_grad():
        layer.weight.mul_(100)
    torch.testing.assert_close(layer(x, gain=0.7), out, rtol=2e-3, atol=0)


def test_a_second_pass_before_backward_needs_the_weights_kept():
    net = EDM2UNet(**SMALL)
    x, noise = torch.randn(2, 3, 8, 8), torch.zeros(2)
    first = net(x, noise)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    with weights_kept(net):
        assert not net.out_conv.forced
        second = net(x, noise)
    assert net.out_conv.forced
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert torch.equal(first, second)
    first.sum().backward()
    first = net(x, noise)
    net(x, noise)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


def test_weights_kept_restores_after_an_error():
    net = EDM2UNet(**SMALL)
    with pytest.raises(UserError), weights_kept(net):
        net(torch.zeros(1, 3, 4, 4), torch.zeros(1))
    assert all(m.forced for m in net.modules() if isinstance(m, MPConv))


def test_a_fresh_network_returns_zero():
    x = torch.randn(2, 3, 8, 8)
    assert (EDM2UNet(**SMALL)(x, torch.zeros(2)) == 0).all()


def test_dropout_only_at_and_below_a_resolution():
    everywhere, low = EDM2UNet(**SMALL, dropout=0.4), EDM2UNet(**SMALL, dropout=0.4, dropout_res=4)
    x = torch.randn(2, 3, 8, 8)
    assert {m.shape[-1] for m in everywhere.draw_dropout(x)} == {8, 4}
    masks = low.draw_dropout(x)
    assert {m.shape[-1] for m in masks} == {4}
    low(x, torch.zeros(2), dropout_masks=masks)
    assert EDM2UNet(**SMALL, dropout=0.4, dropout_res=2).draw_dropout(x) == ()


def test_published_imagenet_dropout_layers():
    with torch.device("meta"):
        net = EDM2UNet(img_resolution=64, img_channels=3, label_dim=1000, dropout=0.4, dropout_res=16)
        masks = net.draw_dropout(torch.empty(1, 3, 64, 64))
    # 16: down, 3 blocks, up, 4 blocks; 8: down, 3 blocks, in0, in1, 4 blocks.
    assert [m.shape[-1] for m in masks] == [16] * 4 + [8] * 10 + [16] * 5


def test_clip_keeps_float16_finite():
    block = Block(64, 64, 8, flavor="dec").eval()
    x = torch.full((1, 64, 4, 4), 2e3, dtype=torch.float16)
    out = block(x, torch.zeros(1, 8))
    assert out.dtype == torch.float16 and out.abs().max() <= 256
    block.clip_act = None
    assert block(x, torch.zeros(1, 8)).abs().max() > 256


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_resampling_keeps_constants_and_undoes_itself(taps):
    x = torch.ones(1, 2, 12, 12)
    for mode, size in (("down", 6), ("up", 24), ("keep", 12)):
        y = resample(x, mode, taps)
        assert y.shape[-1] == size
        torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.ones_like(y[..., 2:-2, 2:-2]))
    if taps == [1, 1]:
        x = torch.randn(1, 2, 6, 6)
        torch.testing.assert_close(resample(resample(x, "up"), "down"), x)


def test_the_filter_paths_agree_on_the_box():
    x = torch.randn(1, 2, 8, 8)
    # (0, 1, 1, 0) is the box written with two idle taps, so it takes the general path.
    for mode in ("up", "down"):
        torch.testing.assert_close(resample(x, mode, [0, 1, 1, 0]), resample(x, mode, [1, 1]))


def test_sizes_are_named():
    assert list(SIZES) == ["xxs", "xs", "s", "m", "l", "xl", "xxl"]


def test_class_label_has_unit_magnitude():
    net = EDM2UNet(**SMALL, label_dim=50).eval()
    assert rms(net.emb_label(torch.eye(50) * math.sqrt(50))) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_channels=32, attn_resolutions=[]), None),
        (dict(model_channels=24), "24 channels cannot be cut into heads of 64|48 channels cannot be cut"),
        (dict(attn_resolutions=[3]), "attn_resolutions names 3"),
        (dict(dropout=-0.1), "dropout must be >= 0 and < 1"),
        (dict(img_resolution=7), "img_resolution must be a multiple of 2"),
        (dict(img_channels=0), "img_channels must be a whole number"),
    ],
)
def test_options_that_do_not_fit_are_named(change, message):
    if message is None:
        assert EDM2UNet(**(SMALL | change))
        return
    with pytest.raises(UserError, match=message):
        EDM2UNet(**(SMALL | change))
