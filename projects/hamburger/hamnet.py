"""HamNet and Light-Ham: a backbone, a global-context module between two convolutions, a classifier of pixels.

    Z = squeeze(backbone(image))                       # (channels, pixels)
    X = relu(W_l Z);  D = random atoms;  C = softmax(D^T X / T)
    for K steps, without autograd:                     # the ham, here NMF
        C = C * (D^T X) / (D^T D C + e);  D = D * (X C^T) / (D C C^T + e)
    C = C * (D^T X) / (D^T D C + e)                    # once more, differentiated: the one-step gradient
    Y = relu(Z + BN(W_u D C))
    minimise cross-entropy(classifier(align(Y)), labels)

The published HamNet is a dilated ResNet-101 with a Hamburger on its last map; Light-Ham concatenates the last three
maps of a hierarchical backbone. Is Attention Better Than Matrix Decomposition? (arXiv 2109.04553).
"""

from collections.abc import Mapping, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.errors import UserError, nearest
from common.nets.timm_model import create
from projects.hamburger.context import ConvNormReLU


class TimmBackbone(nn.Module):
    """Images (B, 3, H, W) -> maps of `stages`, finest first, of any timm network that gives feature maps.

    name           of the network in timm, e.g. resnet101s (deep stem 64-64-128), convnext_tiny
    stages         indices of its feature maps, counted from the last: [-1] the last, [-3, -2, -1] the last three
    output_stride  pixels of the image per pixel of the last map: 8, 16, 32; later stages are dilated instead. None: as
                   the network is
    multi_grid     further dilations of the 3x3 convolutions in the last stage (residual networks): 1, 2, 4
    options        what else timm's network takes, e.g. {drop_path_rate: 0.1}

    `channels` and `strides` describe the maps. Weights are random: load them with init.file.
    Raises UserError for a name, index or option timm does not know.
    """

    def __init__(
        self,
        name: str = "resnet101s",
        *,
        stages: Sequence[int] = (-1,),
        output_stride: int | None = 8,
        multi_grid: Sequence[int] | None = None,
        options: Mapping | None = None,
    ):
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"backbone.name={name} is no network of timm. {nearest(name, timm.list_models())}")
        extra = {"output_stride": output_stride} if output_stride is not None else {}
        try:
            self.body = create(name, features_only=True, out_indices=tuple(stages), **extra, **(options or {}))
        except (TypeError, AssertionError, IndexError, NotImplementedError, RuntimeError, KeyError) as error:
            raise UserError(
                f"timm cannot build {name} with stages={list(stages)}, output_stride={output_stride} and options "
                f"{dict(options or {})}: {' '.join(str(error).split()) or type(error).__name__}. Change one of them."
            ) from error
        self.channels = tuple(self.body.feature_info.channels())
        self.strides = tuple(self.body.feature_info.reduction())
        if multi_grid is not None:
            _dilate_further(self.body, multi_grid)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x))


def _dilate_further(body: nn.Module, grid: Sequence[int]) -> None:
    """Multiply the dilations of the last stage's blocks."""
    blocks = list(getattr(body, "layer4", []))
    if len(blocks) != len(grid):
        raise UserError(
            f"backbone.multi_grid has {len(grid)} numbers, but the last stage of this network has {len(blocks)} "
            f"residual blocks. Set backbone.multi_grid=null."
        )
    for block, factor in zip(blocks, grid, strict=True):
        conv = block.conv2
        conv.dilation = tuple(factor * d for d in conv.dilation)
        conv.padding = tuple(factor * p for p in conv.padding)


def _fan_out(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class HamNet(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, num_classes, H, W).

        maps of the backbone, resized to the first and concatenated -> squeeze (k x k) -> context -> align (k x k)
        -> dropout of channels -> 1x1 classifier -> resized to the image

    backbone       gives a list of maps, finest first, and has their `channels` and `strides`
    context        (B, width, h, w) -> the same shape: `common.ham.burger.Hamburger`, one of `context.py`, or
                   `torch.nn.Identity`
    width          after the squeeze;   out_width  after the align
    kernel         k: 3 in HamNet, 1 in Light-Ham
    norm           of squeeze and align: bn, gn or none;   norm_groups  of gn
    bn_momentum    of every batch normalisation, the backbone's too; the published HamNet has 3e-4. None: as built
    dropout        of whole channels before the classifier
    concat         another 3x3 convolution over the align's output and the decoded maps (HamNet+ on ADE20K)
    auxiliary      channels of an auxiliary head on the first map of the backbone, unused otherwise; 0: none
    initial        weights of all but the backbone: "torch", as the layers come; "fan_out", mmsegmentation's: normal
                   of variance 2 / fan-out, biases 0, classifiers normal of deviation .01
    align_corners  when maps and logits are resized; inputs of an eval then have sizes s = 1 modulo `stride`, else 0

    `outputs` gives in training the logits of the auxiliary head, too. Raises UserError for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        context: nn.Module,
        num_classes: int = 21,
        width: int = 512,
        out_width: int = 256,
        kernel: int = 3,
        norm: str = "bn",
        norm_groups: int = 32,
        bn_momentum: float | None = None,
        dropout: float = 0.1,
        concat: bool = False,
        auxiliary: int = 0,
        align_corners: bool = True,
        initial: str = "torch",
    ):
        super().__init__()
        limits.choice("net.initial", initial, ("torch", "fan_out"))
        limits.whole("net.num_classes", num_classes, least=2, hint="Set it to the classes of the data.")
        limits.choice("net.kernel", kernel, (1, 3), hint="HamNet has 3, Light-Ham 1.")
        channels = backbone.channels
        if auxiliary and len(channels) < 2:
            raise UserError(
                "net.auxiliary needs a second map of the backbone, the first. Set backbone.stages=[-2,-1], or "
                "net.auxiliary=0."
            )
        self.num_classes, self.align_corners = num_classes, align_corners
        self.stride = max(backbone.strides)
        made = dict(norm=norm, norm_groups=norm_groups)
        self.backbone = backbone
        inside = sum(channels[1:] if auxiliary else channels)
        self.squeeze = ConvNormReLU(inside, width, kernel, **made)
        self.context = context
        self.align = ConvNormReLU(width, out_width, kernel, **made)
        self.fuse = ConvNormReLU(inside + out_width, out_width, 3, **made) if concat else None
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(out_width, num_classes, 1))
        self.auxiliary = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                ConvNormReLU(channels[0], auxiliary, 3, **made),
                nn.Dropout2d(dropout),
                nn.Conv2d(auxiliary, num_classes, 1),
            )
        if initial == "fan_out":
            for name, part in self.named_children():
                if name != "backbone":
                    part.apply(_fan_out)
            for head in (self.classify, self.auxiliary):
                if head is not None:
                    nn.init.normal_(head[-1].weight, std=0.01)
        if bn_momentum is not None:
            for part in self.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.momentum = bn_momentum

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[0]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Logits (B, num_classes, H, W) and, in training, those of the auxiliary head if there is one."""
        maps = self.backbone(x)
        side = maps.pop(0) if self.auxiliary is not None else None
        heads = [self._decode(maps)]
        if side is not None and self.training:
            heads.append(self.auxiliary(side))
        return [self._resize(logits, x) for logits in heads]

    def _decode(self, maps: list[Tensor]) -> Tensor:
        whole = torch.cat([self._resize(part, maps[0]) for part in maps], dim=1)
        y = self.align(self.context(self.squeeze(whole)))
        if self.fuse is not None:
            y = self.fuse(torch.cat([whole, y], dim=1))
        return self.classify(y)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        size = like.shape[2:]
        if x.shape[2:] == size:
            return x
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)

    def prepare_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of `init.file` for the whole network; a file of the backbone alone is completed from this network.

        A classifier in such a file is left out.
        """
        own = self.state_dict()
        if any(name in own for name in tensors):
            return dict(tensors)
        inner = "backbone.body." if isinstance(self.backbone, TimmBackbone) else "backbone."
        fitting = {f"{inner}{name}": tensor for name, tensor in tensors.items() if f"{inner}{name}" in own}
        if len(fitting) < len(tensors) / 2:
            return dict(tensors)  # another network: refused by the loader, in its words
        rest = {name: tensor for name, tensor in own.items() if not name.startswith(inner)}
        counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
        return {**rest, **counters, **fitting}
