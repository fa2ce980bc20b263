import pytest
import torch

from common.errors import UserError
from common.nets.dit import DiT

TINY = dict(img_resolution=8, in_channels=3, width=32, depth=2, num_heads=4, label_dim=4)


def shaken(make=DiT, **changes):
    torch.manual_seed(0)
    net = make(**dict(TINY, **changes))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def inputs():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 3, 8, 8, generator=generator)
    return z, torch.tensor([0.9, 0.5, 0.7]), torch.tensor([0.1, 0.5, 0.6]), torch.tensor([0, 3, 4])


def test_a_fresh_network_returns_zero():
    z, t, r, labels = inputs()
    assert not DiT(**TINY)(z, t, r, labels).any()


def test_a_fresh_block_is_the_identity():
    net, x = DiT(**TINY), torch.randn(3, 16, 32)
    assert torch.equal(net.blocks[0](x, torch.randn(3, 32)), x)


def test_every_condition_is_heard_by_its_own_sample():
    net = shaken()
    z, t, r, labels = inputs()
    base = net(z, t, r, labels)
    for changed in ((z, t + 0.01, r, labels), (z, t, r - 0.01, labels), (z, t, r, torch.tensor([1, 1, 1]))):
        moved = (net(*changed) - base).abs().flatten(1).amax(dim=1)
        assert (moved > 1e-5).all()
    alone = net(z[1:2], t[1:2], r[1:2], labels[1:2])
    torch.testing.assert_close(alone, base[1:2], rtol=1e-4, atol=1e-5)


def test_labels_may_be_numbers_one_hot_or_absent():
    net = shaken()
    z, t, r, _ = inputs()
    hot = torch.eye(4)[[0, 3, 0]]
    hot[2] = 0
    assert torch.equal(net(z, t, r, hot), net(z, t, r, torch.tensor([0, 3, 4])))
    assert torch.equal(net(z, t, r), net(z, t, r, torch.tensor([4, 4, 4])))


@pytest.mark.parametrize(
    ("times", "blind"),
    [(["t"], "r"), (["t", "t-r"], None), (["t", "r"], None), (["t", "r", "t-r"], None), (["t-r"], "shift")],
)
def test_the_network_hears_the_times_it_is_told(times, blind):
    net = shaken(times=times)
    z, t, r, labels = inputs()
    base = net(z, t, r, labels)
    changed = {"r": (t, r * 0.5), "shift": (t + 0.05, r + 0.05), None: (t, r * 0.5)}[blind]
    moved = (net(z, *changed, labels) - base).abs().max()
    assert moved < 1e-4 if blind else moved > 1e-4
    assert (net(z, t * 0.9, r, labels) - base).abs().max() > 1e-4


def test_a_network_told_t_alone_needs_no_r():
    z, t, _, labels = inputs()
    net = shaken(times=["t"])
    assert torch.equal(net(z, t, None, labels), net(z, t, t, labels))
    with pytest.raises(UserError, match="need r"):
        shaken()(z, t, None, labels)


def test_the_time_scale_multiplies_every_time():
    z, t, r, labels = inputs()
    torch.testing.assert_close(shaken(time_scale=2.0)(z, t, r, labels), shaken()(z, 2 * t, 2 * r, labels))


def test_recomputing_changes_no_gradient():
    z, t, r, labels = inputs()
    nets = [shaken(), shaken(recompute=True)]
    grads = [torch.autograd.grad(net(z, t, r, labels).square().sum(), list(net.parameters())) for net in nets]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_an_unconditional_network_has_no_table_and_refuses_labels():
    z, t, r, labels = inputs()
    net = shaken(label_dim=0)
    assert net(z, t, r).shape == z.shape and not any("y_embedder" in name for name in net.state_dict())
    with pytest.raises(UserError, match="unconditional"):
        net(z, t, r, labels)


def test_what_the_runtime_reads():
    net = DiT(**TINY)
    assert (net.img_channels, net.img_resolution, net.label_dim, net.augment_dim) == (3, 8, 4, 0)
    assert net.draw_dropout(torch.empty(2, 3, 8, 8)) == ()
    assert "pos_embed" not in net.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patch_size=3), r"img_resolution must be a multiple of 3 \(patch_size\), got 8"),
        (dict(num_heads=5), r"width must be a multiple of 5 \(5 heads"),
        (dict(width=30, num_heads=5), "width must be a multiple of 4"),
        (dict(times=["t", "h"]), "times must be one of"),
        (dict(times=["t", "t"]), "each once"),
        (dict(times=[]), "each once"),
        (dict(label_dim=-1), "label_dim must be a whole number >= 0"),
        (dict(depth=0), "depth must be a whole number"),
        ({}, r"images of shape \(batch, 3, 8, 8\), got \(3, 4, 8, 8\)"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    _, t, r, labels = inputs()
    with pytest.raises(UserError, match=message):
        DiT(**dict(TINY, **changes))(torch.zeros(3, 4, 8, 8), t, r, labels)
