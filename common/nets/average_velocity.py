"""u(z, t, r) from a network over noise labels: how MeanFlow conditions a U-Net on two times.

MeanFlow (arXiv 2505.13447), section 4: embeddings of t and t - r side by side, no preconditioning.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from common.errors import UserError
from common.nets.dit import check_times, time_inputs


class AverageVelocity(nn.Module):
    """u(z, t, r), (B, C, R, R) -> (B, C, R, R): the output of the raw network for these times, unchanged.

    model  raw network `net(x, noise_labels, class_labels, augment_labels, dropout_masks)` with num_times = len(times),
           e.g. `common.nets.unet.SongUNet`, `common.nets.mlp.MLPDenoiser`; same number of channels in and out
    times  what conditions it, in order, of "t", "r" and "t-r"; with ["t"] alone this is a flow-matching network v(z, t)
    Raises UserError when the two do not fit.
    """

    def __init__(self, *, model: nn.Module, times: Sequence[str] = ("t", "t-r")):
        super().__init__()
        self.times = check_times(times)
        if model.num_times != len(self.times):
            raise UserError(
                f"times names {len(self.times)} times but the network takes {model.num_times}. "
                f"Set num_times of the network to {len(self.times)}."
            )
        if model.in_channels != model.out_channels:
            raise UserError(
                f"a velocity has the channels of its input, got {model.in_channels} in and {model.out_channels} out. "
                "Set out_channels of the network to in_channels."
            )
        self.model = model

    @property
    def raw(self) -> nn.Module:
        """The raw network."""
        return self.model

    @property
    def img_resolution(self) -> int:
        return self.model.img_resolution

    @property
    def img_channels(self) -> int:
        return self.model.in_channels

    @property
    def label_dim(self) -> int:
        return self.model.label_dim

    @property
    def augment_dim(self) -> int:
        return self.model.augment_dim

    def draw_dropout(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """One keep mask per active dropout layer for a batch shaped like x (B, C, H, W); () without dropout."""
        return self.model.draw_dropout(x, generator=generator)

    def forward(
        self,
        z: Tensor,
        t: Tensor | float,
        r: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_masks: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Average velocity over [r, t], in the dtype of z.

        z              (B, C, R, R) at time t
        t, r           (B,) or numbers, 0 <= r <= t <= 1 (0 = data, 1 = noise); r may be left out if times is [t]
        class_labels   one-hot (B, label_dim), a row of zeros being no class; None: no class for any sample
        augment_labels (B, augment_dim) or None;   dropout_masks: see `draw_dropout`
        Raises UserError.
        """
        values = [value for _, value in time_inputs(self.times, t, r, z)]
        out = self.model(
            z,
            torch.stack(values, dim=1) if len(values) > 1 else values[0],
            class_labels=class_labels,
            augment_labels=augment_labels,
            dropout_masks=dropout_masks,
        )
        return out.to(z.dtype)
