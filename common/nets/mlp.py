"""A small multilayer perceptron over flattened images, for the experiments that must run in minutes on a CPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from common import limits
from common.nets.dropout import draw_masks, dropout, feed_masks
from common.nets.inputs import check_inputs, check_label_dims
from common.nets.layers import FourierEmbedding, Linear

INIT = dict(init_mode="kaiming_uniform", init_weight=math.sqrt(1 / 3), init_bias=math.sqrt(1 / 3))
ZERO = dict(init_weight=0)


class MLPBlock(nn.Module):
    """h + drop(silu(W [h, emb])): (B, width) and (B, emb_channels) -> (B, width)."""

    def __init__(self, *, width: int, emb_channels: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.layer = Linear(in_features=width + emb_channels, out_features=width, **INIT)

    def forward(self, h: Tensor, emb: Tensor, mask: Tensor | None = None) -> Tensor:
        y = silu(self.layer(torch.cat([h, emb.to(h.dtype)], dim=1)))
        return h + dropout(y, self.dropout, self.training, mask)


class MLPDenoiser(nn.Module):
    """F(x; noise_labels), (B, in_channels, R, R) -> (B, out_channels, R, R), R = img_resolution; fresh: returns 0.

    width, depth   hidden width and number of residual blocks
    emb_channels   width of the noise embedding, given to every layer beside the activations
    fourier_scale  spread of the random frequencies the noise label meets; small = smooth in the noise level
    label_dim, augment_dim, dropout, num_times   as in SongUNet
    Plain on purpose: the noise embedding is concatenated, nothing is normalised or rescaled. Other residual MLPs tried
    on the digits collapsed in consistency training once the gap t - r fell below about t/16 (the card of ECT says
    which); this one did not in any run.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        width: int = 256,
        depth: int = 2,
        emb_channels: int = 64,
        dropout: float = 0,
        fourier_scale: float = 0.1,
        num_times: int = 1,
    ):
        super().__init__()
        limits.positive(img_resolution=img_resolution, in_channels=in_channels, out_channels=out_channels)
        limits.positive(width=width, depth=depth, emb_channels=emb_channels, num_times=num_times)
        check_label_dims(label_dim=label_dim, augment_dim=augment_dim)
        self.img_resolution = img_resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.dropout = limits.probability("dropout", dropout)
        area = img_resolution**2
        self.map_noise = FourierEmbedding(num_channels=2 * ((emb_channels + 1) // 2), scale=fourier_scale)
        self.num_times = num_times
        emb_channels = 2 * len(self.map_noise.freqs) * num_times
        self.map_label = self.map_augment = None
        if label_dim:
            self.map_label = Linear(in_features=label_dim, out_features=emb_channels, bias=False)
        if augment_dim:
            self.map_augment = Linear(in_features=augment_dim, out_features=emb_channels, bias=False)
        self.layer_in = Linear(in_features=in_channels * area + emb_channels, out_features=width, **INIT)
        self.blocks = nn.ModuleList(
            MLPBlock(width=width, emb_channels=emb_channels, dropout=dropout) for _ in range(depth)
        )
        self.layer_out = Linear(in_features=width, out_features=out_channels * area, **ZERO)

    def draw_dropout(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Bool keep-masks (B, width), one per block, for one training pass over x (B, C, H, W); () without dropout."""
        return draw_masks(self._dropout_layers(), x, self.layer_in.weight, generator)

    def _dropout_layers(self) -> list[tuple[float, tuple[int, ...]]]:
        return [(self.dropout, (self.layer_in.out_features,))] * len(self.blocks) * bool(self.dropout)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """As SongUNet.forward."""
        class_labels = check_inputs(self, x, noise_labels, class_labels, augment_labels)
        masks = feed_masks(dropout_masks, len(self._dropout_layers()), x.shape[0]) if self.training else None

        emb = self.map_noise(noise_labels.flatten()).reshape(noise_labels.shape[0], -1).expand(x.shape[0], -1)
        if self.map_label is not None:
            # sqrt(label_dim) brings a one-hot row to unit variance.
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)

        h = silu(self.layer_in(torch.cat([x.flatten(1), emb.to(x.dtype)], dim=1)))
        for block in self.blocks:
            h = block(h, emb, next(masks) if masks is not None and self.dropout else None)
        h = self.layer_out(h)
        return h.view(-1, self.out_channels, self.img_resolution, self.img_resolution)
