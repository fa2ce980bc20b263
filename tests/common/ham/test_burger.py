"""The published blocks: sizes, the release's numbers, zero-ham."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from common.ham.burger import Hamburger
from common.ham.decompose import CD, NMF, VQ
from common.ham.official import from_official

# Outputs of the released code (seg/HamNet; seg_light_ham for "light") in double precision, with its weights and the
# bases it drew: Hamburger(4, channels 6, r 3, 6 steps, 1/T 10), evaluation mode, V2+ dual with a = 1; V2+/VQ not dual.
OFFICIAL = Path(__file__).resolve().parents[2] / "fixtures" / "ham" / "official.npz"
RULES = {"NMF": NMF(rank=3), "VQ": VQ(rank=3, inv_t=10.0), "CD": CD(rank=3, inv_t=10.0)}


def entries(tag):
    with np.load(OFFICIAL) as file:
        return {name[len(tag) + 1 :]: torch.from_numpy(file[name]) for name in file.files if name.startswith(tag + "/")}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("version, parameters", [("v1", 525_824), ("v2", 787_968), ("v2plus", 787_970)])
@pytest.mark.parametrize("ham", [NMF(), VQ(), CD()], ids=["nmf", "vq", "cd"])
def test_parameter_counts_of_the_released_code(version, parameters, ham):
    with torch.device("meta"):
        assert count(Hamburger(512, 512, version=version, ham=ham)) == parameters


@pytest.mark.parametrize("tag", ["V1/NMF", "V1/CD", "V2/NMF", "V2/CD", "V2+/NMF", "V2+/VQ", "V2+/CD", "light/NMF"])
def test_outputs_equal_the_release(tag):
    version, kind = tag.split("/")
    stored = entries(tag)
    weights = {name.removeprefix("state/"): value for name, value in stored.items() if name.startswith("state/")}
    options = {"light": {"version": "v1", "norm": "gn", "norm_groups": 2, "channels": 4}, "V1": {"version": "v1"}}
    options |= {"V2+": {"version": "v2plus", "dual": kind != "VQ"}}
    block = Hamburger(4, **({"channels": 6} | options.get(version, {})), ham=RULES[kind]).double().eval()
    missing, unexpected = block.load_state_dict(from_official(weights), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    for index, ham in enumerate(h for h in (block.ham, block.ham_channel) if h is not None):
        bases = stored[f"bases/{index}"][:, None]
        ham.register_forward_pre_hook(lambda module, args, bases=bases: (args[0], bases))
    torch.testing.assert_close(block(stored["x"]), stored["y"], rtol=1e-9, atol=1e-10)


def test_zero_ham_starts_as_the_rectified_input_and_only_its_scalar_learns():
    block = Hamburger(8, 8, version="v2plus", ham=NMF(rank=3))
    z = torch.randn(2, 8, 5, 4)
    y = block(z)
    assert torch.equal(y, z.relu())
    (y * torch.randn_like(y)).sum().backward()
    moved = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"coef_ham", "coef_shortcut"}
    assert not torch.equal(Hamburger(8, 8, version="v2plus", ham=NMF(rank=3), zero_ham=False)(z), y)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("ham", [NMF(rank=3), VQ(rank=3), CD(rank=3)], ids=["nmf", "vq", "cd"])
def test_gradient_reaches_every_weight_and_the_input(version, ham):
    block = Hamburger(6, 8, version=version, ham=ham, groups=2)
    z = torch.randn(2, 6, 5, 4, requires_grad=True)
    y = block(z)
    assert y.shape == z.shape and (y >= 0).all()
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad.any() for p in (*block.parameters(), z) if p is z or p.requires_grad)


def test_dual_gives_half_of_the_channels_to_each_direction():
    block = Hamburger(6, 8, version="v2plus", ham=NMF(rank=3), dual=True, cheese_factor=2, zero_ham=False).eval()
    assert block.ham.spatial and not block.ham_channel.spatial
    assert block.lower.out_channels == 16 and block.cheese.conv.out_channels == block.upper.in_channels == 4
    seen = []
    for ham in (block.ham, block.ham_channel):
        ham.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    z = torch.randn(2, 6, 5, 4)
    block(z)
    torch.testing.assert_close(torch.cat(seen, dim=1), block.lower(z).relu())


def test_first_weights_have_the_published_variance():
    block = Hamburger(256, 512)
    for conv in (block.lower, block.cheese.conv, block.upper):
        assert float(conv.weight.detach().std()) == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.02)
    assert block.lower.bias is not None and block.upper.bias is None


@pytest.mark.parametrize(
    "norm, kind",
    [("bn", nn.BatchNorm2d), ("gn", nn.GroupNorm), ("syncbn", nn.SyncBatchNorm), ("none", nn.Identity)],
)
def test_norms(norm, kind):
    v1 = Hamburger(8, 8, version="v1", ham=NMF(rank=3), norm=norm, norm_groups=4, norm_momentum=3e-4)
    v2 = Hamburger(8, 8, ham=NMF(rank=3), norm=norm, norm_groups=4, norm_momentum=3e-4)
    for norm in (v1.norm, v2.cheese.norm):
        assert type(norm) is kind and getattr(norm, "momentum", 3e-4) == 3e-4
    assert v1(torch.randn(2, 8, 3, 3)).shape == v2(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def test_autocast_runs_the_breads_in_half_and_the_ham_in_float32():
    torch.manual_seed(0)
    block = Hamburger(8, 16, version="v1", ham=CD(rank=3, inv_t=10.0), norm="none", eval_seed=0).eval()
    z = torch.randn(2, 8, 5, 4)
    inner = []
    original = type(block.ham.decomposition).final
    block.ham.register_forward_hook(lambda module, args, out: inner.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = block(z)
    assert inner == [torch.bfloat16] and original is CD.final
    torch.testing.assert_close(y, block(z), rtol=0.1, atol=0.1)


def test_five_lines_of_python():
    block = Hamburger(64, 64)
    x = torch.randn(2, 64, 16, 16)
    y = block(x)
    y.mean().backward()
    assert y.shape == x.shape


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"version": "v3"}, "hamburger.version must be one of v1, v2, v2plus, got 'v3'. Closest: v"),
        ({"dual": True}, "hamburger.dual exists in v2plus alone, the version is v2"),
        ({"cheese_factor": 2}, "hamburger.cheese_factor exists in v2plus alone"),
        (
            {"version": "v2plus", "cheese_factor": 3},
            r"channels must be a multiple of 3 \(cheese_factor\), got 8",
        ),
        ({"norm": "batch"}, "hamburger.norm must be one of bn, gn, syncbn, none, got 'batch'"),
        ({"norm": "gn", "norm_groups": 3}, r"channels must be a multiple of 3 \(norm_groups\), got 8"),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Hamburger(8, 8, **options)
