"""u(z, t, r | omega, t_min, t_max) and v from a network over noise labels: iMF and pMF with a U-Net or an MLP.

The published networks of the two papers are transformers (`common.nets.mit`, pMF's `network`); this wrapper gives other
raw networks the same call, for experiments that must run in minutes.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from common import limits
from common.errors import UserError
from common.nets.dit import check_times, time_inputs
from common.nets.transformer import per_sample
from common.tensors import append_dims


class TwoHeadVelocity(nn.Module):
    """u and v, (B, C, R, R) each, from one raw network whose output channels are split between them.

    model       raw network `net(x, noise_labels, class_labels, augment_labels, dropout_masks)`; num_times counts
                all its conditions: the times, and 1 - 1/omega, t_min, t_max when guided. out_channels =
                in_channels for u alone, twice as many with a v-head
    times       what conditions it, in order, of "t", "r" and "t-r"; iMF and pMF: t - r alone
    guided      whether it is conditioned on guidance scale and interval
    prediction  "u": a head's output is the velocity; "x": the clean image, u = (z - x) / max(t, t_floor). pMF
    t_floor     smallest t divided by; the loss must clip alike
    Raises UserError when they do not fit together.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        times: Sequence[str] = ("t", "t-r"),
        guided: bool = False,
        prediction: str = "u",
        t_floor: float = 0.05,
    ):
        super().__init__()
        self.times = check_times(times)
        self.guided = guided
        limits.choice("prediction", prediction, ("u", "x"))
        self.prediction = prediction
        self.t_floor = limits.number("t_floor", t_floor, above=0, most=1)
        numbers = len(self.times) + 3 * guided
        if model.num_times != numbers:
            raise UserError(
                f"the network is conditioned on {numbers} numbers (times, three for guidance) but takes "
                f"{model.num_times}. "
                f"Set num_times of the network to {numbers}."
            )
        if model.out_channels not in (model.in_channels, 2 * model.in_channels):
            raise UserError(
                f"out_channels must be in_channels={model.in_channels} for u alone or twice that for u and v, got "
                f"{model.out_channels}. Set out_channels={model.in_channels}."
            )
        self.heads = ("u", "v")[: model.out_channels // model.in_channels]
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

    def draw_dropout(self, x: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """One keep mask per active dropout layer for a batch shaped like x (B, C, H, W); () without dropout."""
        return self.model.draw_dropout(x, generator=generator)

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
        dropout_masks: tuple[Tensor, ...] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Average velocity u over [r, t], instantaneous velocity v at t, or both as (u, v), in the dtype of z.

        As `common.nets.mit.MiT.forward`, with one-hot class_labels (B, label_dim). Raises UserError.
        """
        limits.choice("heads", heads, ("u", "v", "both"))
        if heads != "u" and "v" not in self.heads:
            raise UserError("this network has no v-head. Set out_channels to twice in_channels, or head=boundary.")
        values = [value for _, value in time_inputs(self.times, t, r, z)]
        if self.guided:
            values += [
                1 - 1 / per_sample("omega", omega, z),
                per_sample("t_min", t_min, z),
                per_sample("t_max", t_max, z),
            ]
        labels = torch.stack(values, dim=1) if len(values) > 1 else values[0]
        out = self.model(z, labels, class_labels=class_labels, dropout_masks=dropout_masks).to(z.dtype)
        found = dict(zip(self.heads, out.chunk(len(self.heads), dim=1)))
        chosen = [self._velocity(found[name], z, t) for name in (self.heads if heads == "both" else [heads])]
        return tuple(chosen) if heads == "both" else chosen[0]

    def _velocity(self, image: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        if self.prediction == "u":
            return image
        return (z - image) / append_dims(per_sample("t", t, z).clamp(min=self.t_floor), z).to(z.dtype)
