"""The gradient norm at every optimiser step, and the largest of a run among its results."""

import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class GradientNorm(Callback):
    """Logs `train/grad_norm`, the 2-norm of the gradient of all parameters before an optimiser step, before clipping.

    The largest norm of the run is `largest`, kept in checkpoints, and written to result.json as `train/grad_norm_max`.
    Reads nothing back to the host before a checkpoint or the end. Sharded strategies (FSDP) see their shard's norm.
    """

    def __init__(self):
        self._largest: torch.Tensor | None = None

    @property
    def largest(self) -> float:
        """NaN before the first step."""
        return math.nan if self._largest is None else float(self._largest)

    def results(self) -> dict[str, float]:
        """The metrics this adds at the end of a run."""
        return {"train/grad_norm_max": self.largest}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        norm = torch.nn.utils.get_total_norm(grads).float()
        pl_module.log("train/grad_norm", norm)
        before = norm if self._largest is None else self._largest.to(norm.device)
        self._largest = torch.maximum(norm, before)

    def state_dict(self) -> dict:
        return {} if self._largest is None else {"largest": self.largest}

    def load_state_dict(self, state_dict: dict) -> None:
        if "largest" in state_dict:
            self._largest = torch.tensor(state_dict["largest"])
