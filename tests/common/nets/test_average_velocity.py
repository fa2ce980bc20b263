"""The wrapper, and what every network of the MeanFlow family must bear: forward mode, compilation, autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.nets.average_velocity import AverageVelocity
from common.nets.dit import DiT
from common.nets.mit import MiT
from common.nets.mlp import MLPDenoiser
from common.nets.unet import SongUNet
from projects.pmf.network import PixelMiT

IMAGE = dict(img_resolution=8, in_channels=3, label_dim=4)
UNET = dict(IMAGE, out_channels=3, channel_mult=[1, 2], model_channels=16, num_blocks=1, attn_resolutions=[4],
            resample_filter=[1, 3, 3, 1], channel_mult_noise=2, num_times=2)  # fmt: skip
HEADS = dict(IMAGE, width=32, depth=3, num_heads=4, head_depth=2, v_depth=1)
MAKERS = {
    "unet": lambda: AverageVelocity(model=SongUNet(**UNET, dropout=0.2)),
    "mlp": lambda: AverageVelocity(
        model=MLPDenoiser(**IMAGE, out_channels=3, width=16, depth=2, dropout=0.2, num_times=2)
    ),
    "dit": lambda: DiT(**IMAGE, width=32, depth=2, num_heads=4),
    "mit": lambda: MiT(**HEADS),
    "pmf": lambda: PixelMiT(**HEADS, patch_size=4, bottleneck=8),
}


def shaken(make):
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    z, direction = (torch.randn(3, 3, 8, 8, generator=generator).to(dtype) for _ in range(2))
    t, r = torch.tensor([0.9, 0.5, 0.7], dtype=dtype), torch.tensor([0.1, 0.5, 0.6], dtype=dtype)
    labels = torch.eye(4, dtype=dtype)[[0, 3, 0]]
    labels[2] = 0
    return z, direction, t, r, labels


def masks_of(net, z):
    masks = net.draw_dropout(z)
    return dict(dropout_masks=masks) if masks else {}


@pytest.mark.parametrize("name", MAKERS)
def test_forward_mode_matches_finite_differences(name):
    net = shaken(MAKERS[name]).double()
    z, direction, t, r, labels = inputs(torch.float64)
    masks = masks_of(net, z)

    def u(z, t):
        return net(z, t, r, labels, **masks)

    out, tangent = torch.func.jvp(u, (z, t), (direction, torch.ones_like(t)))
    h = 1e-5
    numeric = (u(z + h * direction, t + h) - u(z - h * direction, t - h)) / (2 * h)
    torch.testing.assert_close(out, u(z, t))
    assert (tangent - numeric).abs().max() < 1e-6 * numeric.abs().max()


@pytest.mark.parametrize("name", MAKERS)
def test_a_row_answers_alike_alone_and_in_a_batch(name):
    net = shaken(MAKERS[name]).eval()
    z, direction, t, r, labels = inputs()

    def tangent(rows):
        def u(z, t):
            return net(z, t, r[rows], labels[rows])

        return torch.func.jvp(u, (z[rows], t[rows]), (direction[rows], torch.ones_like(t[rows])))[1]

    whole = tangent(torch.arange(3))
    assert (tangent(torch.tensor([2, 0])) - whole[[2, 0]]).abs().max() < 1e-4 * whole.abs().max()


SMALL = dict(HEADS, depth=1, head_depth=0, v_depth=None)
COMPILED = {
    "unet": lambda: AverageVelocity(model=SongUNet(**dict(UNET, channel_mult=[1], attn_resolutions=[]))),
    "mlp": MAKERS["mlp"],
    "dit": lambda: DiT(**IMAGE, width=32, depth=1, num_heads=4),
    "pmf": lambda: PixelMiT(**SMALL, patch_size=4, bottleneck=8),
}


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_the_tangent_compiles_into_one_graph(name):
    net = shaken(COMPILED[name])
    z, direction, t, r, labels = inputs()
    masks = masks_of(net, z)

    def both(z, t, r, direction):
        return torch.func.jvp(lambda z, t: net(z, t, r, labels, **masks), (z, t), (direction, torch.ones_like(t)))

    plain = both(z, t, r, direction)
    torch._dynamo.reset()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(z, t, r, direction)
    for a, b in zip(plain, compiled):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_lowers_the_inside_only(name):
    net = shaken(MAKERS[name])
    z, direction, t, r, labels = inputs()
    masks = masks_of(net, z)
    exact = net(z, t, r, labels, **masks)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(z, t, r, labels, **masks)
        _, tangent = torch.func.jvp(lambda z, t: net(z, t, r, labels, **masks), (z, t), (direction, torch.ones_like(t)))
    assert out.dtype == tangent.dtype == torch.float32
    assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", MAKERS)
def test_plans_on_fake_tensors(name):
    with FakeTensorMode():
        net = MAKERS[name]()
        z, t = torch.empty(2, 3, 8, 8), torch.empty(2)
        labels = torch.eye(4)[:2] if name in ("unet", "mlp") else torch.zeros(2, dtype=torch.int64)
        net(z, t, 0.5 * t, labels).sum().backward()
        out, tangent = torch.func.jvp(lambda z, t: net(z, t, 0.5 * t, labels), (z, t), (z, t))
    assert out.shape == tangent.shape == (2, 3, 8, 8)


# The wrapper ----------------------------------------------------------------------------------------------------------


def test_the_model_is_told_t_and_the_gap():
    model = MLPDenoiser(**IMAGE, out_channels=3, width=16, depth=1, num_times=2)
    net = shaken(lambda: AverageVelocity(model=model))
    z, _, t, r, labels = inputs()
    expected = model(z, torch.stack([t, t - r], dim=1), labels)
    assert torch.equal(net(z, t, r, labels), expected)
    assert torch.equal(net(z, 0.7, 0.2, labels), model(z, torch.tensor([[0.7, 0.7 - 0.2]]), labels))
    other = AverageVelocity(model=model, times=["r", "t"])
    assert torch.equal(other(z, t, r, labels), model(z, torch.stack([r, t], dim=1), labels))


def test_a_network_told_t_alone_is_a_velocity():
    model = MLPDenoiser(**IMAGE, out_channels=3, width=16, depth=1)
    net = shaken(lambda: AverageVelocity(model=model, times=["t"]))
    z, _, t, r, labels = inputs()
    assert torch.equal(net(z, t, None, labels), model(z, t, labels))
    assert torch.equal(net(z, t, r, labels), net(z, t, t, labels))


def test_what_the_runtime_reads():
    net = MAKERS["unet"]()
    assert (net.img_channels, net.img_resolution, net.label_dim, net.augment_dim) == (3, 8, 4, 0)
    assert net.raw is net.model
    z = inputs()[0]
    assert [m.shape for m in net.draw_dropout(z)] == [m.shape for m in net.model.draw_dropout(z)]


def test_equal_masks_give_equal_answers():
    net = shaken(MAKERS["unet"])
    z, _, t, r, labels = inputs()
    masks = net.draw_dropout(z)
    assert torch.equal(net(z, t, r, labels, dropout_masks=masks), net(z, t, r, labels, dropout_masks=masks))
    assert not torch.equal(net(z, t, r, labels), net(z, t, r, labels))


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="Set num_times of the network to 2"):
        AverageVelocity(model=MLPDenoiser(**IMAGE, out_channels=3, width=16, depth=1))
    with pytest.raises(UserError, match="3 in and 6 out"):
        AverageVelocity(model=MLPDenoiser(**IMAGE, out_channels=6, width=16, depth=1, num_times=2))
    with pytest.raises(UserError, match="need r"):
        MAKERS["mlp"]()(*inputs()[:1], 0.5)
