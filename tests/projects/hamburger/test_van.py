"""VAN: maps and their sizes, the published parameter counts, the names of the released weights, drawn depths."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from projects.hamburger.van import VAN, LargeKernelAttention, VanBlock


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_maps_are_finest_first():
    torch.manual_seed(0)
    net = VAN("tiny", stages=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 64, 96))
        assert [tuple(m.shape) for m in maps] == [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
        assert net.channels == (32, 64, 160, 256) and net.strides == (4, 8, 16, 32)
        part = VAN("tiny", stages=(1, 2))
        part.load_state_dict(net.state_dict(), strict=False)
        for a, b in zip(part.eval()(torch.ones(1, 3, 64, 64)), net(torch.ones(1, 3, 64, 64))[1:]):
            assert torch.equal(a, b)
    assert not any("4" in name.split(".")[0] for name in part.state_dict())


@pytest.mark.parametrize(
    ("size", "parameters"),  # of the ImageNet classifier (arXiv 2202.09741, table 3) without its last layer
    [("tiny", 3.85), ("small", 13.34), ("base", 26.06), ("large", 44.25), ("huge", 59.77)],
)
def test_sizes(size, parameters):
    with torch.device("meta"):
        assert count(VAN(size)) / 1e6 == pytest.approx(parameters, abs=0.01)


def test_names_of_the_released_weights():
    names = set(VAN("tiny", stages=(3,)).state_dict())
    for name in (
        "patch_embed1.proj.weight", "patch_embed1.norm.running_mean", "block1.0.norm1.weight",
        "block1.0.attn.proj_1.weight", "block1.0.attn.spatial_gating_unit.conv0.weight",
        "block1.0.attn.spatial_gating_unit.conv_spatial.bias", "block1.0.attn.spatial_gating_unit.conv1.weight",
        "block1.0.attn.proj_2.bias", "block1.0.layer_scale_1", "block1.0.mlp.fc1.weight",
        "block1.0.mlp.dwconv.dwconv.weight", "block1.0.mlp.fc2.bias", "norm4.weight",
    ):  # fmt: skip
        assert name in names
    assert len(names) == 400  # of the released file without its classifier


def test_the_large_kernel_reaches_21_pixels():
    module = LargeKernelAttention(2)
    x = torch.ones(1, 2, 41, 41, requires_grad=True)
    (module(x)[0, :, 20, 20].sum()).backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    # 5 + 3 (7 - 1) = 23 rows: the paper's 21 and the margin its decomposition adds
    assert (rows.min().item(), rows.max().item()) == (9, 31)


def test_blocks_start_near_the_identity_and_drop_more_the_deeper():
    x = torch.randn(2, 8, 9, 9)
    block = VanBlock(8, 4, 0.0)
    assert (block(x) - x).abs().mean() < 0.1 * x.abs().mean()
    net = VAN("tiny", stages=(3,), drop_path=0.3)
    blocks = [b for stage in (1, 2, 3, 4) for b in getattr(net, f"block{stage}")]
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]
    assert rates == pytest.approx([0.3 * i / 12 for i in range(13)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size="bose"), "backbone.size must be one of tiny, small, base, large, huge, got 'bose'. Closest: base"),
        (dict(stages=[2, 1]), "backbone.stages must be rising"),
        (dict(stages=[3, 4]), "backbone.stages must be rising"),
        (dict(stages=[]), "backbone.stages must be rising"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        VAN(**options)
