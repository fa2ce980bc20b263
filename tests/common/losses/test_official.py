"""The losses against numbers recorded from the official EDM, EDM2 and ECT code: same weights, images and stream."""

import json

import pytest
import torch

from common.diffusion.precond import ECMPrecond, EDM2Precond
from common.diffusion.time import LogNormal, LogUniform, VPSigma
from common.losses.consistency import ConsistencyLoss
from common.losses.denoising import DenoisingLoss
from common.nets.edm2 import EDM2UNet
from common.nets.unet import SongUNet


def by_formula(count, salt):
    """`count` float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(count, dtype=torch.int64) + 1
    return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1


def weights_by_formula(net):
    for salt, (key, value) in enumerate(sorted(net.state_dict().items())):
        values = by_formula(value.numel(), salt).view(value.shape)
        if key.endswith("resample_filter"):
            continue
        if value.ndim >= 2:
            values = values * (3 / value[0].numel()) ** 0.5
        elif value.ndim == 0 or ("norm" in key and key.endswith("weight")):
            values = 0.8 + 0.2 * values
        elif key.endswith("bias"):
            values = 0.2 * values
        value.copy_(values)


PICTURES = (0.9 * by_formula(6 * 48, 4)).view(6, 3, 4, 4).float()


def official_numbers(repo):
    return json.loads((repo / "tests/fixtures/losses/edm_official.json").read_text())


@pytest.mark.parametrize(
    "name, time, weight",
    [("edm", LogNormal(), "edm"), ("ve", LogUniform(), "inverse_variance"), ("vp", VPSigma(), "inverse_variance")],
)
def test_official_losses(name, time, weight, repo):
    """EDMLoss, VELoss and VPLoss of the official code on one stream: noise levels, noise and weighting."""

    def denoiser(x, sigma, **_):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + 0.25
        return 0.25 / total * x + 0.5 * sigma / total.sqrt() * torch.sin(3 * x / total.sqrt() + sigma.log() / 4)

    torch.manual_seed(21)
    sigma = time(6)
    loss = DenoisingLoss(weight=weight)(denoiser, PICTURES, sigma, torch.randn_like(PICTURES))
    torch.testing.assert_close(loss, torch.tensor(official_numbers(repo)[name]), rtol=1e-5, atol=0)


def test_official_edm2_loss_and_uncertainty(repo):
    """EDM2Loss and Precond of the official code, same weights: a training pass, then D and u in evaluation."""
    model = EDM2UNet(
        img_resolution=4, img_channels=3, label_dim=4, model_channels=16, channel_mult=[1], num_blocks=1,
        attn_resolutions=[], channels_per_head=16,
    )  # fmt: skip
    net = EDM2Precond(model=model).train()
    weights_by_formula(net)
    official, labels = official_numbers(repo), torch.eye(4)[torch.arange(6) % 4]
    torch.manual_seed(21)
    sigma = LogNormal(mean=-0.8, std=1.6)(6)
    noise = torch.randn_like(PICTURES)
    loss = DenoisingLoss(uncertainty=True)(net, PICTURES, sigma, noise, class_labels=labels)
    torch.testing.assert_close(loss.detach(), torch.tensor(official["edm2"]), rtol=1e-5, atol=0)
    sigma = torch.tensor([0.003, 0.05, 0.5, 2.0, 20.0, 80.0])
    denoised, logvar = net.eval()(PICTURES, sigma, labels, return_logvar=True)
    torch.testing.assert_close(logvar.flatten(), torch.tensor(official["edm2_logvar"]), rtol=1e-5, atol=1e-5)
    seen = denoised.flatten(1)[:, ::13].flatten()
    torch.testing.assert_close(seen, torch.tensor(official["edm2_denoised"]), rtol=1e-5, atol=1e-5)


def test_official_ect_loss_with_its_network(repo):
    """The official loss, preconditioner and DDPM++ network, same weights, same stream: t, eps and dropout masks."""
    raw = SongUNet(
        img_resolution=8, in_channels=3, out_channels=3, label_dim=4, model_channels=8, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[4], dropout=0.2, embedding_type="positional", channel_mult_noise=1,
        encoder_type="standard", decoder_type="standard", resample_filter=[1, 1],
    )  # fmt: skip
    weights_by_formula(raw)
    net = ECMPrecond(model=raw).train()
    y = by_formula(12 * 3 * 64, 7).view(12, 3, 8, 8).float()
    labels = torch.eye(4)[torch.arange(12) % 4]
    stored = json.loads((repo / "tests/fixtures/losses/ect_official_network.json").read_text())
    assert [case["stage"] for case in stored["stages"]] == [0, 1, 2, 7]
    for case in stored["stages"]:
        torch.manual_seed(11)
        t = LogNormal(mean=-1.1, std=2.0)(12)
        eps = torch.randn_like(y)
        masks = net.draw_dropout(y)
        loss = ConsistencyLoss(official=True)
        losses = loss(net, y, t, eps, stage=case["stage"], class_labels=labels, dropout_masks=masks)
        # |D_t - D_r| / gap over n values: each pass rounds every value of size 1 to one float32 unit, independently,
        # and the sum of n squares adds half a unit per term
        gap, n, unit = t - loss.t_to_r(t, case["stage"]), y[0].numel(), torch.finfo(torch.float32).eps
        expected = torch.tensor(case["loss"])
        allowed = (2 * n) ** 0.5 * unit / gap + 0.5 * n * unit * expected
        assert ((losses.detach() - expected).abs() <= allowed).all()
        net.zero_grad()
        losses.mean().backward()
        norm = sum(p.grad.double().square().sum() for p in net.parameters()).sqrt()
        assert norm.item() == pytest.approx(case["gradient_norm"], rel=1e-4)
