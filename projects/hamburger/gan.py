"""HamGAN: a SAGAN-like pair with Hamburgers, one discriminator step per generator step (arXiv 2109.04553).

for x, class y in data:
    z, z' ~ N(0, I)
    discriminator: minimise mean(relu(1 - D(x, y)) + relu(1 + D(G(z, y), y)))
    generator:     minimise -mean(D(G(z', y), y))
inside G and D: x + sigma hamburger(x), sigma = 0 at the start
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.deq.layers import reset
from common.errors import UserError
from common.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from common.runtime.training.generative import GenerativeModule


class HamGan(GenerativeModule):
    """Hinge loss, alternating: every training step moves the discriminator, then the generator against the new one.

    net            `projects.hamburger.sagan.Sagan`: generator and discriminator
    optimizer      of the generator, partial: parameters -> torch optimiser
    d_optimizer    of the discriminator
    schedule       learning-rate multiplier of both, or None

    Optimiser steps are counted by the generator's. Images and running averages are the generator's.
    """

    idle_parameters = ()
    unaveraged = ("net.discriminator.",)

    def __init__(self, *, net: nn.Module, optimizer: Callable, d_optimizer: Callable, schedule: Callable | None):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        self.make_d_optimizer = d_optimizer
        self.automatic_optimization = False

    def configure_optimizers(self):
        made = []
        for name, make, part in (
            ("optimizer", self.make_optimizer, self.net.generator),
            ("d_optimizer", self.make_d_optimizer, self.net.discriminator),
        ):
            try:
                made.append(make([p for p in part.parameters() if p.requires_grad]))
            except ValueError as error:
                raise UserError(f"project.{name} cannot be built: {error}. Change that option of it.") from error
        if self.schedule is None:
            return made
        return made, [torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule) for optimizer in made]

    # Training ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Both updates; logs train/loss (the discriminator's: 2 undecided, 0 never wrong), train/loss_g, mean logits of
        real and generated images, and the gates sigma of the context blocks. Returns train/loss.
        """
        generator, discriminator = self.optimizers()
        reset(self.net)  # one power iteration per step; weights are normalised once for all passes that share them
        loss = self.discriminator_loss(batch)
        self._backward(loss, discriminator)
        # Not through Lightning's wrapper, which would count it as a step of the run
        self.trainer.strategy.optimizer_step(discriminator.optimizer, closure=lambda: None)
        with frozen(self.net.discriminator):
            loss_g = self.generator_loss(batch)
            self._backward(loss_g, generator)
        generator.step()
        for scheduler in self.lr_schedulers() or ():
            scheduler.step()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/loss_g", loss_g.detach())
        for letter, part in (("g", self.net.generator), ("d", self.net.discriminator)):
            if part.context is not None:
                self.log(f"train/sigma_{letter}", part.context.sigma.detach())
        return loss.detach()

    def _backward(self, loss: Tensor, optimizer) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)

    def fake_step(self, batch: dict) -> Tensor:
        loss = self.discriminator_loss(batch)
        with frozen(self.net.discriminator):
            return loss + self.generator_loss(batch)

    def discriminator_loss(self, batch: dict) -> Tensor:
        """Hinge loss on the real images of the batch and as many generated ones, constant for the generator."""
        real, labels = batch["image"], self.one_hot(batch["label"])
        with torch.no_grad():
            fake, wanted = self.imagine(real, "d")
        both = labels if labels is None else torch.cat([labels, wanted])
        logits = self.net.discriminator(torch.cat([real, fake.to(real.dtype)]), both)
        on_real, on_fake = logits.float().chunk(2)
        self.log("train/logit_real", on_real.detach().mean())
        self.log("train/logit_fake", on_fake.detach().mean())
        return hinge_discriminator_loss(on_real, on_fake)

    def generator_loss(self, batch: dict) -> Tensor:
        """Hinge loss of images made anew, under the discriminator as it is."""
        fake, wanted = self.imagine(batch["image"], "g")
        return hinge_generator_loss(self.net.discriminator(fake, wanted).float())

    def imagine(self, like: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
        """As many generated images as `like` (B, ...) has, of classes drawn uniformly, and their one-hot labels."""
        draws, net = self.draws(), self.net
        z = draws.normal(f"z_{name}", like.new_empty(len(like), *net.noise_shape))
        if not net.label_dim:
            return net(z), None
        pick = lambda count, generator: torch.randint(net.label_dim, (count,), generator=generator)
        labels = self.one_hot(draws.apply(f"label_{name}", pick, len(like)).to(like.device, non_blocking=True))
        return net(z, labels), labels


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` but reach none of its parameters."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
