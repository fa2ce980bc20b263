"""The pixel network of pMF: MiT over large patches, whose heads predict images rather than velocities.

pMF (arXiv 2601.22158). Tensor names are those of the PyTorch release (see `common.weights.meanflow`).
"""

import torch
from torch import Tensor, nn

from common import limits
from common.nets.mit import TwoHeadTransformer
from common.nets.transformer import BottleneckPatchEmbedding, per_sample, rope_grid
from common.tensors import append_dims


class PixelMiT(TwoHeadTransformer):
    """u(z, t, r | class, omega, t_min, t_max) and v over pixels, u = (z - x) / max(t, t_floor); fresh: x is 0.

    patch_size, width, depth, num_heads   B 768, 16, 12; L 1024, 32, 16; H 1280, 48, 16 (width, depth, heads), patch
                 size 16 at 256 pixels and 32 at 512; depth counts trunk and u-head
    bottleneck   channels of the narrow layer in the patch embedding: 128, and 256 in H
    prediction   "x": a head's output is the clean image x it implies; "u": it is the velocity itself (ablation)
    t_floor      smallest t that is divided by; targets must be clipped alike
    head_depth, v_depth, mlp_ratio, mlp_multiple, label_dim, recompute   as in `common.nets.mit.MiT`; the published
                 table counts H with mlp_multiple 1, its released weights have mlp_multiple 8
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        img_resolution: int = 256,
        in_channels: int = 3,
        patch_size: int = 16,
        bottleneck: int = 128,
        width: int = 768,
        depth: int = 16,
        num_heads: int = 12,
        head_depth: int = 8,
        v_depth: int | None = 8,
        mlp_ratio: float = 8 / 3,
        mlp_multiple: int = 1,
        label_dim: int = 1000,
        prediction: str = "x",
        t_floor: float = 0.05,
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
            head_multiple=4,
        )
        limits.positive(bottleneck=bottleneck)
        limits.choice("prediction", prediction, ("x", "u"))
        self.prediction = prediction
        self.t_floor = t_floor
        self.x_embedder = BottleneckPatchEmbedding(
            in_channels=in_channels, patch_size=patch_size, bottleneck=bottleneck, width=width
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.prefix_length + self.num_patches, width))
        self.set_rope(rope_grid(width // num_heads, img_resolution // patch_size, self.prefix_length))

    def velocity(self, image: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """(z - image) / max(t, t_floor) where the heads predict x, else the image itself."""
        if self.prediction == "u":
            return image
        return (z - image) / append_dims(per_sample("t", t, z).clamp(min=self.t_floor), z).to(z.dtype)
