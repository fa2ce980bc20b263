"""How noisy losses of average velocities are at one state of the network: their values and their gradients."""

import math
from collections.abc import Mapping
from itertools import islice

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from common import limits
from common.losses.meanflow import ImprovedMeanFlowLoss, MeanFlowLoss
from common.runtime.training.context import context_of
from common.runtime.training.module import modes_of, restore_modes, to_device
from common.runtime.training.seeding import Draws


class LossNoise(Callback):
    """Compares losses at the final weights of a run, on the same training batches, times and noise for each of them.

    For a loss called <name>, over the batches, in result.json:
        noise/<name>_loss_mean, noise/<name>_loss_std   of the batch mean of the loss
        noise/<name>_gradient_norm   2-norm of the mean gradient of all parameters
        noise/<name>_gradient_std    square root of the summed variances of its entries
    Both losses of MeanFlow and iMF are |u + (t - r) du/dt - v|^2 when unweighted, along another direction; power 0 in
    `losses` compares them so. The weights are those being trained, not their average.

    Does nothing for a network conditioned on guidance: MeanFlow's loss has none, so there is nothing to compare.

    losses    name -> loss of `common.losses.meanflow`
    batches   training batches, at least 2
    """

    def __init__(self, *, losses: Mapping[str, MeanFlowLoss | ImprovedMeanFlowLoss], batches: int = 100):
        limits.whole("batches of the loss noise", batches, least=2, hint="Set batches=100.")
        self.losses, self.batches = dict(losses), batches
        self._found: dict[str, float] = {}

    def results(self) -> dict[str, float]:
        """What the end of a run adds to its metrics."""
        return self._found

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.omega is not None:
            return
        data, net = trainer.datamodule, pl_module.net
        modes = modes_of(pl_module)
        pl_module.train()
        values = {name: [] for name in self.losses}
        moments = {name: Moments(net) for name in self.losses}
        try:
            with torch.enable_grad():
                for number, batch in enumerate(islice(data.train_dataloader(), self.batches)):
                    # numbers no training step meets
                    draws = Draws(seed=context_of(pl_module).seed, step=-1 - number)
                    batch = to_device(batch, data, pl_module.device)
                    x, t, r, e, conditions = pl_module.inputs(batch, draws=draws)
                    for name, loss in self.losses.items():
                        value = loss(net, x, t, r, e, **conditions).loss.mean()
                        moments[name].add(torch.autograd.grad(value, moments[name].parameters, allow_unused=True))
                        values[name].append(value.detach())
        finally:
            restore_modes(modes)
        for name, seen in values.items():
            seen = torch.stack(seen).double()
            self._found |= {f"noise/{name}_loss_mean": seen.mean().item(), f"noise/{name}_loss_std": seen.std().item()}
            self._found |= {f"noise/{name}_gradient_{what}": value for what, value in moments[name].summary().items()}


class Moments:
    """Mean and variance of gradients, added one after the other."""

    def __init__(self, net: nn.Module):
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.count = 0
        self.means = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
        self.squares = [torch.zeros_like(mean) for mean in self.means]  # summed squared distances from the mean

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        self.count += 1
        for gradient, mean, squares in zip(gradients, self.means, self.squares, strict=True):
            new = torch.zeros_like(mean) if gradient is None else gradient.double()
            before = new - mean
            mean += before / self.count
            squares += before * (new - mean)

    def summary(self) -> dict[str, float]:
        """norm of the mean; std: square root of the summed variances."""
        norm = math.sqrt(sum(float(mean.square().sum()) for mean in self.means))
        total = sum(float(squares.sum()) for squares in self.squares)
        return {"norm": norm, "std": math.sqrt(total / max(self.count - 1, 1))}
