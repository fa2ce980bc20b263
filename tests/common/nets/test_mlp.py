import pytest
import torch

from common.errors import UserError
from common.nets.mlp import MLPDenoiser

DIGITS = dict(img_resolution=8, in_channels=1, out_channels=1)


def test_a_fresh_network_returns_zero():
    assert (MLPDenoiser(**DIGITS)(torch.randn(2, 1, 8, 8), torch.zeros(2)) == 0).all()


def test_parameter_count_by_hand():
    net = MLPDenoiser(**DIGITS, width=256, depth=2, emb_channels=64)
    first, last = (64 + 64) * 256 + 256, 256 * 64 + 64
    assert sum(p.numel() for p in net.parameters()) == first + 2 * ((256 + 64) * 256 + 256) + last == 213_824


def test_learns_to_return_a_constant_that_depends_on_noise_and_class():
    net = MLPDenoiser(**DIGITS, label_dim=2, augment_dim=3, width=32, depth=1, dropout=0.1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    labels, augment = torch.eye(2).repeat(32, 1), torch.zeros(64, 3)
    noise = torch.linspace(-1, 1, 64)
    target = (noise + labels[:, 0]).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    losses = []
    for _ in range(150):
        loss = (net(torch.randn(64, 1, 8, 8), noise, labels, augment) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_dropout_masks_have_one_entry_per_hidden_unit():
    net = MLPDenoiser(**DIGITS, width=16, depth=2, dropout=0.5)
    masks = net.draw_dropout(torch.zeros(4, 1, 8, 8))
    assert [tuple(m.shape) for m in masks] == [(4, 16), (4, 16)]
    assert MLPDenoiser(**DIGITS).draw_dropout(torch.zeros(4, 1, 8, 8)) == ()


@pytest.mark.parametrize("field", ["width", "depth", "img_resolution", "in_channels", "out_channels"])
def test_sizes_below_one_are_named(field):
    with pytest.raises(UserError, match=f"{field} must be a whole number >= 1, got 0"):
        MLPDenoiser(**(DIGITS | {field: 0}))
