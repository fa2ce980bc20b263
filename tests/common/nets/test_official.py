"""Our networks against the official EDM and EDM2 ones, through numbers recorded from the official code.

tests/fixtures/nets/official.json was made by running the official classes at the commits it names; `weights_by_formula`
and `inputs_by_formula` below gave both sides the same weights and inputs without storing any.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from common.nets.edm2 import SIZES, EDM2UNet
from common.nets.unet import DhariwalUNet, SongUNet

RECORD = json.loads((Path(__file__).parents[2] / "fixtures" / "nets" / "official.json").read_text())
NETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet, "UNet": EDM2UNet}

# Parameter counts of the official classes.
PARAMETERS = {
    "ddpmpp_32_aug9": 55_733_891,
    "ddpmpp_32_aug0": 55_732_739,
    "ddpmpp_32_aug9_10classes": 55_735_299,
    "ncsnpp_32_aug9": 56_397_827,
    "ddpmpp_64_aug9": 61_805_571,
    "ncsnpp_64_aug9": 62_761_091,
    "adm_64_1000classes": 295_899_267,
    "edm2_64_xxs": 31_307_749,
    "edm2_64_xs": 124_710_821,
    "edm2_64_s": 280_209_253,
    "edm2_64_m": 497_803_045,
    "edm2_64_l": 777_492_197,
    "edm2_64_xl": 1_119_276_709,
    "edm2_64_xxl": 1_523_156_581,
    "edm2_latent_xxs": 31_308_901,
    "edm2_latent_xs": 124_713_125,
    "edm2_latent_s": 280_212_709,
    "edm2_latent_m": 497_807_653,
    "edm2_latent_l": 777_497_957,
    "edm2_latent_xl": 1_119_283_621,
    "edm2_latent_xxl": 1_523_164_645,
}


def noise(count: int, salt: int) -> torch.Tensor:
    """`count` float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(count, dtype=torch.int64) + 1
    return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1


def weights_by_formula(net: torch.nn.Module) -> None:
    """Overwrite every weight and buffer except the resampling filters; no layer is left at zero."""
    for salt, (key, value) in enumerate(sorted(net.state_dict().items())):
        values = noise(value.numel(), salt).view(value.shape)
        if key.endswith("resample_filter"):
            continue
        if value.ndim >= 2:
            values = values * (3 / value[0].numel()) ** 0.5
        elif value.ndim == 0 or ("norm" in key and key.endswith("weight")):
            values = 0.8 + 0.2 * values
        elif key.endswith("bias"):
            values = 0.2 * values
        value.copy_(values)


def inputs_by_formula(arguments: dict) -> dict:
    """x, noise_labels, class_labels, augment_labels for a batch of three."""
    res, channels = arguments["img_resolution"], arguments.get("in_channels", arguments.get("img_channels"))
    label_dim, augment_dim = arguments.get("label_dim", 0), arguments.get("augment_dim", 0)
    return dict(
        x=(1.7 * noise(3 * channels * res * res, 1)).view(3, channels, res, res).float(),
        noise_labels=torch.tensor([-1.5, 0.1, 1.1]),
        class_labels=torch.eye(label_dim)[[0, label_dim - 1, 1]] if label_dim else None,
        augment_labels=noise(3 * augment_dim, 2).view(3, augment_dim).float() if augment_dim else None,
    )


def measure(net: torch.nn.Module, arguments: dict, train: bool) -> dict:
    """Numbers that pin one forward and backward pass."""
    weights_by_formula(net)
    net.train(train)
    inputs = inputs_by_formula(arguments)
    if inputs["augment_labels"] is None:
        del inputs["augment_labels"]
    x = inputs.pop("x").requires_grad_()
    out = net(x, **inputs)
    (out * noise(out.numel(), 3).view(out.shape).float()).sum().backward()
    every = out.numel() // 16
    return {
        "output": out.detach().flatten()[::every][:16].tolist(),
        "output_mean_abs": out.detach().double().abs().mean().item(),
        "grad_x": x.grad.flatten()[::every][:16].tolist(),
        "grad_norms": [p.grad.double().norm().item() for _, p in sorted(net.named_parameters())],
        "weight_mean_abs": sum(p.detach().double().abs().mean().item() for p in net.parameters()),
    }


def start(kind: type, arguments: dict) -> dict:
    """Numbers that pin a fresh network: they show the distributions and the order of the random draws."""
    torch.manual_seed(0)
    state = sorted(kind(**arguments).state_dict().items())
    values = [value.double().flatten() for _, value in state]
    return {
        "mean_abs": [v.abs().mean().item() for v in values],
        "projection": sum((v @ noise(v.numel(), salt)).item() for salt, v in enumerate(values)),
    }


def fingerprint(net: torch.nn.Module) -> dict:
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items())
    return {"count": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


@pytest.mark.parametrize("config", PARAMETERS)
def test_parameter_count_and_state_dict_keys_are_official(config):
    recorded = RECORD["keys"][config]
    with torch.device("meta"):
        net = NETS[recorded["net"]](**recorded["arguments"])
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[config]
    assert fingerprint(net) == {"count": recorded["count"], "sha256": recorded["sha256"]}


def test_published_edm2_sizes_are_the_recorded_ones():
    for size, channels in SIZES.items():
        assert RECORD["keys"][f"edm2_64_{size}"]["arguments"]["model_channels"] == channels


@pytest.mark.parametrize("config", RECORD["golden"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward_and_gradients_equal_the_official_ones(config, mode):
    recorded = RECORD["golden"][config]
    got = measure(NETS[recorded["net"]](**recorded["arguments"]), recorded["arguments"], mode == "train")
    for name, expected in recorded[mode].items():
        expected = torch.tensor(expected, dtype=torch.float64)
        scale = expected.abs().max()
        error = (torch.tensor(got[name], dtype=torch.float64) - expected).abs().max() / scale
        assert error < 1e-5, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("config", RECORD["golden"])
def test_equal_seeds_give_the_official_initial_weights(config):
    recorded = RECORD["golden"][config]
    got = start(NETS[recorded["net"]], recorded["arguments"])
    for name, expected in recorded["start"].items():
        torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(expected), rtol=1e-6, atol=1e-7)
