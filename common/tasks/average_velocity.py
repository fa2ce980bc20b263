"""What the LightningModules of MeanFlow, iMF and pMF share: times, noise, labels that drop out, one-step sampling."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import limits
from common.diffusion.guidance import BoundVelocity
from common.errors import UserError
from common.losses.meanflow import Terms
from common.runtime.training.generative import GenerativeModule
from common.runtime.training.seeding import Draws
from common.tensors import only_shapes


class Inputs(NamedTuple):
    """One micro-batch, ready for a loss of `common.losses.meanflow`."""

    x: Tensor  # (B, C, H, W) images, augmented
    t: Tensor  # (B,) on the CPU, so that the rows with r < t are known without waiting for the device
    r: Tensor
    e: Tensor  # (B, C, H, W) noise
    conditions: dict  # class_labels, dropped, augment_labels, dropout_masks: what the loss takes by name


class AverageVelocityModule(GenerativeModule):
    """Abstract: a network of average velocities u(z, t, r). A paper's module implements `training_step`.

    net          network, see `common.losses.meanflow`
    time         sampler of the pair (t, r), r <= t (`common.diffusion.time`)
    label_drop   which samples lose their class (`common.diffusion.time.LabelDrop`), or None
    noise_scale  standard deviation of the noise at t = 1, data units
    omega, interval   samplers of guidance scale and interval that each sample is trained with (iMF), or None
    optimizer, schedule   see `GenerativeModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        time: Callable,
        label_drop: Callable | None,
        optimizer: Callable,
        schedule: Callable | None,
        noise_scale: float = 1.0,
        omega: Callable | None = None,
        interval: Callable | None = None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        self.time = time
        self.label_drop = label_drop
        self.noise_scale = limits.number("noise_scale", noise_scale, above=0)
        if omega is not None and interval is None:
            raise UserError(
                "project.omega needs project.interval. Set it to a GuidanceInterval, or project.omega=null."
            )
        if omega is not None and not net.label_dim:
            raise UserError("project.omega guides by class, but the network has label_dim=0. Set project.omega=null.")
        self.omega, self.interval = omega, interval

    def inputs(self, batch: dict, augment: Callable | None = None, *, draws: Draws | None = None) -> Inputs:
        """A batch of images with random numbers around it: those of this step, or `draws`."""
        images, draws = batch["image"], draws or self.draws()
        conditions = {}
        if augment is not None:
            images, conditions["augment_labels"] = augment(
                images, draws.generator("augment", images.device), rank=draws.rank, world_size=draws.world_size
            )
        count = len(images)
        pair = lambda n, generator: torch.stack(self.time(n, generator), dim=1)
        t, r = draws.apply("t", pair, count).unbind(1)
        labels = self.one_hot(batch["label"])
        if labels is not None:
            conditions["class_labels"] = labels
            if self.label_drop is not None:
                conditions["dropped"] = draws.apply("drop", self.label_drop, count)
            if self.omega is not None:
                between = lambda n, generator: torch.stack(self.interval(n, generator), dim=1)
                conditions["omega"] = draws.apply("omega", self.omega, count)
                conditions["t_min"], conditions["t_max"] = draws.apply("interval", between, count).unbind(1)
        if hasattr(self.net, "draw_dropout"):
            # the one draw that differs with the number of processes: a joint one would be too large
            planning = only_shapes(images)  # generators cannot be traced
            generator = None if planning else draws.generator("dropout", images.device, local=True)
            conditions["dropout_masks"] = self.net.draw_dropout(images, generator)
        return Inputs(images, t, r, self.noise_scale * draws.normal("eps", images), conditions)

    def report(self, terms: Terms) -> Tensor:
        """Mean loss of the micro-batch; logs it and the squared errors behind it, which adaptive weights hide."""
        loss = terms.loss.mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/squared_u", terms.u.mean())
        self.log("train/squared_v", terms.v.mean())
        return loss

    def export_facts(self) -> dict:
        """`noise_scale`, and `guidance`: the trained range of omega, or None."""
        return {
            "noise_scale": self.noise_scale,
            "guidance": None if self.omega is None else [1.0, self.omega.largest],
        }

    def denoiser(self, labels: Tensor | None = None) -> BoundVelocity:
        """u(z, t, r) for the samplers, conditioned on class `labels` (B,)."""
        return BoundVelocity(net=self.net, class_labels=self.one_hot(labels), **self.export_facts())
