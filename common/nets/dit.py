"""DiT: a transformer over image patches that its conditions scale, shift and gate (adaLN-Zero).

DiT (arXiv 2212.09748); with two times it is the network of MeanFlow (arXiv 2505.13447), with one that of SiT
(arXiv 2401.08740). Tensor names are those of the PyTorch release of DiT, but for `adaLN_modulation` (see
`common.weights.meanflow`).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import silu

from common import limits
from common.errors import UserError
from common.nets.attention import token_attention
from common.nets.transformer import (
    ImageTransformer,
    LabelEmbedding,
    PatchEmbedding,
    ScalarEmbedding,
    class_index,
    per_sample,
    run_block,
    sincos_positions,
    unpatchify,
    xavier_uniform_,
    zero_linear,
)

# Time the network is conditioned on -> name of its embedding, after the official code (t - r is h there).
TIMES = {"t": "t_embedder", "r": "r_embedder", "t-r": "h_embedder"}
EPS = 1e-6


class DiT(ImageTransformer):
    """u(z, t, r, class): (B, in_channels, R, R) -> (B, out_channels, R, R), R = img_resolution; fresh: returns 0.

    patch_size, width, depth, num_heads   /2 is patch_size 2; S 384, 12, 6; B 768, 12, 12; M 1024, 16, 16;
                 L 1024, 24, 16; XL 1152, 28, 16 (width, depth, heads)
    out_channels None = in_channels; DiT with learned variance has twice as many
    mlp_ratio    hidden width of the MLP over width
    label_dim    number of classes, 0 = unconditional; one more row of the table stands for "no class"
    times        which of "t", "r", "t-r" condition the network; their embeddings are summed. MeanFlow: t and t-r
    time_scale   factor on every time: 1 in MeanFlow and SiT, 1000 in DiT
    recompute    drop the activations of every block and recompute them in the backward pass
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        img_resolution: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch_size: int = 2,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4,
        label_dim: int = 1000,
        times: Sequence[str] = ("t", "t-r"),
        time_scale: float = 1,
        recompute: bool = False,
    ):
        super().__init__(
            img_resolution=img_resolution,
            in_channels=in_channels,
            patch_size=patch_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            label_dim=label_dim,
            head_multiple=1,
        )
        self.out_channels = in_channels if out_channels is None else out_channels
        self.times = check_times(times)
        self.time_scale = time_scale
        self.recompute = recompute
        limits.multiple_of("width", width, 4, "sines and cosines of two coordinates")
        self.x_embedder = PatchEmbedding(in_channels=in_channels, patch_size=patch_size, width=width)
        for time in self.times:
            self.add_module(TIMES[time], ScalarEmbedding(width=width, std=0.02))
        self.y_embedder = LabelEmbedding(label_dim=label_dim, width=width, std=0.02) if label_dim else None
        self.register_buffer("pos_embed", sincos_positions(width, img_resolution // patch_size), persistent=False)
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(AdaLNBlock(width=width, num_heads=num_heads, hidden=hidden) for _ in range(depth))
        self.final_layer = AdaLNOutput(width=width, out_features=patch_size**2 * self.out_channels)

    def forward(
        self,
        z: Tensor,
        t: Tensor | float,
        r: Tensor | float | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Average velocity over [r, t], in the dtype of z.

        z             (B, in_channels, R, R) at time t
        t, r          (B,) or numbers, 0 <= r <= t <= 1 (0 = data, 1 = noise); r may be left out where the network
                      is conditioned on t alone
        class_labels  class numbers (B,) or one-hot (B, label_dim); None: no class
        Raises UserError.
        """
        self.check_inputs(z, class_labels)
        times = time_inputs(self.times, t, r, z, self.time_scale)
        cond = sum(getattr(self, TIMES[time])(value) for time, value in times)
        if self.y_embedder is not None:
            cond = cond + self.y_embedder(class_index(class_labels, self.label_dim, z))
        cond = silu(cond)
        x = self.x_embedder(z) + self.pos_embed
        for block in self.blocks:
            x = run_block(block, x, cond, recompute=self.recompute)
        return unpatchify(self.final_layer(x, cond), self.out_channels).to(z.dtype)


def check_times(times: Sequence[str]) -> tuple[str, ...]:
    """`times` as a tuple. Raises UserError unless it names some of t, r, t-r, each once."""
    times = tuple(times)
    for time in times:
        limits.choice("times", time, tuple(TIMES))
    if not times or len(set(times)) < len(times):
        raise UserError(f"times must name t, r or t-r, each once, got {list(times)}. Set times to e.g. [t, t-r].")
    return times


def time_inputs(
    times: Sequence[str], t: Tensor | float, r: Tensor | float | None, z: Tensor, scale: float = 1
) -> list[tuple[str, Tensor]]:
    """(name, scale * value (B,)) of every time in `times`. t - r is computed here, so that a derivative by t
    passes through it as well. Raises UserError when r is needed and missing."""
    if r is None and set(times) != {"t"}:
        raise UserError(f"the conditions {', '.join(times)} of this network need r, got None. Call net(z, t, r, ...).")
    t = per_sample("t", t, z)
    r = None if r is None else per_sample("r", r, z)
    values = [(time, t if time == "t" else r if time == "r" else t - r) for time in times]
    return values if scale == 1 else [(time, value * scale) for time, value in values]


class AdaLNBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; a fresh block is the identity."""

    def __init__(self, *, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.attn = Attention(width=width, num_heads=num_heads)
        self.mlp = Mlp(width=width, hidden=hidden)
        self.adaLN_modulation = zero_linear(width, 6 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, N, width), cond (B, width) after its silu."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.adaLN_modulation(cond).unsqueeze(1).chunk(6, dim=2)
        x = x + gate0 * self.attn(modulated_norm(x, shift0, scale0))
        return x + gate1 * self.mlp(modulated_norm(x, shift1, scale1))


class AdaLNOutput(nn.Module):
    """Tokens -> patches: (B, N, width) -> (B, N, out_features), shifted and scaled by the condition; starts at 0."""

    def __init__(self, *, width: int, out_features: int):
        super().__init__()
        self.linear = zero_linear(width, out_features)
        self.adaLN_modulation = zero_linear(width, 2 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulated_norm(x, shift, scale))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift for x (B, N, D) and shift, scale (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention (B, N, width) with one matrix for queries, keys and values."""

    def __init__(self, *, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = xavier_linear(width, 3 * width)
        self.proj = xavier_linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(token_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the tanh approximation of GELU between them."""

    def __init__(self, *, width: int, hidden: int):
        super().__init__()
        self.fc1 = xavier_linear(width, hidden)
        self.fc2 = xavier_linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer, weights Xavier uniform, bias 0."""
    layer = nn.Linear(in_features, out_features)
    xavier_uniform_(layer.weight, in_features, out_features)
    nn.init.zeros_(layer.bias)
    return layer
