"""The LightningModule shared by every paper that trains a network to turn noise into images."""

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from common.diffusion.guidance import Conditional
from common.diffusion.sample import ImageNoise
from common.errors import UserError
from common.runtime.seeding import Draws


class GenerativeModule(LightningModule):
    """Abstract: owns the network, the optimiser recipe, the per-step random numbers and image generation.

    A paper's module implements `training_step` and, where its generator is not `net(x, sigma)`, `denoiser`.

    net        preconditioned network (`common.diffusion.precond`), in state-dict keys `net.model.*`
    optimizer  partial: parameters -> torch optimiser
    schedule   learning-rate multiplier, optimiser step -> float (`common.optim.schedules`), or None for constant
    """

    def __init__(self, *, net: nn.Module, optimizer: Callable, schedule: Callable | None = None):
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.seed = 0  # set by the runtime
        self.images_per_step = 0  # joint batch over ranks and accumulation; set by the runtime

    # Training ---------------------------------------------------------------------------------------------------------

    @property
    def micro_step(self) -> int:
        """Micro-batches done before the current one, over the whole run (restored on resume)."""
        if self._trainer is None:
            return 0
        return max(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1, 0)

    def draws(self) -> Draws:
        """The random numbers of the micro-step under way."""
        if self._trainer is None:
            return Draws(seed=self.seed, step=0)
        return Draws(
            seed=self.seed, step=self.micro_step, rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """Class labels (B,) as the one-hot floats (B, label_dim) the networks take; None for unconditional ones."""
        if not self.net.label_dim or labels is None:
            return None
        return nn.functional.one_hot(labels, self.net.label_dim).to(torch.float32)

    def log(self, name, value, **options) -> None:
        """Lightning's `log`, tensors averaged over the processes; nothing outside a trainer (planning, notebooks)."""
        if self._trainer is not None:
            sync = torch.is_tensor(value) and self.trainer.world_size > 1
            super().log(name, value, **{"sync_dist": sync, **options})

    def configure_optimizers(self):
        try:
            optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        except ValueError as error:  # torch refuses a negative learning rate, betas outside [0, 1), ...
            raise UserError(f"project.optimizer cannot be built: {error}. Change that option of it.") from error
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Generation -------------------------------------------------------------------------------------------------------

    def denoiser(self, labels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """`D(x, sigma)` for the samplers, conditioned on class `labels` (B,)."""
        return Conditional(net=self.net, class_labels=self.one_hot(labels))

    @torch.no_grad()
    def generate(self, indices: Tensor, *, sampler: Callable, seed: int, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] units for image numbers `indices` (N,), in evaluation mode.

        Image i depends on (seed, i) alone, not on the batch it is made in. Class labels are drawn from the same
        numbers unless given. The module's training mode is restored.
        """
        was_training = self.net.training
        self.net.eval()
        try:
            shape = (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
            noise = ImageNoise(seed=seed, indices=indices, shape=shape, device=self.device)
            if labels is None and self.net.label_dim:
                labels = noise.labels(self.net.label_dim)
            return sampler(self.denoiser(labels), noise.z, noise.noise)
        finally:
            self.net.train(was_training)


def index_batches(samples: int, batch_size: int, section: str) -> list[Tensor]:
    """Image numbers 0..samples-1 in batches. Raises UserError unless both are at least 1."""
    if samples < 1:
        raise UserError(f"{section}.samples must be >= 1, got {samples}. Set {section}.samples to a positive number.")
    if batch_size < 1:
        raise UserError(f"{section}.batch_size must be >= 1, got {batch_size}. Set it to a positive number.")
    return list(torch.arange(samples).split(batch_size))
