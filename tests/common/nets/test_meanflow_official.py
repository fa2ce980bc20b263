"""The networks of MeanFlow, iMF and pMF against the official ones, through numbers recorded from the official code.

tests/fixtures/nets/meanflow_official.json was made by running the official classes at the commits it names (the U-Net
in PyTorch, the transformers in JAX 0.4.34 on a CPU) at tiny sizes; both sides get weights and inputs by formula, so
none are stored. The parameter trees of published sizes are there too: names and shapes, each list of blocks once.
"""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from common.nets.average_velocity import AverageVelocity
from common.nets.dit import DiT
from common.nets.mit import MiT
from common.nets.unet import SongUNet
from common.weights.load import load_into
from common.weights.meanflow import official_state
from projects.pmf.network import PixelMiT

RECORD = json.loads((Path(__file__).parents[2] / "fixtures" / "nets" / "meanflow_official.json").read_text())

S, B, M, L, XL = (
    dict(width=width, depth=depth, num_heads=heads)
    for width, depth, heads in ((384, 12, 6), (768, 12, 12), (1024, 16, 16), (1024, 24, 16), (1152, 28, 16))
)
MIT = {"B": B, "M": dict(B, depth=24), "L": dict(L, depth=32), "XL": dict(L, depth=48)}
PMF = {"B": dict(B, depth=16), "L": MIT["L"], "H": dict(width=1280, depth=48, num_heads=16, bottleneck=256)}
PMF = {f"{size}_{p}": dict(kw, patch_size=p, img_resolution=16 * p) for size, kw in PMF.items() for p in (16, 32)}
CIFAR = dict(
    img_resolution=32, in_channels=3, out_channels=3, channel_mult=[2, 2, 2], channel_mult_noise=2, num_times=2,
    resample_filter=[1, 3, 3, 1],
)  # fmt: skip

# Parameter counts of the official classes.
COUNTS = {
    "MeanFlow U-Net aug 6": (partial(SongUNet, **CIFAR, augment_dim=6), 55_932_419),
    "MeanFlow U-Net aug 0": (partial(SongUNet, **CIFAR), 55_929_347),
    "DiT-S/4": (partial(DiT, **S, patch_size=4), 33_142_336),
    "DiT-B/4": (partial(DiT, **B, patch_size=4), 131_165_248),
    "DiT-B/2": (partial(DiT, **B), 131_091_472),
    "DiT-M/2": (partial(DiT, **M), 308_019_216),
    "DiT-L/2": (partial(DiT, **L), 459_137_040),
    "DiT-XL/2": (partial(DiT, **XL), 676_440_592),
    "plain DiT-S/2": (partial(DiT, **S, times=["t"], out_channels=8), 32_865_056),
    "plain DiT-B/2": (partial(DiT, **B, times=["t"], out_channels=8), 130_315_808),
    "plain DiT-L/2": (partial(DiT, **L, times=["t"], out_channels=8), 457_840_672),
    "plain DiT-XL/2": (partial(DiT, **XL, times=["t"], out_channels=8), 674_834_720),
    "plain DiT-B/4": (partial(DiT, **B, times=["t"], out_channels=8, patch_size=4), 130_426_496),
    "SiT-S/2": (partial(DiT, **S, times=["t"]), 32_858_896),
    "SiT-B/2": (partial(DiT, **B, times=["t"]), 130_303_504),
    "SiT-L/2": (partial(DiT, **L, times=["t"]), 457_824_272),
    "SiT-XL/2": (partial(DiT, **XL, times=["t"]), 674_816_272),
    "imf B training": (partial(MiT, **MIT["B"]), 145_596_960),
    "imf M training": (partial(MiT, **MIT["M"]), 230_570_016),
    "imf L training": (partial(MiT, **MIT["L"]), 509_752_352),
    "imf XL training": (partial(MiT, **MIT["XL"]), 711_113_760),
    # The released inference weights keep the last layer of the v-head: v_depth 0.
    "imf B inference": (partial(MiT, **MIT["B"], v_depth=0), 88_948_256),
    "imf M inference": (partial(MiT, **MIT["M"], v_depth=0), 173_921_312),
    "imf L inference": (partial(MiT, **MIT["L"], v_depth=0), 409_071_648),
    "imf XL inference": (partial(MiT, **MIT["XL"], v_depth=0), 610_433_056),
    "pmf B_16 training": (partial(PixelMiT, **PMF["B_16"]), 175_474_304),
    "pmf B_32 training": (partial(PixelMiT, **PMF["B_32"]), 179_312_768),
    "pmf L_16 training": (partial(PixelMiT, **PMF["L_16"]), 511_789_696),
    "pmf L_32 training": (partial(PixelMiT, **PMF["L_32"]), 516_807_808),
    "pmf H_16 training": (partial(PixelMiT, **PMF["H_16"]), 1_113_259_520),
    "pmf H_32 training": (partial(PixelMiT, **PMF["H_32"]), 1_119_752_192),
    "pmf B_16 inference": (partial(PixelMiT, **PMF["B_16"], v_depth=None), 118_234_240),
    "pmf B_32 inference": (partial(PixelMiT, **PMF["B_32"], v_depth=None), 120_300_928),
    "pmf L_16 inference": (partial(PixelMiT, **PMF["L_16"], v_depth=None), 410_320_768),
    "pmf L_32 inference": (partial(PixelMiT, **PMF["L_32"], v_depth=None), 412_977_280),
    "pmf H_16 inference": (partial(PixelMiT, **PMF["H_16"], v_depth=None), 954_956_032),
    "pmf H_32 inference": (partial(PixelMiT, **PMF["H_32"], v_depth=None), 958_497_280),
}
TINY = dict(img_resolution=8, in_channels=3, label_dim=5, depth=3, num_heads=4, width=48, head_depth=2, v_depth=2)
GOLDEN = {
    "meanflow": partial(DiT, **dict(img_resolution=8, in_channels=3, label_dim=5, depth=2, num_heads=4, width=32)),
    "imf": partial(MiT, **TINY),
    "pmf": partial(PixelMiT, **dict(TINY, img_resolution=16, patch_size=4)),
}


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    make, expected = COUNTS[name]
    assert sum(p.numel() for p in on_meta(make).parameters()) == expected


def test_the_official_code_counts_alike():
    for family in ("meanflow", "imf", "pmf"):
        for name, count in RECORD[family]["counts"].items():
            assert COUNTS[name if family == "meanflow" else f"{family} {name}"][1] == count


TREES = [(family, name) for family in ("meanflow", "imf", "pmf") for name in RECORD[family]["trees"]]


@pytest.mark.parametrize(("family", "name"), TREES)
def test_every_tensor_of_a_published_tree_has_its_place(family, name):
    record = RECORD[family]["trees"][name]
    tree = {}
    for path, shape in record["tree"].items():
        group = next((g for g in record["repeat"] if path.startswith(g)), None)
        names = [re.sub("_0/", f"_{i}/", path, count=1) for i in range(record["repeat"][group])] if group else [path]
        tree |= {n: torch.empty(shape, device="meta") for n in names}
    net = on_meta(COUNTS[name if family == "meanflow" else f"{family} {name}"][0])
    want = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in official_state(tree).items()} == want


# Values --------------------------------------------------------------------------------------------------------------


def noise(count: int, salt: int) -> torch.Tensor:
    """`count` float64 numbers in [-1, 1) from integer arithmetic: the same on every machine."""
    k = torch.arange(count, dtype=torch.int64) + 1
    return ((k * k % 65521 * 40503 + k * 7919 + salt * 30011) % 65521).double() / 65521 * 2 - 1


def tree_by_formula(shapes: dict) -> dict:
    """Weights for every path of an official tree; nothing is left at zero."""
    tree = {}
    for salt, (path, shape) in enumerate(sorted(shapes.items())):
        values = noise(torch.Size(shape).numel(), salt).view(shape)
        if path.endswith("kernel") and len(shape) > 1:
            values = values * (3 / torch.Size(shape[:-1]).numel()) ** 0.5
        elif "norm" in path:
            values = 0.8 + 0.2 * values
        elif path.endswith("bias"):
            values = 0.2 * values
        tree[path] = values.float()
    return tree


def inputs(size: int) -> dict:
    shape = (3, 3, size, size)
    count = torch.Size(shape).numel()
    return dict(
        z=(1.7 * noise(count, 1)).view(shape).float(),
        direction=noise(count, 2).view(shape).float(),
        t=torch.tensor([0.9, 0.5, 0.03]),
        r=torch.tensor([0.25, 0.5, 0.01]),
        labels=torch.tensor([0, 3, 5]),  # 5: no class
        guidance=(torch.tensor([1.0, 2.5, 7.0]), torch.tensor([0.0, 0.2, 0.4]), torch.tensor([1.0, 0.9, 0.6])),
    )


def few(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().flatten()[:: max(1, x.numel() // 16)][:16]


def close(got, expected, tolerance=2e-5):
    expected = torch.tensor(expected, dtype=torch.float64)
    got = torch.as_tensor(got, dtype=torch.float64)
    return (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", GOLDEN)
def test_values_tangents_and_gradients_equal_the_jax_ones(family):
    record = RECORD[family]["golden"]
    net = GOLDEN[family]()
    tree = tree_by_formula(record["tree"])
    load_into(net, official_state(tree))
    x = inputs(net.img_resolution)
    heads = "u" if family == "meanflow" else "both"
    more = () if family == "meanflow" else (*x["guidance"], heads)

    def call(z, t):
        out = net(z, t, x["r"], x["labels"], *more)
        return out if heads == "both" else (out,)

    outs, tangents = torch.func.jvp(call, (x["z"], x["t"]), (x["direction"], torch.ones(3)))
    for name, out, tangent in zip("uv", outs, tangents):
        for key, value in ((name, out), (f"d{name}", tangent)):
            assert close(few(value), record[key]), key
            assert close(value.double().abs().mean().item(), record[f"{key}_mean_abs"]), key
    z = x["z"].clone().requires_grad_()
    sum((out.flatten() * noise(out.numel(), 3 + i).float()).sum() for i, out in enumerate(call(z, x["t"]))).backward()
    assert close(few(z.grad), record["z_grad"])
    # Norms of the gradients, in the order of the official names: put each under its path and compare.
    grads = {name: p.grad for name, p in net.named_parameters()}
    places = {path: next(iter(official_state({path: torch.empty(shape)}))) for path, shape in record["tree"].items()}
    assert close([grads[places[path]].double().norm().item() for path in sorted(places)], record["grad_norms"])


def unet(**changes):
    return SongUNet(**dict(RECORD["unet"]["arguments"], **changes), num_times=2)


def test_unet_values_tangents_and_gradients_equal_the_official_ones():
    record = RECORD["unet"]["golden"]
    net = AverageVelocity(model=unet()).eval()
    official = {}
    for salt, (key, value) in enumerate(sorted(net.model.state_dict().items())):
        values = noise(value.numel(), salt).view(value.shape)
        if key.endswith("resample_filter"):
            values = value
        elif value.ndim >= 2:
            values = values * (3 / value[0].numel()) ** 0.5
        elif "norm" in key and key.endswith("weight"):
            values = 0.8 + 0.2 * values
        elif key.endswith("bias"):
            values = 0.2 * values
        official[key] = values.float()
    load_into(net, official_state(official))
    x = inputs(8)
    labels = noise(18, 5).view(3, 6).float()

    def call(z, t):
        return net(z, t, x["r"], augment_labels=labels)

    u, tangent = torch.func.jvp(call, (x["z"], x["t"]), (x["direction"], torch.ones(3)))
    for key, value in (("u", u), ("du", tangent)):
        assert close(few(value), record[key]) and close(value.double().abs().mean().item(), record[f"{key}_mean_abs"])
    z = x["z"].clone().requires_grad_()
    (call(z, x["t"]).flatten() * noise(u.numel(), 3).float()).sum().backward()
    assert close(few(z.grad), record["z_grad"])
    assert close([p.grad.double().norm().item() for _, p in sorted(net.model.named_parameters())], record["grad_norms"])


def test_unet_in_the_order_of_edm_would_be_another_network():
    weight = torch.arange(12.0).view(12, 1, 1, 1)
    moved = official_state({"enc.8x8_block0.qkv.weight": weight})["enc.8x8_block0.qkv.weight"]
    assert moved.flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_equal_seeds_give_the_official_unet():
    torch.manual_seed(0)
    values = [value.double().flatten() for _, value in sorted(unet().state_dict().items())]
    record = RECORD["unet"]["start"]
    torch.testing.assert_close([v.abs().mean().item() for v in values], record["mean_abs"], rtol=1e-6, atol=1e-7)
    got = sum((v @ noise(v.numel(), salt)).item() for salt, v in enumerate(values))
    torch.testing.assert_close(got, record["projection"], rtol=1e-6, atol=1e-7)
