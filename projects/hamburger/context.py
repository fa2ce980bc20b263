"""Global-context modules beside the Hamburger of `common.ham`: what the paper compares it with, and nothing at all.

All map (B, in_channels, H, W) to the same shape, work on `channels` channels and add their output to their input
under a ReLU, as Hamburger V1 does: y = relu(x + norm(up(context(x)))). "none" is `torch.nn.Identity`.

    y = NonLocal(512)(x)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import limits
from common.tensors import mean_over_processes

NORMS = ("bn", "gn", "none")


def make_norm(kind: str, channels: int, groups: int = 32) -> nn.Module:
    """bn: batch normalisation; gn: `groups` groups; none: identity. Raises UserError for anything else."""
    limits.choice("norm", kind, NORMS)
    if kind == "gn":
        limits.multiple_of("channels", channels, groups, "norm_groups", hint="Set norm_groups to a divisor.")
        return nn.GroupNorm(groups, channels)
    return nn.BatchNorm2d(channels) if kind == "bn" else nn.Identity()


class ConvNormReLU(nn.Sequential):
    """Convolution without bias (with, if there is no norm), norm, ReLU; the size stays."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int = 1, *, dilation: int = 1, norm="bn", norm_groups: int = 32
    ):
        padding = dilation * (kernel // 2)
        conv = nn.Conv2d(in_channels, channels, kernel, padding=padding, dilation=dilation, bias=norm == "none")
        super().__init__(conv, make_norm(norm, channels, norm_groups), nn.ReLU(inplace=True))


class NonLocal(nn.Module):
    """Self-attention of one head between all pixels: softmax(q k^T / sqrt(channels)) v; cost quadratic in H W.

    Non-local networks (arXiv 1711.07971), embedded Gaussian, through PyTorch's fused attention.
    With in_channels = channels = 512 and no norm: 2^20 parameters, the paper's 1.00 M.
    """

    def __init__(self, in_channels: int, channels: int = 512, *, norm: str = "bn", norm_groups: int = 32):
        super().__init__()
        self.channels = channels
        self.project = nn.Conv2d(in_channels, 3 * channels, 1, bias=False)
        self.up = nn.Conv2d(channels, in_channels, 1, bias=False)
        self.norm = make_norm(norm, in_channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, n, 3 channels)
        q, k, v = tokens.split(self.channels, dim=3)
        seen = F.scaled_dot_product_attention(q, k, v)
        seen = seen.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return F.relu(x + self.norm(self.up(seen)))


class DoubleAttention(nn.Module):
    """A2-Net: gather a few descriptors of the whole picture, distribute them to the pixels; cost linear in H W.

    With features a, attention maps p = softmax over pixels and r = softmax over descriptors: y = (a p^T) r.

    channels     of the descriptors
    descriptors  how many; None: as many as channels

    A2-Nets (arXiv 1810.11579), section 3.
    """

    def __init__(
        self, in_channels: int, channels: int = 512, *, descriptors: int | None = None, norm="bn", norm_groups: int = 32
    ):
        super().__init__()
        self.widths = [channels, descriptors or channels, descriptors or channels]
        self.project = nn.Conv2d(in_channels, sum(self.widths), 1)
        self.up = nn.Conv2d(channels, in_channels, 1, bias=False)
        self.norm = make_norm(norm, in_channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        a, p, r = self.project(x).flatten(2).split(self.widths, dim=1)  # (B, width, n)
        gathered = a @ p.softmax(dim=2).transpose(1, 2)
        y = (gathered @ r.softmax(dim=1)).unflatten(2, x.shape[2:])
        return F.relu(x + self.norm(self.up(y)))


class EMAttention(nn.Module):
    """EMANet: a few steps of expectation maximisation fit `rank` bases to the pixels, which are rebuilt from them.

    E: z = softmax over bases of x^T mu; M: mu = x z, columns of unit length, z normalised over pixels. Gradients run
    through all steps. The bases to start from are a buffer that only `update_bases` moves, to a running mean of the
    bases found.

    rank      bases;   steps  E and M steps
    momentum  of the running mean, in [0, 1]: mu <- momentum mu + (1 - momentum) mean over the batch

    Expectation-Maximization Attention Networks (arXiv 1907.13426), section 3.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        *,
        rank: int = 64,
        steps: int = 3,
        momentum: float = 0.9,
        norm: str = "bn",
        norm_groups: int = 32,
    ):
        super().__init__()
        limits.whole("context.rank", rank, least=1, hint="EMANet has 64.")
        limits.whole("context.steps", steps, least=1, hint="EMANet has 3.")
        self.steps, self.momentum = steps, momentum
        self.lower = nn.Conv2d(in_channels, channels, 1)
        self.register_buffer("bases", F.normalize(torch.randn(1, channels, rank), dim=1))
        self.up = nn.Conv2d(channels, in_channels, 1, bias=False)
        self.norm = make_norm(norm, in_channels, norm_groups)
        self.last_bases: Tensor | None = None  # (1, channels, rank), of the last training call

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.lower(x)
        with torch.autocast(x.device.type, enabled=False):
            y = self._rebuild(pixels.float().flatten(2)).to(pixels.dtype)
        return F.relu(x + self.norm(self.up(y.unflatten(2, x.shape[2:]))))

    def _rebuild(self, pixels: Tensor) -> Tensor:
        """Pixels (B, channels, n) from their bases: mu z^T."""
        bases = self.bases.expand(len(pixels), -1, -1)
        for _ in range(self.steps):
            shares = (pixels.transpose(1, 2) @ bases).softmax(dim=2)  # (B, n, rank)
            bases = pixels @ (shares / (shares.sum(dim=1, keepdim=True) + 1e-6))
            bases = F.normalize(bases, dim=1)
        if self.training:
            self.last_bases = bases.detach().mean(dim=0, keepdim=True)
        return bases @ shares.transpose(1, 2)

    @torch.no_grad()
    def update_bases(self) -> None:
        """Move the stored bases towards those of the last training call, over all processes; for after a step."""
        if self.last_bases is None:
            return
        mean, self.last_bases = mean_over_processes(self.last_bases), None
        self.bases.lerp_(mean.to(self.bases), 1 - self.momentum)


class PyramidPooling(nn.Module):
    """PSP in a light form: means over grids of 1, 2, 3 and 6 cells, fused with the input by a 1x1 convolution.

    channels  of all grids together; a multiple of their number
    grids     cells along one side

    Pyramid scene parsing (arXiv 1612.01105) fuses by a 3x3 convolution and has no shortcut.
    """

    def __init__(
        self, in_channels: int, channels: int = 512, *, grids: Sequence[int] = (1, 2, 3, 6), norm="bn", norm_groups=32
    ):
        super().__init__()
        limits.multiple_of("context.channels", channels, len(grids), "the grids share them")
        self.grids = tuple(grids)
        # no norm: a grid of one cell would leave one number per channel and picture to normalise
        self.branches = nn.ModuleList(nn.Conv2d(in_channels, channels // len(grids), 1) for _ in grids)
        self.up = nn.Conv2d(in_channels + channels, in_channels, 1, bias=False)
        self.norm = make_norm(norm, in_channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for grid, branch in zip(self.grids, self.branches, strict=True):
            pooled = F.relu(branch(F.adaptive_avg_pool2d(x, grid)))
            found.append(F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=False))
        return F.relu(x + self.norm(self.up(torch.cat(found, dim=1))))


class AtrousPyramid(nn.Module):
    """ASPP in a light form: a 1x1 convolution, dilated 3x3 ones and the picture's mean, fused by a 1x1 convolution.

    channels  of all branches together; a multiple of their number
    rates     dilations; those of DeepLab are for output stride 16, twice as much for 8

    Rethinking atrous convolution (arXiv 1706.05587) has 256 channels in each branch and no shortcut.
    """

    def __init__(
        self, in_channels: int, channels: int = 512, *, rates: Sequence[int] = (12, 24, 36), norm="bn", norm_groups=32
    ):
        super().__init__()
        branches = len(rates) + 1
        share = limits.multiple_of("context.channels", channels, branches, "the branches share them") // branches
        made = dict(norm=norm, norm_groups=min(norm_groups, share))
        self.near = ConvNormReLU(in_channels, share, **made)
        self.far = nn.ModuleList(ConvNormReLU(in_channels, share, 3, dilation=rate, **made) for rate in rates)
        self.whole = nn.Conv2d(in_channels, share, 1)  # no norm: one number per channel and picture
        self.up = nn.Conv2d(channels + share, in_channels, 1, bias=False)
        self.norm = make_norm(norm, in_channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        whole = F.relu(self.whole(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
        found = [self.near(x), *(branch(x) for branch in self.far), whole]
        return F.relu(x + self.norm(self.up(torch.cat(found, dim=1))))
