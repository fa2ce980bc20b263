"""The U-Nets of the EDM family: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

EDM (arXiv 2206.00364), table 1 and appendix F, after score_sde (arXiv 2011.13456) and ADM (arXiv 2105.05233). Module
names are those of the official release, so its weights load by name.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from common import limits
from common.nets.inputs import check_inputs, check_pyramid
from common.nets.layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, UNetBlock
from common.nets.unet_base import UNetBase

# How SongUNet starts: its inner layers, and those that end a residual branch or the network.
INIT = dict(init_mode="xavier_uniform")
INIT_LAST = dict(init_mode="xavier_uniform", init_weight=1e-5)


class SongUNet(UNetBase):
    """DDPM++ and NCSN++: F(x; noise_labels), (B, in_channels, R, R) -> (B, out_channels, R, R) with R=img_resolution.

    label_dim, augment_dim   widths of class and augmentation labels, 0 = none
    model_channels           base width; channel_mult multiplies it per level, channel_mult_emb for the embedding,
                             channel_mult_noise for the noise embedding
    num_blocks               residual blocks per level (one more on the way up)
    attn_resolutions         levels with self-attention (one head); the lowest level always has one attention block
    dropout, label_dropout   probabilities in [0, 1)
    embedding_type           "positional" (DDPM++) or "fourier" (NCSN++, frequencies scaled by fourier_scale:
                             16 in EDM, 0.02 in the ECT release)
    encoder_type             "standard" (DDPM++), "residual" (NCSN++) or "skip"
    decoder_type             "standard" or "skip"
    resample_filter          (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++
    num_times                noise labels per sample, their embeddings concatenated: 2 in MeanFlow (arXiv 2505.13447)
    Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
        fourier_scale: float = 16,
        num_times: int = 1,
    ):
        super().__init__(
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            label_dropout=label_dropout,
            dropout=dropout,
        )
        limits.choice("embedding_type", embedding_type, ("positional", "fourier"))
        limits.choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        limits.choice("decoder_type", decoder_type, ("standard", "skip"))
        limits.positive(model_channels=model_channels, num_blocks=num_blocks, num_times=num_times)
        check_pyramid(img_resolution, channel_mult, attn_resolutions)
        self.num_times = num_times
        emb_channels = model_channels * channel_mult_emb
        resample = dict(resample_filter=resample_filter)
        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            num_heads=1,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_proj=True,
            adaptive_scale=False,
            init=INIT,
            init_zero=INIT_LAST,
            init_attn=dict(init_mode="xavier_uniform", init_weight=math.sqrt(0.2)),
            **resample,
        )
        # The order of construction is that of the random draws, see `common.nets.layers`.
        self._build_embedding(embedding_type, model_channels * channel_mult_noise, emb_channels, fourier_scale)
        stem = Conv2d(in_channels=in_channels, out_channels=model_channels, kernel=3, **INIT)
        levels = dict(num_blocks=num_blocks, attention=attn_resolutions)
        widths = [model_channels * mult for mult in channel_mult]
        skips = self._build_encoder(
            block, widths, stem=stem, image_input=self._image_input(encoder_type, resample), **levels
        )
        self._build_decoder(
            block, widths, skips=skips, attend_in_last=True, image_output=self._image_output(decoder_type, resample),
            **levels,
        )  # fmt: skip

    def _build_embedding(self, kind: str, noise_channels: int, emb_channels: int, fourier_scale: float) -> None:
        """Noise labels, class and augmentation labels -> embedding (B, emb_channels)."""
        times_channels = noise_channels * self.num_times
        if kind == "positional":
            self.map_noise = PositionalEmbedding(num_channels=noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(num_channels=noise_channels, scale=fourier_scale)
        self.map_label = self.map_augment = None
        if self.label_dim:
            self.map_label = Linear(in_features=self.label_dim, out_features=times_channels, **INIT)
        if self.augment_dim:
            self.map_augment = Linear(in_features=self.augment_dim, out_features=times_channels, bias=False, **INIT)
        self.map_layer0 = Linear(in_features=times_channels, out_features=emb_channels, **INIT)
        self.map_layer1 = Linear(in_features=emb_channels, out_features=emb_channels, **INIT)

    def _image_input(self, encoder_type: str, resample: dict) -> Callable[[str, int], None] | None:
        """What adds the layers of an image pyramid beside the encoder: none for "standard"."""
        if encoder_type == "standard":
            return None
        side = self.in_channels  # channels of the pyramid at the level above

        def add(name: str, width: int) -> None:
            nonlocal side
            if encoder_type == "skip":
                self.enc[f"{name}_aux_down"] = Conv2d(
                    in_channels=side, out_channels=side, kernel=0, down=True, **resample
                )
                self.enc[f"{name}_aux_skip"] = Conv2d(in_channels=side, out_channels=width, kernel=1, **INIT)
            else:
                self.enc[f"{name}_aux_residual"] = Conv2d(
                    in_channels=side, out_channels=width, kernel=3, down=True, fused_resample=True, **resample, **INIT
                )
                side = width

        return add

    def _image_output(self, decoder_type: str, resample: dict) -> Callable[[str, int], None]:
        """What adds the layers that read the image: at the last level, or ("skip") at every level, summed."""
        full = f"{self.img_resolution}x{self.img_resolution}"
        channels = self.out_channels

        def add(name: str, width: int) -> None:
            if decoder_type == "skip" and f"{name}_up" in self.dec:
                self.dec[f"{name}_aux_up"] = Conv2d(
                    in_channels=channels, out_channels=channels, kernel=0, up=True, **resample
                )
            if decoder_type == "skip" or name == full:
                self.dec[f"{name}_aux_norm"] = GroupNorm(num_channels=width, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(in_channels=width, out_channels=channels, kernel=3, **INIT_LAST)

        return add

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (B, C, R, R), noise_labels (B,), one-hot class_labels (B, label_dim), augment_labels (B, augment_dim).

        noise_labels are (B, num_times) where num_times > 1.
        dropout_masks, used in training only, come from draw_dropout; None drops at random. Raises UserError.
        """
        class_labels = check_inputs(self, x, noise_labels, class_labels, augment_labels)
        masks = self._feed(dropout_masks, x.shape[0])

        cos, sin = self.map_noise(noise_labels.flatten()).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)  # the order score_sde uses
        emb = emb.reshape(noise_labels.shape[0], -1)  # several times side by side
        if self.map_label is not None:
            class_labels = self._drop_labels(class_labels, masks, x.shape[0])
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = silu(self.map_layer1(silu(self.map_layer0(emb))))

        skips, side = [], x
        for name, layer in self.enc.items():
            role = name.partition("_")[2]
            if role == "conv":
                x = layer(x)
                skips.append(x)
            elif role == "aux_down":
                side = layer(side)
            elif role == "aux_skip":
                x = skips[-1] = x + layer(side)
            elif role == "aux_residual":
                x = skips[-1] = side = (x + layer(side)) * math.sqrt(0.5)
            else:
                x = self._block(layer, x, emb, masks)
                skips.append(x)

        out = None
        for name, layer in self.dec.items():
            role = name.partition("_")[2]
            if role == "aux_up":
                out = layer(out)
            elif role == "aux_norm":
                normed = silu(layer(x))
            elif role == "aux_conv":
                out = layer(normed) if out is None else out + layer(normed)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if role.startswith("block") else x
                x = self._block(layer, x, emb, masks)
        return out


class DhariwalUNet(UNetBase):
    """ADM: F(x; noise_labels), (B, in_channels, R, R) -> (B, out_channels, R, R) with R = img_resolution.

    Arguments as in SongUNet. Attention has heads of 64 channels and stands in every block of attn_resolutions;
    the embedding scales and shifts after the norm; last layers start at zero, so a fresh network returns 0.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__(
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            label_dropout=label_dropout,
            dropout=dropout,
        )
        limits.positive(model_channels=model_channels, num_blocks=num_blocks)
        check_pyramid(img_resolution, channel_mult, attn_resolutions)
        emb_channels = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init = dict(init_mode="kaiming_uniform", init_weight=third, init_bias=third)
        init_zero = dict(init_mode="kaiming_uniform", init_weight=0, init_bias=0)

        block = partial(UNetBlock, emb_channels=emb_channels, dropout=dropout, init=init, init_zero=init_zero)

        self.map_noise = PositionalEmbedding(num_channels=model_channels)
        self.map_augment = self.map_label = None
        if augment_dim:
            self.map_augment = Linear(in_features=augment_dim, out_features=model_channels, bias=False, **init_zero)
        self.map_layer0 = Linear(in_features=model_channels, out_features=emb_channels, **init)
        self.map_layer1 = Linear(in_features=emb_channels, out_features=emb_channels, **init)
        if label_dim:
            one_hot = dict(init_mode="kaiming_normal", init_weight=math.sqrt(label_dim))
            self.map_label = Linear(in_features=label_dim, out_features=emb_channels, bias=False, **one_hot)

        widths = [model_channels * mult for mult in channel_mult]
        stem = Conv2d(in_channels=in_channels, out_channels=widths[0], kernel=3, **init)
        levels = dict(num_blocks=num_blocks, attention=attn_resolutions)
        skips = self._build_encoder(block, widths, stem=stem, **levels)
        self._build_decoder(block, widths, skips=skips, attend_in_last=False, **levels)
        self.out_norm = GroupNorm(num_channels=widths[0])
        self.out_conv = Conv2d(in_channels=widths[0], out_channels=out_channels, kernel=3, **init_zero)

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
        masks = self._feed(dropout_masks, x.shape[0])

        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels, masks, x.shape[0]))
        emb = silu(emb)

        skips = []
        for layer in self.enc.values():
            x = self._block(layer, x, emb, masks) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = torch.cat([x, skips.pop()], dim=1) if "block" in name else x
            x = self._block(layer, x, emb, masks)
        return self.out_conv(silu(self.out_norm(x)))
