"""HamNet: the released network's sizes and dilations, heads, other backbones, weights of a backbone alone; conf/net."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from common.errors import UserError
from common.ham.burger import Hamburger
from common.ham.decompose import NMF
from common.runtime.cli.check import check
from common.runtime.cli.launch import register_resolvers
from common.targets import resolve
from common.weights.load import load_into
from projects.hamburger import context
from projects.hamburger.hamnet import HamNet, TimmBackbone
from projects.hamburger.van import VAN

CONF = Path(__file__).resolve().parents[3] / "conf"
NARROW = dict(channels=[8, 8, 16, 16], stem_type="deep", stem_width=8)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(**change) -> HamNet:
    torch.manual_seed(0)
    stages = change.pop("stages", [-1])
    options = dict(backbone=TimmBackbone("resnet18", stages=stages, options=NARROW), context=nn.Identity(), width=16)
    return HamNet(**options | dict(out_width=8, num_classes=5) | change)


def test_the_published_network():
    """54,035,669 parameters: counted on the authors' network for 21 classes, which gives the same outputs."""
    with FakeTensorMode():
        net = HamNet(
            backbone=TimmBackbone("resnet101s", multi_grid=[1, 2, 4]), context=Hamburger(512, 512), bn_momentum=3e-4
        )
        assert count(net) == 54_035_669
        assert net.stride == 8 and net.backbone.channels == (2048,)
        assert net.backbone(torch.empty(1, 3, 97, 129))[0].shape == (1, 2048, 13, 17)
        assert net(torch.empty(2, 3, 97, 129)).shape == (2, 21, 97, 129)
    last = [block.conv2 for block in net.backbone.body.layer4]
    assert [conv.dilation[0] for conv in last] == [conv.padding[0] for conv in last] == [2, 8, 16]
    assert [block.conv2.dilation[0] for block in net.backbone.body.layer3][:3] == [1, 2, 2]
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {3e-4}


def test_heads_start_as_those_of_mmsegmentation():
    """Normal weights of variance 2 / fan-out, no biases, classifiers of deviation .01; the backbone as it came."""
    options = dict(stages=[-2, -1], context=Hamburger(16, 16, version="v1"), concat=True, auxiliary=8)
    plain, made = small(**options), small(**options, initial="fan_out")
    for name, value in made.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, plain.state_dict()[name])
    for head in (made.classify, made.auxiliary):
        assert head[-1].weight.std().item() == pytest.approx(0.01, rel=0.4) and not head[-1].bias.any()
    squeeze = made.squeeze[0].weight  # 16 channels, 3x3
    assert squeeze.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)
    assert not made.context.lower.bias.any()


@pytest.mark.parametrize(
    ("size", "width", "out_width", "millions"),
    [("tiny", 256, 256, 4.2), ("tiny", 480, 512, 4.9), ("small", 256, 256, 13.8), ("small", 512, 512, 14.7),
     ("base", 512, 512, 27.4), ("large", 512, 512, 45.6), ("huge", 512, 512, 61.1)],
)  # fmt: skip
def test_published_sizes_of_light_ham(size, width, out_width, millions):
    with FakeTensorMode():
        net = HamNet(
            backbone=VAN(size), context=Hamburger(width, width, version="v1", norm="gn"), num_classes=150, width=width,
            out_width=out_width, kernel=1, norm="gn", align_corners=False,
        )  # fmt: skip
        assert round(count(net) / 1e6, 1) == millions
        assert net.stride == 32 and net(torch.empty(2, 3, 64, 96)).shape == (2, 150, 64, 96)


@pytest.mark.parametrize(("concat", "millions"), [(False, 57), (True, 69)])
def test_published_sizes_on_ade20k(concat, millions):
    with FakeTensorMode():
        net = HamNet(
            backbone=TimmBackbone("resnet101c", stages=[-2, -1]),
            context=Hamburger(512, 512, version="v1", norm="gn"),
            num_classes=150, out_width=512, norm="gn", concat=concat, auxiliary=256, align_corners=False,
        )  # fmt: skip
        assert round(count(net) / 1e6) == millions


@pytest.mark.parametrize(
    "block",
    [
        lambda c: Hamburger(c, c, ham=NMF(rank=4)),
        context.NonLocal, context.DoubleAttention, context.EMAttention, context.PyramidPooling, context.AtrousPyramid,
        lambda c: nn.Identity(),
    ],
)  # fmt: skip
def test_every_context_fits_and_learns(block):
    net = small(context=block(16)).train()
    logits = net(torch.randn(2, 3, 33, 25))
    assert logits.shape == (2, 5, 33, 25)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_auxiliary_head_sees_the_first_map_in_training_only():
    net = small(stages=[-2, -1], auxiliary=8).train()
    main, side = net.outputs(torch.randn(2, 3, 32, 32))
    assert main.shape == side.shape == (2, 5, 32, 32)
    assert net.squeeze[0].in_channels == 16 and net.auxiliary[0][0].in_channels == 16
    side.sum().backward()
    assert net.classify[1].weight.grad is None and net.auxiliary[2].weight.grad is not None
    assert len(net.eval().outputs(torch.randn(1, 3, 32, 32))) == 1


def test_maps_are_concatenated_at_the_size_of_the_finest():
    body = TimmBackbone("resnet18", stages=[-3, -2, -1], output_stride=None, options=NARROW)
    net = small(backbone=body, concat=True).eval()
    assert body.strides == (8, 16, 32) and net.stride == 32 and net.squeeze[0].in_channels == 8 + 16 + 16
    seen = []
    net.squeeze.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0]))
    x = torch.randn(1, 3, 64, 96)
    assert net(x).shape == (1, 5, 64, 96) and seen[0].shape == (1, 40, 8, 12)
    assert torch.equal(seen[0][:, :8], body(x)[0])
    assert net.fuse[0].in_channels == 40 + 8


def test_other_backbones_of_timm():
    with FakeTensorMode():
        for name in ("convnext_atto", "mobilenetv3_small_050", "resnet26d"):
            backbone = TimmBackbone(name, stages=[-2, -1], output_stride=16)
            assert small(backbone=backbone)(torch.empty(2, 3, 64, 64)).shape == (2, 5, 64, 64)
            assert backbone.strides[-1] == 16
            assert all(isinstance(p, FakeTensor) for p in backbone.parameters())


def test_weights_of_the_backbone_alone_leave_the_head_as_it_is():
    net, other = small(), small()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    alone = {f"{k}": v for k, v in other.backbone.body.state_dict().items() if "num_batches" not in k}
    alone |= {"fc.weight": torch.zeros(10, 16), "fc.bias": torch.zeros(10)}
    head = net.classify[1].weight.clone()
    report = load_into(net, net.prepare_weights(alone))
    assert not report.missing and torch.equal(net.classify[1].weight, head)
    assert torch.equal(net.backbone.body.conv1[0].weight, other.backbone.body.conv1[0].weight)
    whole = other.state_dict()
    assert net.prepare_weights(whole).keys() == whole.keys()
    with pytest.raises(UserError):  # of another network
        load_into(net, net.prepare_weights(VAN("tiny").state_dict()))
    incomplete = {k: v for k, v in alone.items() if not k.startswith("layer4")}
    with pytest.raises(UserError, match="layer4"):
        load_into(net, net.prepare_weights(incomplete))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimmBackbone("resnet1o1s"), "backbone.name=resnet1o1s is no network of timm. Closest: resnet101s"),
        (lambda: TimmBackbone("resnet18", output_stride=7), "timm cannot build resnet18 with .*output_stride=7"),
        (lambda: TimmBackbone("resnet18", stages=[9]), "timm cannot build resnet18 with stages=.9."),
        (lambda: TimmBackbone("resnet18", options={"widht": 3}), "timm cannot build resnet18 with .*widht"),
        (lambda: TimmBackbone("convnext_atto", multi_grid=[1, 2, 4]), "last stage of this network has 0 residual"),
        (lambda: small(num_classes=1), "net.num_classes must be a whole number >= 2"),
        (lambda: small(kernel=5), "net.kernel must be one of 1, 3"),
        (lambda: small(auxiliary=8), "net.auxiliary needs a second map"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["project=segmentation", "data=camvid", *overrides])


@pytest.mark.parametrize("name", ["hamnet_r101", "hamnet_light", "hamnet_tiny"])
def test_net_files_name_every_option(name):
    net = composed(f"net@project.net={name}").project.net
    for node, kind in ((net, HamNet), (net.backbone, resolve(net.backbone._target_)), (net.context, Hamburger)):
        assert set(node) - {"_target_"} == set(inspect.signature(kind).parameters)


@pytest.mark.parametrize("experiment", ["hamburger_tiny", "hamburger_light_base", "hamburger_ade20k_r101"])
@pytest.mark.parametrize("name", ["attention", "ham_cd", "none"])
def test_experiments_take_any_context(experiment, name):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"+experiment={experiment}", f"context@project.net.context={name}"])
    check(cfg.project)


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "context").glob("*.yaml")))
def test_context_is_one_word(name):
    node = composed(f"context@project.net.context={name}").project.net.context
    if name == "none":
        assert node._target_ == "torch.nn.Identity"
        return
    kind = resolve(node._target_)
    assert set(node) - {"_target_", *(["ham"] if name == "ham" else [])} >= set(inspect.signature(kind).parameters) - {
        "ham"
    }
    assert node.in_channels == node.channels == 512 and node.norm == "bn" and node.norm_groups == 32
    if name.startswith("ham_"):
        assert node.ham._target_ == f"common.ham.decompose.{name.split('_')[1].upper()}"
