"""u and v of one raw network: what conditions it, how its channels are split, what a head's image means, bad input."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.nets.mlp import MLPDenoiser
from common.nets.two_head import TwoHeadVelocity

IMAGE = dict(img_resolution=4, in_channels=2)


class Raw(nn.Module):
    """Remembers its call; answers its input times 1, and times 2 in a second half of the channels."""

    img_resolution, in_channels, label_dim = 4, 2, 3

    def __init__(self, num_times: int, out_channels: int):
        super().__init__()
        self.num_times, self.out_channels = num_times, out_channels

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, dropout_masks=None):
        self.conditions, self.labels, self.masks = noise_labels, class_labels, dropout_masks
        return torch.cat([x, 2 * x], dim=1)[:, : self.out_channels]


def z(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(0))


T, R = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.4, 0.5, 0.0])


def test_the_network_is_told_times_and_guidance_in_order():
    raw, masks = Raw(num_times=5, out_channels=4), (torch.ones(3, 4),)
    net = TwoHeadVelocity(model=raw, times=["t", "t-r"], guided=True)
    labels, omega = torch.eye(3), torch.tensor([1.0, 2.0, 4.0])
    net(z(), T, R, labels, omega=omega, t_min=0.2, t_max=torch.tensor([0.6, 0.7, 0.8]), dropout_masks=masks)
    expected = torch.stack([T, T - R, 1 - 1 / omega, torch.full((3,), 0.2), torch.tensor([0.6, 0.7, 0.8])], dim=1)
    torch.testing.assert_close(raw.conditions, expected)
    assert raw.labels is labels and raw.masks is masks
    alone = TwoHeadVelocity(model=Raw(num_times=1, out_channels=2), times=["t-r"])
    alone(z(), T, R, omega=8.0)
    torch.testing.assert_close(alone.model.conditions, T - R)  # not guided: the scale goes nowhere


def test_heads_are_halves_of_the_channels():
    net = TwoHeadVelocity(model=Raw(num_times=2, out_channels=4))
    u, v = net(z(), T, R, heads="both")
    assert torch.equal(u, z()) and torch.equal(v, 2 * z())
    assert torch.equal(net(z(), T, R), u) and torch.equal(net(z(), T, R, heads="v"), v)
    assert net(z().double(), T, R).dtype == torch.float64


def test_an_image_predicted_is_a_velocity_with_the_time_clipped():
    """u = (z - x) / max(t, t_floor); the second head's image is 2 z."""
    net = TwoHeadVelocity(model=Raw(num_times=2, out_channels=4), prediction="x", t_floor=0.4)
    u, v = net(z(), T, R, heads="both")
    assert not u.any()
    torch.testing.assert_close(v, -z() / T.clamp(min=0.4).view(-1, 1, 1, 1))


def test_the_derivative_by_t_passes_through_every_time_told():
    torch.manual_seed(0)
    model = MLPDenoiser(**IMAGE, out_channels=4, width=16, depth=1, num_times=5)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    net = TwoHeadVelocity(model=model, guided=True).double()
    x, t, r, h = z().double(), T.double(), R.double(), 1e-6
    ask = lambda t: net(x, t, r, omega=3.0, t_min=0.1, t_max=0.9)
    _, slope = torch.func.jvp(ask, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, (ask(t + h) - ask(t - h)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_what_the_samplers_ask_for():
    net = TwoHeadVelocity(model=Raw(num_times=2, out_channels=4))
    assert (net.img_resolution, net.img_channels, net.label_dim, net.raw) == (4, 2, 3, net.model)
    drop = TwoHeadVelocity(model=MLPDenoiser(**IMAGE, out_channels=2, width=8, depth=2, dropout=0.5, num_times=2))
    masks = drop.draw_dropout(z(), torch.Generator().manual_seed(0))
    assert len(masks) == 2 and torch.equal(drop(z(), T, R, dropout_masks=masks), drop(z(), T, R, dropout_masks=masks))


@pytest.mark.parametrize("make, message", [
    (lambda: TwoHeadVelocity(model=Raw(2, 4), guided=True), "on 5 numbers .* but takes 2. Set num_times"),
    (lambda: TwoHeadVelocity(model=Raw(2, 3)), "out_channels must be in_channels=2 for u alone or twice that"),
    (lambda: TwoHeadVelocity(model=Raw(2, 2), prediction="v"), "prediction must be one of u, x"),
    (lambda: TwoHeadVelocity(model=Raw(2, 2), t_floor=0.0), "t_floor must be > 0"),
    (lambda: TwoHeadVelocity(model=Raw(2, 2), times=["t", "t"]), "times must name t, r or t-r, each once"),
    (lambda: TwoHeadVelocity(model=Raw(2, 2))(z(), T, R, heads="v"), "this network has no v-head"),
    (lambda: TwoHeadVelocity(model=Raw(2, 4))(z(), T, R, heads="w"), "heads must be one of u, v, both"),
])  # fmt: skip
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()
