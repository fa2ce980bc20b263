import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from common.diffusion.precond import (
    ECMPrecond,
    EDM2Precond,
    EDMPrecond,
    IDDPMPrecond,
    VEPrecond,
    VPPrecond,
    iddpm_levels,
)
from common.diffusion.sample import Multistep
from common.errors import UserError

ALL = {"edm": EDMPrecond, "ecm": ECMPrecond, "vp": VPPrecond, "ve": VEPrecond, "iddpm": IDDPMPrecond}


class Raw(nn.Module):
    """A raw network with the house signature that remembers what it was given."""

    augment_dim = 0

    def __init__(self, label_dim=0, out=3):
        super().__init__()
        self.img_resolution, self.in_channels, self.out_channels, self.label_dim = 4, 3, out, label_dim
        self.mix = nn.Conv2d(3, out, 3, padding=1)

    def draw_dropout(self, x, generator=None):
        return (torch.ones(x.shape[0], dtype=torch.bool),)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, dropout_masks=None):
        self.seen = (x, noise_labels, class_labels, augment_labels, dropout_masks)
        weight, bias = self.mix.weight.to(x.dtype), self.mix.bias.to(x.dtype)
        return nn.functional.conv2d(x, weight, bias, padding=1) + noise_labels.to(x.dtype).reshape(-1, 1, 1, 1)


def build(name, **options):
    return ALL[name](model=Raw(out=6 if name == "iddpm" else 3, **options))


SIGMA = torch.tensor([0.003, 0.05, 0.5, 2.0, 20.0, 80.0])


@pytest.mark.parametrize("name", ["edm", "ecm"])
def test_edm_identities(name):
    """c_in^2 (sigma^2 + sd^2) = 1, lambda c_out^2 = 1, c_skip^2 sigma^2 + (1 - c_skip)^2 sd^2 = c_out^2 (EDM B.6)."""
    net, sd = ALL[name](model=Raw(), sigma_data=0.7).train(), 0.7
    sigma = SIGMA.double()
    c_skip, c_out, c_in, c_noise = net.coefficients(sigma)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c_in**2 * (sigma**2 + sd**2), one)
    torch.testing.assert_close(weight * c_out**2, one)
    torch.testing.assert_close(c_skip**2 * sigma**2 + (1 - c_skip) ** 2 * sd**2, c_out**2)
    torch.testing.assert_close(c_noise, sigma.log() / 4)


@pytest.mark.parametrize("name", ALL)
def test_forward_is_the_definition_for_every_shape_of_sigma(name):
    net = build(name)
    x = torch.randn(6, 3, 4, 4)
    c_skip, c_out, c_in, c_noise = net.coefficients(SIGMA.reshape(6, 1, 1, 1))
    raw = net.model(c_in * x, c_noise.flatten())[:, :3]
    expected = c_skip * x + c_out * raw
    torch.testing.assert_close(net(x, SIGMA), expected)
    torch.testing.assert_close(net(x, SIGMA.reshape(6, 1, 1, 1)), expected)
    torch.testing.assert_close(net(x.double(), SIGMA.double()), expected)
    assert net(x.double(), SIGMA.double()).dtype == torch.float32
    one = net(x, torch.full((6,), 2.0))
    for sigma in (2.0, torch.tensor(2.0), torch.tensor([2.0])):
        assert torch.equal(net(x, sigma), one)
    assert net.model.seen[1].shape == (6,)


def test_float64_weights_compute_in_float64():
    net = build("edm").double()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    assert net(x, SIGMA).dtype == torch.float64
    assert net.model.seen[0].dtype == torch.float64


def test_ecm_boundary_is_exact_in_eval_mode_only():
    net = build("ecm")
    x = torch.randn(5, 3, 4, 4)
    for sigma in (0.003, torch.full((5,), 0.003), torch.full((5,), 0.003, dtype=torch.float64)):
        assert torch.equal(net.eval()(x, sigma), x)
    assert not torch.equal(net.train()(x, 0.003), x)
    edm = EDMPrecond(model=net.model)
    assert torch.equal(net.train()(x, 2.0), edm(x, 2.0))
    shifted = net.eval()(x, 2.0)
    above = 2.0 - 0.003
    c_skip = 0.25 / (above**2 + 0.25)
    c_out = above * 0.5 / math.sqrt(4.25)
    raw = net.model(x / math.sqrt(4.25), torch.full((5,), math.log(2.0) / 4))
    torch.testing.assert_close(shifted, c_skip * x + c_out * raw)


def test_vp_noise_labels_run_over_the_ddpm_timesteps():
    net = build("vp")
    assert net.sigma_max == pytest.approx(152.167, abs=1e-2) and net.sigma_min == pytest.approx(1e-3, rel=1e-3)
    sigma = torch.tensor([net.sigma_min, net.sigma_max], dtype=torch.float64)
    torch.testing.assert_close(net.coefficients(sigma)[3], torch.tensor([999e-5, 999.0], dtype=torch.float64))


def test_iddpm_rounds_to_its_table():
    net = build("iddpm")
    levels = torch.tensor(iddpm_levels())
    assert levels.shape == (1001,) and levels[-1] == 0 and bool((levels[:-1] > levels[1:]).all())
    assert net.sigma_max == pytest.approx(20291.17, rel=1e-6) and net.sigma_min == pytest.approx(0.0064254, rel=1e-4)
    assert net.levels() == iddpm_levels()[:-1]
    picked = net.u[[3, 500, 990]]
    torch.testing.assert_close(net.round_sigma(picked * 1.00001), picked)
    assert net.coefficients(picked)[3].tolist() == [999 - 3, 999 - 500, 999 - 990]
    assert "u" in net.state_dict()


def by_formula(count, salt):
    """`count` float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(count, dtype=torch.int64) + 1
    return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_official_outputs(name, repo):
    """D(x; sigma) of the official classes around sin(3 x + c_noise / 7): all four constants of table 1."""

    class Sine(Raw):
        def forward(self, x, noise_labels, class_labels=None, augment_labels=None, dropout_masks=None):
            out = torch.sin(3 * x + noise_labels.reshape(-1, 1, 1, 1) / 7)
            return out.repeat(1, self.out_channels // 3, 1, 1)

    recorded = json.loads((repo / "tests/fixtures/diffusion/edm_official.json").read_text())["precond"][name]
    net = ALL[name](model=Sine(out=6 if name == "iddpm" else 3))
    sigma = torch.tensor([0.02, 0.11, 0.5, 2.0, 20.0, 80.0])
    x = 1.7 * by_formula(18, 1).reshape(6, 3, 1, 1).float() * (1 + sigma.reshape(-1, 1, 1, 1))
    out = net(x, net.round_sigma(sigma) if name == "iddpm" else sigma)
    torch.testing.assert_close(out, torch.tensor(recorded).reshape(6, 3, 1, 1), rtol=1e-4, atol=1e-4)


def test_labels_masks_and_properties_pass_through():
    net = EDMPrecond(model=Raw(label_dim=10))
    x, masks = torch.randn(2, 3, 4, 4), (torch.ones(2, dtype=torch.bool),)
    labels, augment = torch.eye(10)[:2].long(), torch.zeros(2, 9)
    net(x, 1.0, class_labels=labels, augment_labels=augment, dropout_masks=masks)
    assert torch.equal(net.model.seen[2], labels.float()) and net.model.seen[3] is augment
    assert net.model.seen[4] is masks
    net(x, 1.0)
    assert torch.equal(net.model.seen[2], torch.zeros(1, 10))
    build("edm")(x, 1.0, class_labels=labels)  # an unconditional network ignores labels, as the official one does
    assert (net.img_resolution, net.img_channels, net.label_dim) == (4, 3, 10)
    assert torch.equal(net.draw_dropout(x)[0], masks[0])
    assert set(net.state_dict()) == {"model.mix.weight", "model.mix.bias"}
    with pytest.raises(UserError, match=r"one-hot of shape \(B, 10\), got \(2,\)"):
        net(x, 1.0, class_labels=torch.tensor([1, 2]))


def test_reduced_precision_runs_only_the_raw_network():
    net = EDMPrecond(model=Raw(), dtype="bfloat16")
    x = torch.randn(6, 3, 4, 4)
    full = EDMPrecond(model=net.model)(x, SIGMA)
    out = net(x, SIGMA)
    assert net.model.seen[0].dtype == torch.bfloat16 and net.model.seen[1].dtype == torch.float32
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full, rtol=0.02, atol=0.05)
    EDMPrecond(model=net.model, dtype="float16")(x, SIGMA)
    assert net.model.seen[0].dtype == torch.float32  # float16 acts on CUDA devices only
    with torch.autocast("cpu", torch.bfloat16):
        assert EDMPrecond(model=net.model)(x, SIGMA).dtype == torch.float32


def test_edm2_head_and_weight_norm():
    from common.nets.edm2 import EDM2UNet

    model = EDM2UNet(img_resolution=8, img_channels=3, label_dim=4, model_channels=16, channel_mult=[1], num_blocks=1,
                     attn_resolutions=[], channels_per_head=16)  # fmt: skip
    net = EDM2Precond(model=model)
    head = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in model.parameters())
    assert head == 128
    keys = {key for key in net.state_dict() if not key.startswith("unet.")}
    assert keys == {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"}
    x = torch.randn(6, 3, 8, 8)
    denoised, logvar = net.eval()(x, SIGMA, return_logvar=True)
    assert logvar.shape == (6, 1, 1, 1) and torch.equal(denoised, net(x, SIGMA)) and denoised.shape == x.shape
    bare = EDM2Precond(model=model, logvar_channels=0)
    assert all(key.startswith("unet.") for key in bare.state_dict())
    with pytest.raises(UserError, match="logvar_channels=128"):
        bare(x, 1.0, return_logvar=True)

    # normalising once and then not touching the weights is what one official training pass does
    twin = EDM2UNet(img_resolution=8, img_channels=3, label_dim=4, model_channels=16, channel_mult=[1], num_blocks=1,
                    attn_resolutions=[], channels_per_head=16)  # fmt: skip
    twin.load_state_dict(model.state_dict())
    for parameters in (model.parameters(), twin.parameters()):
        torch.manual_seed(1)
        for p in parameters:
            p.data.add_(0.1 * torch.randn_like(p))
    plain = EDM2Precond(model=twin, logvar_channels=0).train()(x, SIGMA)
    bare.train()
    with bare.weights_normalized_once():
        first, second = bare(x, SIGMA), bare(x, SIGMA)
    assert torch.equal(first, second) and torch.equal(first, plain)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a, b)
    before = model.state_dict()["out_conv.weight"].clone()
    with bare.eval().weights_normalized_once():
        bare(x, SIGMA)
    assert torch.equal(before, model.out_conv.weight)


def test_a_consistency_model_on_edm2_normalises_once_too():
    """ECT on ImageNet-64 wraps the EDM2 network in ECMPrecond; both passes of a step must see the same weights."""
    from common.nets.edm2 import EDM2UNet

    model = EDM2UNet(img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1], num_blocks=1,
                     attn_resolutions=[], channels_per_head=16)  # fmt: skip
    net = ECMPrecond(model=model).train()
    conv = model.enc["8x8_conv"]
    conv.weight.data.mul_(3)
    with net.weights_normalized_once():
        kept = conv.weight.clone()
        net(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]))
        assert torch.equal(kept, conv.weight) and not conv.forced
    assert conv.forced
    size = kept.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(size, torch.ones_like(size), atol=1e-3, rtol=0)


def test_ecm_without_shift_is_edm_in_both_modes():
    """sigma_min = 0 in ECT's ImageNet branch: two-step samples are those of plain EDM scalings."""
    raw = Raw()
    shifted, plain, edm = (
        make(model=raw).eval() for make in (ECMPrecond, partial(ECMPrecond, sigma_min=0.0), EDMPrecond)
    )
    z, two = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), Multistep(mids=[1.526])
    samples = [two(net, z, lambda k: z.flip(0)) for net in (shifted, plain, edm)]
    assert torch.equal(samples[1], samples[2])
    assert 1e-4 < (samples[0] - samples[2]).abs().max() < 0.1
    for training in (True, False):
        for ours, theirs in zip(plain.train(training).coefficients(SIGMA), edm.coefficients(SIGMA)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build("edm")(torch.zeros(1, 3, 4, 4), -1.0), "negative sigma: sigma must be > 0, got -1.0"),
        (lambda: build("edm")(torch.zeros(1, 3, 4, 4), 0), "sigma must be > 0, got 0"),
        (lambda: ECMPrecond(model=Raw(), sigma_min=-0.1), "sigma_min must be >= 0, got -0.1"),
        (lambda: VEPrecond(model=Raw(), sigma_min=-0.1), "negative sigma: sigma_min"),
        (lambda: EDMPrecond(model=Raw(), sigma_min=1.0, sigma_max=0.5), "sigma_max must be > 1"),
        (lambda: EDMPrecond(model=Raw(), sigma_data=0), "sigma_data must be > 0"),
        (lambda: EDMPrecond(model=Raw(), dtype="fp16"), "dtype must be one of .* Closest: float16"),
        (lambda: VPPrecond(model=Raw(), M=0), "M must be a whole number >= 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
