"""The LightningModule of every task that trains a network with an equilibrium in it."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from common.deq.layer import DEQ
from common.deq.layers import reset
from common.deq.solution import Solution
from common.errors import UserError
from common.runtime.training.module import ResearchModule, evaluating


class EquilibriumModule(ResearchModule):
    """Abstract: a loss on every state the equilibrium layer returns, and the layer's penalty.

    L = sum_k w_k criterion(output_k) + penalty, with the weights w_k of `correction` over the states of the trajectory
    (sparse fixed-point correction, arXiv 2204.08442; TorchDEQ, arXiv 2310.18605), or the last state alone.

    A task implements `outputs`, `criterion`, `evaluation_step` and `fake_batch`, and where they help `show` and
    `finalise`. What a network must offer: the layer as `net.deq`, its map as `net.cell`, and `net.outputs(...)`.

    net         network with an equilibrium
    correction  losses of the states, first to last -> their weighted sum (`common.deq.correction`); None: the last one
    optimizer, schedule   see `ResearchModule`
    """

    def __init__(self, *, net: nn.Module, optimizer: Callable, schedule: Callable | None, correction: Callable | None):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        if not isinstance(getattr(net, "deq", None), nn.Module):
            raise UserError(
                f"project.net must keep its equilibrium layer as `deq` (common.deq.layer.DEQ), {type(net).__name__} "
                f"has none. Choose a network with an equilibrium from conf/net."
            )
        self.correction = correction

    # What a task defines ----------------------------------------------------------------------------------------------

    def outputs(self, batch) -> list:
        """The network's outputs for a batch: one per state in training, one in evaluation."""
        raise NotImplementedError(f"{type(self).__name__} needs outputs(batch): a list of the network's outputs.")

    def criterion(self, output, batch) -> Tensor:
        """Training loss of one output, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} needs criterion(output, batch): a scalar loss.")

    def evaluation_step(self, batch) -> dict[str, tuple]:
        """name -> (sum over the batch, count), called in evaluation mode without gradients."""
        raise NotImplementedError(f"{type(self).__name__} needs evaluation_step(batch): name -> (sum, count).")

    # Training ---------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Normalised weights of the cell are computed anew from the exchanged parameters."""
        reset(self.net)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; logs `train/loss`, `train/nfe` and `train/residual` (means over the samples)."""
        reset(self.net)  # one set of dropout masks and normalised weights for the solve and its gradient
        losses = [self.criterion(output, batch) for output in self.outputs(batch)]
        loss = losses[-1] if self.correction is None else self.correction(losses)
        layer = cast(DEQ, self.net.deq)
        penalty = layer.penalty_value
        if penalty is not None:
            loss = loss + penalty
            self.log("train/penalty", penalty.detach())
        self.log("train/loss", loss, prog_bar=True)
        solution = cast(Solution, layer.solution)
        self.log("train/nfe", solution.evaluations.float().mean())
        if solution.calls:  # a layer trained without a solve has measured nothing
            self.log("train/residual", solution.residual_rel.mean())
        return loss

    def predict(self, batch):
        """The output for a batch in evaluation mode without gradients; the module's modes are put back."""
        with evaluating(self):
            return self.outputs(batch)[-1]
