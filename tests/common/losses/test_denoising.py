import pytest
import torch
from torch import nn

from common.diffusion.precond import EDM2Precond, EDMPrecond
from common.diffusion.time import LogNormal
from common.errors import UserError
from common.losses.denoising import DenoisingLoss


class Raw(nn.Module):
    """Outputs gain * x; gain 0 is a fresh network."""

    img_resolution, in_channels, out_channels, label_dim, augment_dim = 4, 3, 3, 0, 0

    def __init__(self, gain=0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, dropout_masks=None):
        self.masks = dropout_masks
        return self.gain * x


def images(n, std=0.5):
    return std * torch.randn(n, 3, 4, 4)


def test_per_pixel_loss_is_about_one_at_the_start():
    y = images(4000)
    sigma = LogNormal()(4000)
    loss = DenoisingLoss(reduction="mean")(EDMPrecond(model=Raw()), y, sigma, torch.randn_like(y))
    assert loss.shape == (4000,) and abs(loss.mean() - 1) < 0.03


def test_weights_and_reductions_by_hand():
    y, noise, sigma = images(5), torch.randn(5, 3, 4, 4), torch.tensor([0.01, 0.1, 1.0, 5.0, 60.0])
    net = EDMPrecond(model=Raw(0.7))
    square = (net(y + noise * sigma.reshape(-1, 1, 1, 1), sigma) - y) ** 2
    weights = {"edm": (sigma**2 + 0.36) / (sigma * 0.6) ** 2, "inverse_variance": sigma**-2, "uniform": torch.ones(5)}
    for name, weight in weights.items():
        loss = DenoisingLoss(weight=name, sigma_data=0.6)
        torch.testing.assert_close(loss(net, y, sigma, noise), weight * square.flatten(1).sum(1))
        mean = DenoisingLoss(weight=name, sigma_data=0.6, reduction="mean")(net, y, sigma, noise)
        torch.testing.assert_close(mean, weight * square.flatten(1).mean(1))


def test_uncertainty_form_and_its_optimum():
    from common.nets.edm2 import EDM2UNet

    model = EDM2UNet(
        img_resolution=4, img_channels=3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[],
        channels_per_head=16,
    )  # fmt: skip
    net = EDM2Precond(model=model).eval()
    y, noise, sigma = images(6), torch.randn(6, 3, 4, 4), torch.logspace(-2, 1, 6)
    plain = DenoisingLoss()(net, y, sigma, noise)
    _, logvar = net(y, sigma, return_logvar=True)
    u, pixels = logvar.flatten(), 48
    got = DenoisingLoss(uncertainty=True)(net, y, sigma, noise)
    torch.testing.assert_close(got, plain / u.exp() + pixels * u)

    class Fixed:
        """A network whose u minimises plain / exp(u) + pixels u: u = ln(plain / pixels)."""

        def __init__(self, shift):
            self.shift = shift

        def __call__(self, x, sigma, return_logvar, **_):
            return net(x, sigma), (plain / pixels).log().reshape(-1, 1, 1, 1) + self.shift

    best, high, low = (DenoisingLoss(uncertainty=True)(Fixed(s), y, sigma, noise).detach() for s in (0.0, 0.1, -0.1))
    assert bool((best < high).all()) and bool((best < low).all())


def test_masks_reach_the_network():
    net, masks = EDMPrecond(model=Raw()), (torch.ones(2),)
    DenoisingLoss()(net, images(2), torch.ones(2), torch.randn(2, 3, 4, 4), dropout_masks=masks)
    assert net.model.masks is masks


@pytest.mark.parametrize("options", [{"weight": "snr"}, {"reduction": "max"}, {"sigma_data": -1.0}])
def test_bad_arguments(options):
    with pytest.raises(UserError, match=next(iter(options))):
        DenoisingLoss(**options)
