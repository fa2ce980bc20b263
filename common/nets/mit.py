"""MiT, the network of improved MeanFlow: a transformer whose conditions are tokens in front of the image.

iMF (arXiv 2512.02012), section on in-context conditioning. Tensor names are those of the PyTorch release (see
`common.weights.meanflow`).
"""

from abc import ABC, abstractmethod
from numbers import Real

import torch
from torch import Tensor, nn

from common import limits
from common.errors import UserError
from common.nets.transformer import (
    GatedBlock,
    ImageTransformer,
    LabelEmbedding,
    NormedOutput,
    PatchEmbedding,
    ScalarEmbedding,
    class_index,
    per_sample,
    rope_line,
    run_block,
    unpatchify,
)

# Learned tokens per condition, in their order before the image: 20 in all.
PREFIX = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
# Condition -> name of its embedding, after the official code.
EMBEDDERS = {
    "class": "y_embedder",
    "omega": "omega_embedder",
    "t_min": "cfg_t_start_embedder",
    "t_max": "cfg_t_end_embedder",
    "time": "h_embedder",
}


class TwoHeadTransformer(ImageTransformer, ABC):
    """What MiT and the pixel network of pMF share: prefix tokens, a trunk of gated blocks, a u-head and a v-head.

    Subclasses set `x_embedder`, `pos_embed` and the rotary angles, and define what a head's image means (`velocity`).
    The network is conditioned on h = t - r, not on t: the noise level can be estimated from z.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        head_depth: int,
        v_depth: int | None,
        mlp_ratio: float,
        mlp_multiple: int,
        label_dim: int,
        recompute: bool,
        head_multiple: int,
    ):
        super().__init__(
            img_resolution=img_resolution,
            in_channels=in_channels,
            patch_size=patch_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            label_dim=label_dim,
            head_multiple=head_multiple,
        )
        limits.whole("head_depth", head_depth, most=depth)
        self.recompute = recompute
        self.conditions = tuple(PREFIX)[0 if label_dim else 1 :]
        self.prefix_length = sum(PREFIX[name] for name in self.conditions)
        std = width**-0.5
        for name in self.conditions:
            if name == "class":
                embedder = LabelEmbedding(label_dim=label_dim, width=width, std=std)
            else:
                embedder = ScalarEmbedding(width=width)
            self.add_module(EMBEDDERS[name], embedder)
            self.register_parameter(f"{name}_tokens", nn.Parameter(std * torch.randn(PREFIX[name], width)))
        hidden = -(-int(width * mlp_ratio) // mlp_multiple) * mlp_multiple
        block = dict(width=width, num_heads=num_heads, hidden=hidden, gain=0.32)
        final = dict(width=width, out_features=patch_size**2 * in_channels)
        self.shared_blocks = nn.ModuleList(GatedBlock(**block) for _ in range(depth - head_depth))
        self.u_heads = nn.ModuleList(GatedBlock(**block) for _ in range(head_depth))
        self.u_final_layer = NormedOutput(**final)
        self.v_heads = self.v_final_layer = None
        if v_depth is not None:
            self.v_heads = nn.ModuleList(GatedBlock(**block) for _ in range(v_depth))
            self.v_final_layer = NormedOutput(**final)

    def set_rope(self, angles: Tensor) -> None:
        """Keep cosine and sine of the rotary angles (prefix_length + N, head width / 2)."""
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)

    @abstractmethod
    def velocity(self, image: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """The velocity at (z, t) that a head's output `image` (B, in_channels, R, R) stands for."""

    def forward(
        self,
        z: Tensor,
        t: Tensor | float,
        r: Tensor | float,
        class_labels: Tensor | None = None,
        omega: Tensor | float = 1.0,
        t_min: Tensor | float = 0.0,
        t_max: Tensor | float = 1.0,
        heads: str = "u",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Average velocity u over [r, t], instantaneous velocity v at t, or both as (u, v), in the dtype of z.

        z             (B, in_channels, R, R) at time t
        t, r          (B,) or numbers, 0 <= r <= t <= 1 (0 = data, 1 = noise)
        class_labels  class numbers (B,) or one-hot (B, label_dim); None: no class
        omega         (B,) or a number, guidance scale >= 1 of the output; 1 = none
        t_min, t_max  (B,) or numbers, the times between which that guidance acts
        heads         "u", "v" or "both"; the other head is not computed
        Raises UserError.
        """
        limits.choice("heads", heads, ("u", "v", "both"))
        tokens = self.trunk(z, t, r, class_labels, omega, t_min, t_max)
        if heads != "both":
            return self.head(heads, tokens, z, t)
        return self.head("u", tokens, z, t), self.head("v", tokens, z, t)

    def trunk(
        self,
        z: Tensor,
        t: Tensor | float,
        r: Tensor | float,
        class_labels: Tensor | None = None,
        omega: Tensor | float = 1.0,
        t_min: Tensor | float = 0.0,
        t_max: Tensor | float = 1.0,
    ) -> Tensor:
        """The sequence (B, prefix_length + N, width) both heads start from; arguments as in `forward`."""
        self.check_inputs(z, class_labels)
        check_guidance(omega, t_min, t_max)
        values = {"time": per_sample("t", t, z) - per_sample("r", r, z)}
        values["omega"] = 1 - 1 / per_sample("omega", omega, z)
        values["t_min"], values["t_max"] = per_sample("t_min", t_min, z), per_sample("t_max", t_max, z)
        if self.label_dim:
            values["class"] = class_index(class_labels, self.label_dim, z)
        parts = [
            getattr(self, f"{name}_tokens") + getattr(self, EMBEDDERS[name])(values[name]).unsqueeze(1)
            for name in self.conditions
        ]
        image = self.x_embedder(z)
        seq = torch.cat([*(part.to(image.dtype) for part in parts), image], dim=1)
        if self.pos_embed is not None:
            seq = seq + self.pos_embed
        return self._run(self.shared_blocks, seq)

    def head(self, name: str, tokens: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """Velocity "u" or "v" (B, in_channels, R, R) from what `trunk` returned for (z, t, ...).

        Apart from `trunk` so that a caller can differentiate the u-head alone: v needs no tangent in training.
        """
        blocks, final = (self.u_heads, self.u_final_layer) if name == "u" else (self.v_heads, self.v_final_layer)
        if final is None:
            raise UserError("this network has no v-head (v_depth is null). Set v_depth to a depth, e.g. 8.")
        tokens = self._run(blocks, tokens)
        image = unpatchify(final(tokens[:, self.prefix_length :]), self.in_channels)
        return self.velocity(image.to(z.dtype), z, t)

    def _run(self, blocks: nn.ModuleList, seq: Tensor) -> Tensor:
        rope = (self.rope_cos, self.rope_sin)
        for block in blocks:
            seq = run_block(block, seq, rope, recompute=self.recompute)
        return seq


class MiT(TwoHeadTransformer):
    """u(z, t, r | class, omega, t_min, t_max) and v: images or latents of in_channels; fresh: both return 0.

    patch_size, width, depth, num_heads   /2 is patch_size 2; B 768, 12, 12; M 768, 24, 12; L 1024, 32, 16;
                 XL 1024, 48, 16 (width, depth, heads); depth counts trunk and u-head
    head_depth   blocks of the u-head; the trunk has depth - head_depth
    v_depth      blocks of the auxiliary v-head that branches off the trunk beside the u-head, used in training only;
                 0 leaves its last layer alone, as the released inference weights do; null: no v-head
    mlp_ratio    hidden width of the SwiGLU over width (rounded down, then up to a multiple of mlp_multiple)
    label_dim    number of classes, 0 = unconditional (and no class tokens)
    recompute    drop the activations of every block and recompute them in the backward pass
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        img_resolution: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_depth: int = 8,
        v_depth: int | None = 8,
        mlp_ratio: float = 8 / 3,
        mlp_multiple: int = 1,
        label_dim: int = 1000,
        recompute: bool = False,
    ):
        super().__init__(
            img_resolution=img_resolution,
            in_channels=in_channels,
            patch_size=patch_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            head_depth=head_depth,
            v_depth=v_depth,
            mlp_ratio=mlp_ratio,
            mlp_multiple=mlp_multiple,
            label_dim=label_dim,
            recompute=recompute,
            head_multiple=2,
        )
        self.x_embedder = PatchEmbedding(in_channels=in_channels, patch_size=patch_size, width=width)
        self.pos_embed = None
        self.set_rope(rope_line(width // num_heads, self.prefix_length + self.num_patches))

    def velocity(self, image: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """`image` itself: the heads predict velocities."""
        return image


def check_guidance(omega: Tensor | float, t_min: Tensor | float, t_max: Tensor | float) -> None:
    """UserError for numbers outside omega >= 1, 0 <= t_min <= t_max <= 1; tensors are taken as they are."""
    if isinstance(omega, Real):
        limits.number("omega", omega, least=1, hint="Set omega=1 for no guidance.")
    low, high = (value if isinstance(value, Real) else None for value in (t_min, t_max))
    if any(value is not None and not 0 <= value <= 1 for value in (low, high)) or (
        low is not None and high is not None and low > high
    ):
        raise UserError(f"t_min and t_max must satisfy 0 <= t_min <= t_max <= 1, got {t_min} and {t_max}. Change them.")
