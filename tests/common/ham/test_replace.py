"""Hams inside timm networks."""

import pytest
import timm
import torch
from hydra.utils import instantiate
from torch import nn

from common.errors import UserError
from common.ham.burger import Hamburger
from common.ham.decompose import CD, NMF
from common.ham.ham import Ham
from common.ham.replace import TokenHam, with_ham

VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def vit(**options):
    return timm.create_model(**VIT, num_classes=5, **options)


def trains(net):
    y = net(torch.randn(2, 3, 32, 32))
    y.square().sum().backward()
    return y.shape == (2, 5) and all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("ham", [None, CD(rank=4)], ids=["default", "cd"])
def test_every_attention_of_a_vit_becomes_a_ham(ham):
    net = with_ham(vit(), ham=ham, groups=2)
    parts = [block.attn for block in net.blocks]
    assert all(type(part) is TokenHam for part in parts) and len(parts) == 2
    assert type(parts[0].ham.decomposition) is (NMF if ham is None else CD)
    assert trains(net)


def test_one_attention_by_name_and_with_other_channels():
    net = with_ham(vit(), at=["blocks.1.attn"], channels=8)
    assert type(net.blocks[0].attn) is not TokenHam and net.blocks[1].attn.ham.channels == 8
    assert trains(net)


def test_a_hamburger_behind_a_stage_of_a_resnet():
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=5).eval()
    net = with_ham(timm.create_model("resnet18", num_classes=5), at="layer3", version="v2plus").eval()
    renamed = {name.replace("layer3.", "layer3.0."): value for name, value in plain.state_dict().items()}
    assert not net.load_state_dict(renamed, strict=False).unexpected_keys
    assert type(net.layer3[1]) is Hamburger and net.layer3[1].ham.channels == 256
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(x), plain(x))  # a zero-ham behind a ReLU changes nothing
    assert trains(with_ham(timm.create_model("resnet18", num_classes=5), at=["layer3", "layer4"]))


def test_by_configuration():
    net = instantiate(
        {
            "_target_": "common.ham.replace.with_ham",
            "model": {"_target_": "timm.create_model", **VIT, "num_classes": 5},
            "ham": {"_target_": "common.ham.decompose.NMF", "rank": 4},
        }
    )
    assert sum(isinstance(part, Ham) for part in net.modules()) == 2


def test_bad_places_are_one_sentence():
    with pytest.raises(UserError, match=r"ResNet has no self-attention. Set at to stages of it: act1, layer1, layer2"):
        with_ham(timm.create_model("resnet18"))
    with pytest.raises(UserError, match=r"ResNet has no place 'layer9' for a ham. Closest: layer"):
        with_ham(timm.create_model("resnet18"), at="layer9")
    with pytest.raises(
        UserError, match=r"VisionTransformer has no place 'blocks.7.attn' for a ham. Closest: blocks.1.attn"
    ):
        with_ham(vit(), at="blocks.7.attn")
    with pytest.raises(UserError, match=r"Linear has no self-attention"):
        with_ham(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"A ham mixes all tokens and takes no mask"):
        TokenHam(8)(torch.rand(1, 4, 8), attn_mask=torch.ones(4, 4))
