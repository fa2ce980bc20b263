import pytest
import torch

from common.errors import UserError
from projects.pmf.network import PixelMiT

TINY = dict(img_resolution=8, in_channels=3, patch_size=4, bottleneck=6, width=32, depth=3, num_heads=4, head_depth=2,
            v_depth=1, label_dim=4)  # fmt: skip


def shaken(**changes):
    torch.manual_seed(0)
    net = PixelMiT(**dict(TINY, **changes))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def inputs(t=(0.9, 0.5, 0.03)):
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return z, torch.tensor(t), torch.tensor([0.1, 0.5, 0.01]), torch.tensor([0, 3, 4])


def test_a_fresh_network_predicts_a_grey_image():
    z, t, r, labels = inputs()
    floor = t.clamp(min=0.05).view(-1, 1, 1, 1)
    for velocity in PixelMiT(**TINY)(z, t, r, labels, heads="both"):
        torch.testing.assert_close(velocity, z / floor)


def test_velocity_and_image_imply_each_other_above_the_floor():
    z, t, r, labels = inputs()
    x_net, u_net = shaken(), shaken(prediction="u")
    u, image = (
        x_net(z, t, r, labels),
        u_net(z, t, r, labels),
    )  # equal weights: what u_net returns is the image x_net has
    torch.testing.assert_close((z - t.view(-1, 1, 1, 1) * u)[:2], image[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((z - 0.05 * u)[2], image[2], rtol=1e-5, atol=1e-5)


def test_one_step_from_noise_is_the_predicted_image():
    z, _, _, labels = inputs()
    sample = z - shaken()(z, 1.0, 0.0, labels)
    torch.testing.assert_close(sample, shaken(prediction="u")(z, 1.0, 0.0, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [0.03, 0.06])
def test_the_tangent_passes_through_the_conversion(low):
    """On either side of the floor t = 0.05; there the denominator stops moving."""
    net = shaken().double()
    z, t, r, labels = inputs((0.9, 0.5, low))
    z, t, r = z.double(), t.double(), r.double()
    direction = torch.randn_like(z)

    def u(z, t):
        return net(z, t, r, labels)

    _, tangent = torch.func.jvp(u, (z, t), (direction, torch.ones_like(t)))
    h = 1e-6
    numeric = (u(z + h * direction, t + h) - u(z - h * direction, t - h)) / (2 * h)
    assert (tangent - numeric).abs().max() < 1e-6 * numeric.abs().max()


def test_the_network_itself_hears_the_gap_alone():
    net = shaken(prediction="u")
    z, t, r, labels = inputs()
    torch.testing.assert_close(net(z, t + 0.05, r + 0.05, labels), net(z, t, r, labels), rtol=1e-4, atol=1e-5)


def test_positions_are_learned_for_prefix_and_patches():
    net = PixelMiT(**TINY)
    assert net.prefix_length == 20 and net.num_patches == 4
    assert net.pos_embed.shape == (1, 24, 32)
    assert torch.equal(net.rope_cos[:20], torch.ones(20, 4)) and not net.rope_sin[:20].any()
    assert net.rope_sin[20:].any()


def test_bad_options_are_named():
    with pytest.raises(UserError, match="prediction must be one of x, u"):
        PixelMiT(**dict(TINY, prediction="v"))
    with pytest.raises(UserError, match="heads of a multiple of 4"):
        PixelMiT(**dict(TINY, width=24))
    with pytest.raises(UserError, match="bottleneck"):
        PixelMiT(**dict(TINY, bottleneck=0))
