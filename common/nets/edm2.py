"""The magnitude-preserving U-Net of EDM2 (arXiv 2312.02696), configuration G; equation numbers are the paper's.

Module names and random draws follow the official release, so its weights load by name. Two costs are folded away
without changing results beyond rounding: the normalisation and gain of a weight are one factor per output row, and
the division in mp_silu joins the gain of the convolution that follows.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import silu

from common import limits
from common.nets.attention import attention
from common.nets.dropout import draw_masks, dropout, feed_masks, unet_layers
from common.nets.inputs import (
    attention_heads,
    check_inputs,
    check_label_dims,
    check_pyramid,
)

SIZES = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
"""Published sizes -> model_channels."""

SILU_GAIN = 1 / 0.596
"""1 / root mean square of silu on unit-variance input (Equation 81)."""


def magnitude(x: Tensor, dim: Sequence[int] | int, eps: float = 1e-4) -> Tensor:
    """eps + root mean square over dim, kept as size-1 axes, float32 (float64 for float64 x): the divisor of eq. 66."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return norm * math.sqrt(norm.numel() / x.numel()) + eps


def normalize(x: Tensor, dim: Sequence[int] | int) -> Tensor:
    """x at unit magnitude along dim."""
    return x / magnitude(x, dim).to(x.dtype)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Blend (1 - t) a + t b that keeps the magnitude of uncorrelated a and b (Equation 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channel concatenation to which a and b contribute 1 - t and t whatever their widths (Equation 103)."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(na)), b * (scale * t / math.sqrt(nb))], dim=1)


def resample(x: Tensor, mode: str, taps: Sequence[int] = (1, 1)) -> Tensor:
    """x (B, C, H, W) as it is ("keep"), halved ("down") or doubled ("up") with the separable filter `taps`."""
    if mode == "keep":
        return x
    if list(taps) == [1, 1]:
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
    f = torch.as_tensor(taps, dtype=torch.float32, device=x.device)
    f = (torch.outer(f, f) / f.sum().square()).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    how = dict(groups=x.shape[1], stride=2, padding=(len(taps) - 1) // 2)
    return F.conv2d(x, f, **how) if mode == "down" else F.conv_transpose2d(x, f * 4, **how)


class MPFourier(nn.Module):
    """sqrt(2) cos(f x + phase) with random f and phase: (B,) -> (B, num_channels), unit magnitude (Equation 75)."""

    def __init__(self, num_channels: int, bandwidth: float = 1):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = torch.outer(x.to(wide), self.freqs.to(wide)) + self.phases.to(wide)
        return (angles.cos() * math.sqrt(2)).to(x.dtype)


class MPConv(nn.Module):
    """Linear layer (kernel=()) or convolution (kernel=(k, k)) without bias, magnitude-preserving (Equation 47).

    Training first rewrites the stored weight at unit magnitude (forced normalisation, Equation 66), so every step
    starts on the sphere. `forced` = False leaves it alone; see weights_kept.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()):
        super().__init__()
        self.out_channels = out_channels
        self.forced = True
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1) -> Tensor:
        dims = tuple(range(1, self.weight.ndim))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        if self.training and self.forced:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight.to(wide), dims))
        w = self.weight.to(wide)
        w = (w * (gain / math.sqrt(w[0].numel()) / magnitude(w, dims))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[None]:
    """Within this context no MPConv inside `module` rewrites its weight.

    For a second training-mode pass in the same step: the weights are on the sphere already, and touching them between
    a forward and its backward is an error in autograd.
    """
    layers = [m for m in module.modules() if isinstance(m, MPConv)]
    before = [m.forced for m in layers]
    try:
        for m in layers:
            m.forced = False
        yield
    finally:
        for m, forced in zip(layers, before, strict=True):
            m.forced = forced


class Block(nn.Module):
    """Encoder ("enc") or decoder ("dec") block with optional resampling and self-attention (figure 21).

    res_balance, attn_balance   weight of the residual and attention branch in mp_sum
    clip_act                    outputs are clipped to +-clip_act, which keeps float16 finite; None = no clipping
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        flavor: str,
        resample_mode: str = "keep",
        resample_filter: Sequence[int] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ):
        super().__init__()
        limits.choice("flavor", flavor, ("enc", "dec"))
        limits.choice("resample_mode", resample_mode, ("keep", "up", "down"))
        self.out_channels = out_channels
        self.flavor = flavor
        self.resample_mode = resample_mode
        self.resample_filter = tuple(resample_filter)
        self.num_heads = attention_heads(out_channels, channels_per_head) if attention else 0
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, (1, 1)) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if attention else None

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), emb (B or 1, emb_channels), mask (B, out_channels, H', W') bool or None."""
        x = resample(x, self.resample_mode, self.resample_filter)
        if self.flavor == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, dim=1)

        h = self.conv_res0(silu(x), gain=SILU_GAIN)
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(dropout(h, self.dropout, self.training, mask), gain=SILU_GAIN)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, self.res_balance)

        if self.num_heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.attn_qkv(x)
        # Official channel order: head, channel, then q k v innermost; each q, k and v has unit magnitude.
        qkv = qkv.reshape(batch * self.num_heads, channels // self.num_heads, 3, height * width)
        return self.attn_proj(attention(*normalize(qkv, dim=1).unbind(2)).reshape(x.shape))


class EDM2UNet(nn.Module):
    """F(x; noise_labels), (B, img_channels, R, R) -> same shape, R = img_resolution; a fresh network returns 0.

    label_dim           width of one-hot class labels, 0 = none
    model_channels      base width, one of SIZES for the published networks
    channel_mult        width per level; channel_mult_noise, channel_mult_emb: None = first and largest level
    num_blocks          residual blocks per level (one more on the way up)
    attn_resolutions    levels with self-attention; the lowest level always has one attention block
    label_balance       weight of the class against the noise embedding
    concat_balance      weight of skip connections against the main path
    dropout             in [0, 1), only at resolutions <= dropout_res when that is set (16 in ECT, ImageNet 64)
    Raises UserError for sizes that do not fit together.
    """

    augment_dim = 0

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        dropout: float = 0,
        dropout_res: int | None = None,
        resample_filter: Sequence[int] = (1, 1),
        channels_per_head: int = 64,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ):
        super().__init__()
        limits.positive(img_resolution=img_resolution, img_channels=img_channels, num_blocks=num_blocks)
        limits.positive(model_channels=model_channels)
        check_pyramid(img_resolution, channel_mult, attn_resolutions)
        limits.probability("dropout", dropout)
        check_label_dims(label_dim=label_dim)
        self.img_resolution = img_resolution
        self.in_channels = self.out_channels = img_channels
        self.label_dim = label_dim
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        widths = [model_channels * mult for mult in channel_mult]
        cnoise = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        cemb = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb

        def block(cin: int, cout: int, res: int, **options) -> Block:
            return Block(
                cin,
                cout,
                cemb,
                dropout=dropout if dropout_res is None or res <= dropout_res else 0,
                resample_filter=resample_filter,
                channels_per_head=channels_per_head,
                res_balance=res_balance,
                attn_balance=attn_balance,
                clip_act=clip_act,
                **options,
            )

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb)
        self.emb_label = MPConv(label_dim, cemb) if label_dim else None

        self.enc = nn.ModuleDict()
        width = widths[0]
        skips = [width]
        for level, channels in enumerate(widths):
            res = img_resolution >> level
            tag = f"{res}x{res}"
            if level == 0:
                # One more input channel, constantly 1, stands in for the missing biases.
                self.enc[f"{tag}_conv"] = MPConv(img_channels + 1, channels, (3, 3))
            else:
                self.enc[f"{tag}_down"] = block(width, width, res, flavor="enc", resample_mode="down")
                skips.append(width)
            for idx in range(num_blocks):
                attends = res in attn_resolutions
                self.enc[f"{tag}_block{idx}"] = block(width, channels, res, flavor="enc", attention=attends)
                width = channels
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, channels in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            tag = f"{res}x{res}"
            if level == len(widths) - 1:
                self.dec[f"{tag}_in0"] = block(width, width, res, flavor="dec", attention=True)
                self.dec[f"{tag}_in1"] = block(width, width, res, flavor="dec")
            else:
                self.dec[f"{tag}_up"] = block(width, width, res, flavor="dec", resample_mode="up")
            for idx in range(num_blocks + 1):
                cin, width = width + skips.pop(), channels
                attends = res in attn_resolutions
                self.dec[f"{tag}_block{idx}"] = block(cin, width, res, flavor="dec", attention=attends)
        self.out_conv = MPConv(width, img_channels, (3, 3))

    def draw_dropout(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Bool keep-masks for one training pass over x (B, C, H, W), one row per sample; () when nothing drops."""
        return draw_masks(unet_layers(self), x, self.out_conv.weight, generator)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (B, C, R, R), noise_labels (B,) = ln(sigma)/4 in EDM2, one-hot class_labels (B, label_dim).

        augment_labels must be None: EDM2 has none. dropout_masks, used in training only, come from draw_dropout; None
        drops at random. Raises UserError.
        """
        class_labels = check_inputs(self, x, noise_labels, class_labels, augment_labels)
        masks = None
        if self.training:
            masks = feed_masks(dropout_masks, len(unet_layers(self)), x.shape[0])

        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            # sqrt(label_dim) brings a one-hot row to unit magnitude.
            label = self.emb_label((class_labels * math.sqrt(self.label_dim)).to(emb.dtype))
            emb = mp_sum(emb, label.expand(max(len(emb), len(label)), -1), self.label_balance)
        emb = silu(emb) * SILU_GAIN

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = self._run(layer, x, emb, masks)
            skips.append(x)
        for name, layer in self.dec.items():
            x = mp_cat(x, skips.pop(), self.concat_balance) if "block" in name else x
            x = self._run(layer, x, emb, masks)
        return self.out_conv(x, gain=self.out_gain)

    def _run(self, layer: nn.Module, x: Tensor, emb: Tensor, masks: Iterator[Tensor] | None) -> Tensor:
        if isinstance(layer, MPConv):
            return layer(x)
        return layer(x, emb, next(masks) if masks is not None and layer.dropout else None)
