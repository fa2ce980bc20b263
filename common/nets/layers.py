"""Layers of the EDM network family (DDPM++, NCSN++, ADM): EDM (arXiv 2206.00364), appendix F.

Parameter names, initial distributions and the order of random draws are those of the official release, so official
weights load by name and equal seeds give equal networks. Weights are cast to the dtype of the activations.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

from common import limits
from common.errors import UserError
from common.nets.attention import attention, in_forward_mode
from common.nets.dropout import dropout
from common.nets.inputs import attention_heads
from common.tensors import append_dims, only_shapes

ONEDNN = torch.backends.mkldnn.is_available()
INIT_MODES = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")


def initial_weight(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    """A fresh float32 tensor, variance 2/(fan_in + fan_out) for xavier_*, 1/fan_in for kaiming_*."""
    limits.choice("init_mode", mode, INIT_MODES)
    spread = 3 if mode.endswith("uniform") else 1  # a uniform variable on [-1, 1] has variance 1/3
    scale = math.sqrt(2 * spread / (fan_in + fan_out) if mode.startswith("xavier") else spread / fan_in)
    return scale * (torch.rand(*shape) * 2 - 1 if mode.endswith("uniform") else torch.randn(*shape))


class Linear(nn.Module):
    """Fully connected layer, (..., in_features) -> (..., out_features)."""

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        fans = dict(mode=init_mode, fan_in=in_features, fan_out=out_features)
        self.weight = nn.Parameter(initial_weight([out_features, in_features], **fans) * init_weight)
        # Drawn even when init_bias is 0: later layers then start from the same random numbers as in the official code.
        self.bias = nn.Parameter(initial_weight([out_features], **fans) * init_bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution, optionally after a factor-2 up- or downsampling; kernel=0 resamples only.

    resample_filter  one-dimensional, used separably: (1, 1) is the box, (1, 3, 3, 1) the smoother NCSN++ filter
    fused_resample   as NCSN++ does in its residual encoder: convolve at the higher resolution in both directions.
                     Down: convolution, then filter (without: filter first). Up: the same but for the image border
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[int] = (1, 1),
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1,
        init_bias: float = 0,
    ):
        super().__init__()
        if up and down:
            raise UserError("a convolution can go up or down, not both. Set one of up and down to false.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel = kernel
        self.up = up
        self.down = down
        self.fused_resample = fused_resample and kernel > 0
        self.is_box = list(resample_filter) == [1, 1]
        area = kernel * kernel
        fans = dict(mode=init_mode, fan_in=in_channels * area, fan_out=out_channels * area)
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = nn.Parameter(initial_weight(shape, **fans) * init_weight) if kernel else None
        self.bias = nn.Parameter(initial_weight([out_channels], **fans) * init_bias) if kernel and bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_resample and (self.up or self.down):
            return self._fused(x)
        if self.up and self.kernel == 1 and self.is_box:
            # A pointwise convolution commutes with repeating pixels: convolve a quarter of them.
            return self._upsample(self._convolve(x, padding=0))
        if self.up:
            x = self._upsample(x)
        if self.down:
            x = self._downsample(x)
        return self._convolve(x, padding=self.kernel // 2) if self.kernel else x

    def _convolve(self, x: Tensor, padding: int, bias: bool = True) -> Tensor:
        b = self.bias.to(x.dtype) if bias and self.bias is not None else None
        # For a 1x1 kernel dilation means nothing, but it makes torch take oneDNN on a single CPU thread as well, where
        # it otherwise multiplies matrices with a library that is half as fast (9 against 20 ms, 512 -> 256 at 32x32).
        pointwise = self.kernel == 1 and ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
        return F.conv2d(x, self.weight.to(x.dtype), b, padding=padding, dilation=2 if pointwise else 1)

    def _taps(self, x: Tensor, gain: float) -> Tensor:
        return (self.resample_filter * gain).to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def _upsample(self, x: Tensor) -> Tensor:
        if self.is_box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        pad = (self.resample_filter.shape[-1] - 1) // 2
        return F.conv_transpose2d(x, self._taps(x, 4), groups=x.shape[1], stride=2, padding=pad)

    def _downsample(self, x: Tensor) -> Tensor:
        if self.is_box:
            return F.avg_pool2d(x, 2)
        pad = (self.resample_filter.shape[-1] - 1) // 2
        return F.conv2d(x, self._taps(x, 1), groups=x.shape[1], stride=2, padding=pad)

    def _fused(self, x: Tensor) -> Tensor:
        conv_pad = self.kernel // 2
        filter_pad = (self.resample_filter.shape[-1] - 1) // 2
        if self.up:
            pad = max(filter_pad - conv_pad, 0)
            x = F.conv_transpose2d(x, self._taps(x, 4), groups=x.shape[1], stride=2, padding=pad)
            return self._convolve(x, padding=max(conv_pad - filter_pad, 0))
        x = self._convolve(x, padding=conv_pad + filter_pad, bias=False)
        b = self.bias.to(x.dtype) if self.bias is not None else None
        return F.conv2d(x, self._taps(x, 1), b, groups=x.shape[1], stride=2)


class GroupNorm(nn.Module):
    """Group normalisation with min(num_groups, num_channels / min_channels_per_group) groups."""

    def __init__(self, *, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        self.eps = eps
        if self.num_groups < 1 or num_channels % self.num_groups:
            raise UserError(
                f"{num_channels} channels cannot be normalised in {self.num_groups} equal groups. "
                f"Set model_channels to a multiple of {num_groups}, or of {min_channels_per_group} "
                f"if every level stays below {num_groups * min_channels_per_group} channels."
            )
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if in_forward_mode() and (torch.compiler.is_compiling() or only_shapes()):
            # Neither torch.compile nor fake tensors can trace the tangent of the fused kernel (pytorch issue 152185).
            groups = x.unflatten(1, (self.num_groups, -1)).flatten(2)
            var, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
            x = ((groups - mean) * torch.rsqrt(var + self.eps)).view_as(x)
            return x * append_dims(weight, x, dim=1) + append_dims(bias, x, dim=1)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention: what DDPM++, NCSN++ and ADM need together.

    num_heads        None = out_channels / channels_per_head
    skip_scale       factor on every residual sum; sqrt(1/2) keeps the variance
    resample_proj    put a 1x1 convolution on the skip of resampling blocks even when the channel count stays
    adaptive_scale   the embedding scales and shifts after the norm (ADM) instead of shifting before it
    init, init_zero, init_attn   keyword arguments for inner, last and qkv layers; init_attn None = init
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0,
        skip_scale: float = 1,
        eps: float = 1e-5,
        resample_filter: Sequence[int] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Mapping[str, str | float],
        init_zero: Mapping[str, str | float],
        init_attn: Mapping[str, str | float] | None = None,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        self.num_heads = 0
        if attention:
            self.num_heads = num_heads or attention_heads(out_channels, channels_per_head)
        conv = dict(in_channels=in_channels, out_channels=out_channels, up=up, down=down)
        conv.update(resample_filter=resample_filter, **init)

        self.norm0 = GroupNorm(num_channels=in_channels, eps=eps)
        self.conv0 = Conv2d(kernel=3, **conv)
        width = out_channels * (2 if adaptive_scale else 1)
        self.affine = Linear(in_features=emb_channels, out_features=width, **init)
        self.norm1 = GroupNorm(num_channels=out_channels, eps=eps)
        self.conv1 = Conv2d(in_channels=out_channels, out_channels=out_channels, kernel=3, **init_zero)
        self.skip = None
        if up or down or in_channels != out_channels:
            self.skip = Conv2d(kernel=1 if resample_proj or in_channels != out_channels else 0, **conv)
        if self.num_heads:
            self.norm2 = GroupNorm(num_channels=out_channels, eps=eps)
            self.qkv = Conv2d(in_channels=out_channels, out_channels=3 * out_channels, kernel=1, **(init_attn or init))
            self.proj = Conv2d(in_channels=out_channels, out_channels=out_channels, kernel=1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), emb (B or 1, emb_channels), mask (B, out_channels, H', W') bool or None."""
        h = self.conv0(silu(self.norm0(x)))
        # ADM: silu(scale * norm(h) + shift), scale = 1 + s; DDPM++: silu(norm(h + shift))
        params = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = silu(self.norm1(h + params))
        h = self.conv1(dropout(h, self.dropout, self.training, mask))
        # Autograd keeps nothing of a sum, so its result can be scaled in place.
        x = (h + (x if self.skip is None else self.skip(x))).mul_(self.skip_scale)
        return self._attend(x) if self.num_heads else x

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x))
        # Official channel order: head, channel, then q k v innermost.
        qkv = qkv.reshape(batch * self.num_heads, channels // self.num_heads, 3, height * width)
        h = self.proj(attention(*qkv.unbind(2)).reshape(x.shape))
        return (h + x).mul_(self.skip_scale)


class PositionalEmbedding(nn.Module):
    """cos then sin of noise label times geometric frequencies 1 ... 1/max_positions: (B,) -> (B, num_channels)."""

    def __init__(self, *, num_channels: int, max_positions: int = 10000, endpoint: bool = False):
        super().__init__()
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.num_channels // 2
        powers = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        angles = torch.outer(x, ((1 / self.max_positions) ** powers).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """cos then sin of noise label times random frequencies 2 pi scale n, n ~ N(0, 1): (B,) -> (B, num_channels).

    scale  16 in EDM; the ECT release uses 0.02, which keeps c_noise smooth as the two noise levels meet
    """

    def __init__(self, *, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)
