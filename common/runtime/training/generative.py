"""The LightningModule shared by every paper that trains a network to turn noise into images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.diffusion.guidance import Conditional
from common.diffusion.sample import ImageNoise, noise_shape
from common.errors import UserError
from common.runtime.training.callbacks import write_grid
from common.runtime.training.module import ResearchModule
from common.tensors import known_to_host


class GenerativeModule(ResearchModule):
    """Abstract: a `ResearchModule` whose network turns noise into images.

    A paper's module implements `training_step` and, where its generator is neither `net(x, sigma)` nor `net(z)`,
    `denoiser`.

    net        preconditioned network (`common.diffusion.precond`), in state-dict keys `net.model.*`; or a generator of
               one call, for the sampler `Direct`, with the shape of its noise as `noise_shape`
    optimizer, schedule   see `ResearchModule`
    """

    net: Any  # what a generator must offer is its own: label_dim, and the shape of its images
    reads = "images"
    unit = "images"
    uses_sampler = True
    idle_parameters = ("map_augment",)  # planning leaves the augmentation out

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """Class labels (B,) as the one-hot floats (B, label_dim) the networks take; None for unconditional ones.

        Raises UserError for labels outside 0 .. label_dim - 1 on the CPU; elsewhere that would wait for the device.
        """
        if not self.net.label_dim or labels is None:
            return None
        self._check_labels(labels)
        return nn.functional.one_hot(labels, self.net.label_dim).to(torch.float32)

    def _check_labels(self, labels: Tensor) -> None:
        if not known_to_host(labels):
            return
        bad = labels[(labels < 0) | (labels >= self.net.label_dim)]
        if len(bad):
            raise UserError(
                f"class labels must lie in 0..{self.net.label_dim - 1} (label_dim={self.net.label_dim}), "
                f"got {int(bad[0])}. Set label_dim of the network to the number of classes."
            )

    def check_data(self, data) -> None:
        """Raises UserError for a network with classes on data without labels, or with labels it has no class for."""
        classes, found = self.net.label_dim, data.num_classes
        if classes and not found:
            raise UserError(
                f"The network is conditioned on {classes} classes, but the pictures of {data.name} are read without "
                "labels. Set data.source.num_classes to the number of classes (one subfolder each), or label_dim of "
                "the network to 0."
            )
        if classes and found > classes:
            raise UserError(
                f"The network is conditioned on {classes} classes, but {data.name} has {found}. Set label_dim of the "
                f"network to {found}."
            )

    def fake_batch(self, samples: int) -> dict[str, Tensor]:
        """image (B, C, H, W), label (B,), position (B,), as `common.data.images.module` gives them."""
        net = self.net
        return {
            "image": torch.empty(samples, net.img_channels, net.img_resolution, net.img_resolution),
            "label": torch.zeros(samples, dtype=torch.int64),
            "position": torch.zeros(samples, dtype=torch.int64),
        }

    # Generation -------------------------------------------------------------------------------------------------------

    def denoiser(self, labels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """`D(x, sigma)` for the samplers, conditioned on class `labels` (B,)."""
        return Conditional(net=self.net, class_labels=self.one_hot(labels))

    @torch.no_grad()
    def generate(self, indices: Tensor, *, sampler: Callable, seed: int, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] units for image numbers `indices` (N,), in evaluation mode.

        Image i depends on (seed, i) alone, not on the batch it is made in. Class labels are drawn from the same
        numbers unless given. What a network in latents makes is decoded. The module's training mode is restored.
        """
        was_training = self.net.training
        self.net.eval()
        try:
            noise = ImageNoise(seed=seed, indices=indices, shape=noise_shape(self.net), device=self.device)
            if labels is None and self.net.label_dim:
                labels = noise.labels(self.net.label_dim)
            elif labels is not None and self.net.label_dim:
                self._check_labels(labels)  # while on the CPU: on another device this would synchronise
                labels = labels.to(self.device)
            made = sampler(self.denoiser(labels), noise.z, noise.noise)
            return made if self.context.decoder is None else self.context.decoder(made)
        finally:
            self.net.train(was_training)

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """One grid `<stem>.png` of the first `samples` images."""
        if self.context.sampler is None:
            raise UserError("This module has no sampler. Set module.context = RunContext(sampler=...) first.")
        images = self.generate(torch.arange(samples), sampler=self.context.sampler, seed=seed)
        return [write_grid(stem.with_name(f"{stem.name}.png"), images)]


def index_batches(samples: int, batch_size: int, section: str) -> list[Tensor]:
    """Image numbers 0..samples-1 in batches. Raises UserError unless both are at least 1."""
    if samples < 1:
        raise UserError(f"{section}.samples must be >= 1, got {samples}. Set {section}.samples to a positive number.")
    if batch_size < 1:
        raise UserError(f"{section}.batch_size must be >= 1, got {batch_size}. Set it to a positive number.")
    return list(torch.arange(samples).split(batch_size))
