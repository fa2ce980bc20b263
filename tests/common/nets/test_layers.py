import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from common.nets.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    initial_weight,
)

INIT = dict(init_mode="xavier_uniform")


@pytest.mark.parametrize(
    ("mode", "variance"),
    [
        ("xavier_uniform", 2 / 500),
        ("xavier_normal", 2 / 500),
        ("kaiming_uniform", 1 / 200),
        ("kaiming_normal", 1 / 200),
    ],
)
def test_initial_variance(mode, variance):
    w = initial_weight([300, 200], mode, fan_in=200, fan_out=300)
    assert w.mean().abs() < 4 * math.sqrt(variance / w.numel())
    assert w.var().item() == pytest.approx(variance, rel=0.03)
    if mode.endswith("uniform"):
        assert w.abs().max() <= math.sqrt(3 * variance) * (1 + 1e-6)


def test_initial_mode_typo_names_the_nearest():
    with pytest.raises(UserError, match="Closest: xavier_uniform"):
        initial_weight([1], "xavier_unifrom", 1, 1)


def test_weights_follow_the_dtype_of_the_activations():
    for layer, x in [
        (Linear(in_features=4, out_features=3), torch.randn(2, 4)),
        (Conv2d(in_channels=4, out_channels=3, kernel=3), torch.randn(2, 4, 5, 5)),
        (GroupNorm(num_channels=4), torch.randn(2, 4, 5, 5)),
    ]:
        for dtype in (torch.float64, torch.bfloat16):
            assert layer(x.to(dtype)).dtype == dtype
            assert layer.weight.dtype == torch.float32


def slow_resample(x, taps, up):
    """Zero-stuff, filter with gain 4 (up); filter, keep every second pixel (down): the textbook definition."""
    taps = torch.tensor(taps, dtype=x.dtype)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    channels, pad = x.shape[1], (len(taps) - 1) // 2
    if up:
        stuffed = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        stuffed[:, :, ::2, ::2] = x
        x, kernel = F.pad(stuffed, [len(taps) - 1 - pad, pad] * 2), 4 * kernel
        return F.conv2d(x, kernel.flip(0, 1).expand(channels, 1, -1, -1), groups=channels)
    x = F.conv2d(F.pad(x, [pad] * 4), kernel.expand(channels, 1, -1, -1), groups=channels)
    return x[:, :, ::2, ::2]


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_resampling_equals_filtering_by_definition(taps, up, kernel):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    layer = Conv2d(
        in_channels=3, out_channels=5 if kernel else 3, kernel=kernel, up=up, down=not up, resample_filter=taps
    )
    layer.double()
    expected = slow_resample(x, taps, up)
    if kernel:
        torch.nn.init.normal_(layer.bias)
        expected = F.conv2d(expected, layer.weight, layer.bias, padding=kernel // 2)
    torch.testing.assert_close(layer(x), expected)


def test_fused_resampling_convolves_at_the_higher_resolution():
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    taps = [1, 3, 3, 1]
    options = dict(in_channels=3, out_channels=4, kernel=3, resample_filter=taps, fused_resample=True)
    down, up = Conv2d(**options, down=True).double(), Conv2d(**options, up=True).double()
    for layer in (down, up):
        torch.nn.init.normal_(layer.bias)
    full = F.conv2d(x, down.weight, padding=2)[:, :, 1:-1, 1:-1]
    expected = slow_resample(full, taps, up=False) + down.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(down(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    expected = F.conv2d(slow_resample(x, taps, up=True), up.weight, up.bias, padding=1)
    assert up(x).shape == expected.shape == (1, 4, 24, 24) and down(x).shape == (1, 4, 6, 6)
    torch.testing.assert_close(up(x)[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3])
    assert (up(x) - expected).abs().max() > 1e-3


def test_up_and_down_together_is_refused():
    with pytest.raises(UserError, match="up or down, not both"):
        Conv2d(in_channels=1, out_channels=1, kernel=1, up=True, down=True)


def test_positional_embedding_runs_from_frequency_one_to_one_ten_thousandth():
    emb = PositionalEmbedding(num_channels=8, endpoint=True)(torch.tensor([0.5, 2.0]))
    frequencies = torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    angles = torch.tensor([[0.5], [2.0]]) * frequencies
    torch.testing.assert_close(emb, torch.cat([angles.cos(), angles.sin()], 1))


def test_fourier_embedding_scale():
    assert FourierEmbedding(num_channels=4000).freqs.std().item() == pytest.approx(16, rel=0.05)
    small = FourierEmbedding(num_channels=4000, scale=0.02)
    assert small.freqs.std().item() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(small(torch.zeros(1)), torch.cat([torch.ones(1, 2000), torch.zeros(1, 2000)], 1))


def test_group_norm_groups():
    assert GroupNorm(num_channels=256).num_groups == 32
    assert GroupNorm(num_channels=24).num_groups == 6
    with pytest.raises(UserError, match="132 channels cannot be normalised in 32 equal groups"):
        GroupNorm(num_channels=132)


def test_a_block_with_zero_last_layers_is_its_skip():
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    zero = dict(INIT, init_weight=0)
    block = UNetBlock(
        in_channels=8, out_channels=8, emb_channels=6, attention=True, num_heads=2, init=INIT, init_zero=zero
    )
    torch.testing.assert_close(block(x, emb), x)
    block.skip_scale = math.sqrt(0.5)
    torch.testing.assert_close(block(x, emb), x / 2)  # twice: residual sum and attention sum
