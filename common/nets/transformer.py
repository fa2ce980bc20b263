"""Parts of the vision transformers: patches, positions, embeddings, normalisation, gated blocks.

DiT (arXiv 2212.09748) for patches and embeddings; iMF (arXiv 2512.02012) and pMF (arXiv 2601.22158) for the blocks with
RMSNorm, SwiGLU, normalised queries and keys, rotary positions and residual gates that start at zero. Everything has a
forward-mode derivative, nothing drops out or depends on the batch. Tensor names are those of the PyTorch releases.
"""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common import limits
from common.errors import UserError
from common.nets.attention import in_forward_mode, token_attention
from common.nets.inputs import check_label_dims
from common.tensors import known_to_host

THETA = 10000.0  # longest wavelength / 2 pi of every sinusoid here


class ImageTransformer(nn.Module):
    """What the image transformers share: the sizes others read, and their checks. Subclasses are final.

    img_resolution, in_channels   of the images or latents z
    patch_size   side of a patch in pixels; N = (img_resolution / patch_size)^2 patch tokens
    label_dim    number of classes, 0 = unconditional
    Raises UserError for sizes that do not fit together.
    """

    augment_dim = 0  # no augmentation labels

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        label_dim: int,
        head_multiple: int,
    ):
        super().__init__()
        limits.positive(img_resolution=img_resolution, in_channels=in_channels, patch_size=patch_size)
        limits.positive(width=width, depth=depth, num_heads=num_heads)
        check_label_dims(label_dim=label_dim)
        limits.multiple_of(
            "img_resolution", img_resolution, patch_size, "patch_size",
            hint="Set patch_size to a divisor of img_resolution.",
        )  # fmt: skip
        limits.multiple_of(
            "width", width, num_heads * head_multiple, f"{num_heads} heads of a multiple of {head_multiple} channels"
        )
        self.img_resolution = img_resolution
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.width = width
        self.num_heads = num_heads
        self.label_dim = label_dim
        self.num_patches = (img_resolution // patch_size) ** 2

    @property
    def img_channels(self) -> int:
        return self.in_channels

    def draw_dropout(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """(): nothing drops out."""
        return ()

    def check_inputs(self, z: Tensor, class_labels: Tensor | None) -> None:
        """UserError unless z is (B, in_channels, img_resolution, img_resolution), or for labels nobody reads."""
        want = (self.in_channels, self.img_resolution, self.img_resolution)
        if z.ndim != 4 or tuple(z.shape[1:]) != want:
            raise UserError(
                f"this network takes images of shape (batch, {want[0]}, {want[1]}, {want[2]}), got {tuple(z.shape)}. "
                "Set img_resolution and in_channels of the network to those of the data or the latents."
            )
        if class_labels is not None and not self.label_dim:
            raise UserError("class_labels were given to an unconditional network. Set label_dim, or leave them out.")


# Conditions -----------------------------------------------------------------------------------------------------------


def per_sample(name: str, value: Tensor | float, z: Tensor) -> Tensor:
    """`value` as (B,) on the device of z (B, ...): a number, a scalar tensor, or one value per sample in any shape.

    Numbers take float32, or the dtype of z where that is wider. Raises UserError that names the field.
    """
    if isinstance(value, Real):
        wide = torch.promote_types(z.dtype, torch.float32)
        return torch.full((z.shape[0],), float(value), dtype=wide, device=z.device)
    if value.numel() not in (1, z.shape[0]):
        raise UserError(f"{name} must hold one value or one per sample ({z.shape[0]}), got shape {tuple(value.shape)}.")
    return value.reshape(-1).expand(z.shape[0])


def class_index(labels: Tensor | None, label_dim: int, z: Tensor) -> Tensor:
    """Class numbers (B,) int64 in 0..label_dim, label_dim meaning "no class".

    labels  whole numbers (B,) or (1,) in 0..label_dim; or one-hot (B or 1, label_dim), a row of zeros being no class;
            or None: no class for any sample
    Raises UserError for other shapes and, on the CPU, for numbers outside the range.
    """
    batch = z.shape[0]
    if labels is None:
        return torch.full((batch,), label_dim, dtype=torch.int64, device=z.device)
    fits = labels.shape[1:] == (label_dim,) if labels.ndim == 2 else labels.ndim == 1 and not labels.is_floating_point()
    if not fits or labels.shape[0] not in (1, batch):
        raise UserError(
            f"class_labels must be {batch} whole numbers or one-hot ({batch}, {label_dim}) because the network has "
            f"label_dim={label_dim}, got {tuple(labels.shape)} of {labels.dtype}. "
            "Set label_dim of the network to the number of classes."
        )
    if labels.ndim == 2:
        index = torch.where((labels != 0).any(dim=1), labels.argmax(dim=1), label_dim)
    else:
        index = labels.to(torch.int64)
        _check_range(index, label_dim)
    return index.expand(batch)


def _check_range(index: Tensor, label_dim: int) -> None:
    # On an accelerator reading a value would wait for the device; while planning or compiling there is none.
    if not known_to_host(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high > label_dim:
        raise UserError(
            f"class_labels must lie in 0..{label_dim - 1}, or be {label_dim} for no class, got "
            f"{low if low < 0 else high}. Set label_dim of the network to the number of classes."
        )


class ScalarEmbedding(nn.Module):
    """A number per sample -> a vector: (B,) -> (B, width), through sinusoids and two layers.

    frequencies  number of sinusoids: half cosines, half sines, of wavelengths 2 pi ... 2 pi 10^4
    std          standard deviation of the initial weights, None = 1 / sqrt(inputs); biases start at 0
    The sinusoids are computed in float32 at least, whatever runs around them.
    """

    def __init__(self, *, width: int, frequencies: int = 256, std: float | None = None):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5 if std is None else std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        half = self.frequencies // 2
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        powers = torch.arange(half, dtype=x.dtype, device=x.device) / half
        angles = x[:, None] * torch.exp(-math.log(THETA) * powers)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """A class number -> a vector, (B,) in 0..label_dim -> (B, width); row label_dim stands for "no class"."""

    def __init__(self, *, label_dim: int, width: int, std: float):
        super().__init__()
        self.embedding_table = nn.Embedding(label_dim + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=std)

    def forward(self, index: Tensor) -> Tensor:
        return self.embedding_table(index)


# Patches and positions ------------------------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """Image -> one vector per patch, row by row: (B, C, H, W) -> (B, N, width)."""

    def __init__(self, *, in_channels: int, patch_size: int, width: int):
        super().__init__()
        self.proj = patch_convolution(in_channels, width, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class BottleneckPatchEmbedding(nn.Module):
    """Image -> one vector per patch through a narrow layer: (B, C, H, W) -> (B, N, width).

    bottleneck  channels between the two linear maps; patches of natural images need no more (JiT, arXiv 2511.13720)
    """

    def __init__(self, *, in_channels: int, patch_size: int, bottleneck: int, width: int):
        super().__init__()
        self.proj1 = patch_convolution(in_channels, bottleneck, patch_size)
        self.proj2 = patch_convolution(bottleneck, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


def patch_convolution(in_channels: int, out_channels: int, patch_size: int) -> nn.Conv2d:
    """A convolution whose windows are the patches, initialised as the linear map it is: Xavier uniform, bias 0."""
    layer = nn.Conv2d(in_channels, out_channels, patch_size, stride=patch_size)
    xavier_uniform_(layer.weight, in_channels * patch_size**2, out_channels)
    nn.init.zeros_(layer.bias)
    return layer


def xavier_uniform_(weight: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """Uniform with variance 2 / (fan_in + fan_out), in place."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return nn.init.uniform_(weight, -limit, limit)


def unpatchify(tokens: Tensor, channels: int) -> Tensor:
    """Patch tokens -> image: (B, N, p p C) -> (B, C, H, W), H = W = p sqrt(N); channels innermost in a token."""
    batch, count, size = tokens.shape
    side, patch = math.isqrt(count), math.isqrt(size // channels)
    x = tokens.reshape(batch, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed 2-D positions (side^2, width), float32: columns in the first half, rows in the second; sines, cosines."""
    powers = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.outer(torch.arange(side, dtype=torch.float64), THETA**-powers)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    across, down = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([across, down], dim=1).float()


def rope_line(head_dim: int, length: int) -> Tensor:
    """Rotary angles (length, head_dim / 2): position times frequencies 1 ... 10^-4 (RoFormer, arXiv 2104.09864)."""
    return torch.outer(torch.arange(length, dtype=torch.float32), _rope_frequencies(head_dim))


def rope_grid(head_dim: int, side: int, prefix: int = 0) -> Tensor:
    """Rotary angles (prefix + side^2, head_dim / 2): 0 for the prefix, then rows in the first half, columns after."""
    line = torch.outer(torch.arange(side, dtype=torch.float32), _rope_frequencies(head_dim // 2))
    angles = torch.cat([line.repeat_interleave(side, dim=0), line.repeat(side, 1)], dim=1)
    return torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])


def _rope_frequencies(dim: int) -> Tensor:
    return 1 / THETA ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Neighbouring channel pairs of x (..., N, D) turned by the angles whose cosine and sine (N, D / 2) are given.

    float32 at least, and returned so.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(wide) for part in rope)
    pairs = x.to(wide).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    # The same product on complex numbers makes a third of the passes over memory; compilers fuse the real form only.
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)


# Blocks ---------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) times a weight, over the last dimension; statistics in float32 at least."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight.to(x.dtype)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), (..., width) -> (..., width). std: see `scaled_linear`."""

    def __init__(self, *, width: int, hidden: int, gain: float):
        super().__init__()
        self.w1 = scaled_linear(width, hidden, gain)
        self.w3 = scaled_linear(width, hidden, gain)
        self.w2 = scaled_linear(hidden, width, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def scaled_linear(in_features: int, out_features: int, gain: float) -> nn.Linear:
    """A layer without bias whose weights are drawn from N(0, gain^2 / in_features)."""
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(in_features))
    return layer


class RotaryAttention(nn.Module):
    """Self-attention (B, N, width) with RMS-normalised, rotated queries and keys.

    Query, key and value keep matrices of their own: Muon orthogonalises each.
    """

    def __init__(self, *, width: int, num_heads: int, gain: float):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (scaled_linear(width, width, gain) for _ in range(4))
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        # Angles are float32: under autocast they widen q and k, which attention narrows again.
        return self.out_proj(token_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))


class GatedBlock(nn.Module):
    """x + gate * attention(norm x), then x + gate * SwiGLU(norm x); both gates (width,) start at 0: the identity.

    hidden  inner width of the SwiGLU;   gain  see `scaled_linear`
    """

    def __init__(self, *, width: int, num_heads: int, hidden: int, gain: float):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width=width, num_heads=num_heads, gain=gain)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width=width, hidden=hidden, gain=gain)
        self.attn_scale = nn.Parameter(torch.zeros(width))
        self.mlp_scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope) * self.attn_scale
        return x + self.mlp(self.norm2(x)) * self.mlp_scale


class NormedOutput(nn.Module):
    """Tokens -> patches: RMSNorm, then a linear map that starts at 0: (B, N, width) -> (B, N, out_features)."""

    def __init__(self, *, width: int, out_features: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = zero_linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer whose weights and biases start at 0."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def run_block(block: Callable, *args, recompute: bool):
    """block(*args); with `recompute` its activations are dropped and computed again in the backward pass.

    Not under forward-mode differentiation: the tangents would be gone when the backward pass recomputes.
    """
    if recompute and torch.is_grad_enabled() and not in_forward_mode():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)
