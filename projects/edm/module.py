"""EDM training: one denoising pass per step. Also the teacher of every consistency and distillation paper here.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)  # F the network
for y in data:
    y = augment(y);  sigma ~ exp(N(P_mean, P_std^2));  n ~ N(0, I)
    minimise lambda(sigma) |D(y + sigma n; sigma) - y|^2
sample: x = sigma_0 n;  for each step of the noise levels sigma_0 > sigma_1 > ... > 0:
    d = (x - D(x; sigma_i)) / sigma_i;  x' = x + (sigma_{i+1} - sigma_i) d
    d' = (x' - D(x'; sigma_{i+1})) / sigma_{i+1};  x = x + (sigma_{i+1} - sigma_i) (d + d') / 2   # Heun
"""

from collections.abc import Callable

from torch import Tensor, nn

from common import limits
from common.runtime.training.generative import GenerativeModule


class Edm(GenerativeModule):
    """Denoising score matching with the EDM (or EDM2) loss (arXiv 2206.00364, equation 8).

    net        preconditioned network
    loss       `common.losses.denoising` object: (net, y, sigma, eps, ...) -> per-sample loss (B,)
    time       sampler of sigma in data units (`common.diffusion.time`)
    augment    `common.data.images.augment.EdmAugment` or None: (images, generator, rank=, world_size=) ->
               (images, labels)
    loss_scaling  factor on the loss before the backward pass, against underflow of a float16 network's gradients. As in
               the authors' loop the gradients keep it; Adam divides it out again, up to its eps
    optimizer, schedule   see `GenerativeModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        loss: Callable,
        time: Callable,
        optimizer: Callable,
        schedule: Callable | None,
        augment: Callable | None,
        loss_scaling: float,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        self.loss = loss
        self.time = time
        self.augment = augment
        self.loss_scaling = limits.number("project.loss_scaling", loss_scaling, above=0)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch times `loss_scaling`; logs the mean loss as `train/loss`."""
        images, augment_labels = batch["image"], None
        draws = self.draws()
        if self.augment is not None:
            images, augment_labels = self.augment(
                images, draws.generator("augment", images.device), rank=draws.rank, world_size=draws.world_size
            )
        sigma = draws.apply("sigma", self.time, len(images)).to(images.device, non_blocking=True)
        loss = self.loss(
            self.net,
            images,
            sigma,
            draws.normal("eps", images),
            class_labels=self.one_hot(batch["label"]),
            augment_labels=augment_labels,
        ).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss * self.loss_scaling
