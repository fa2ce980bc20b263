"""The spread of a logged number over the last steps of a run."""

import math
from collections import deque

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from common.errors import UserError


class Spread(Callback):
    """Mean and standard deviation of a logged training number over the last micro-batches of a run.

    In result.json as `<metric>_mean` and `<metric>_std`; kept in checkpoints, so that a continued run reports the same.
    The host reads nothing back before a checkpoint or the end.

    metric  name the module logs in every training step, e.g. train/squared_u
    last    micro-batches that count
    """

    def __init__(self, *, metric: str, last: int = 1000):
        if last < 2:
            raise UserError(f"the last of a spread must be at least 2 micro-batches, got {last}. Set last=1000.")
        self.metric = metric
        self._values: deque[torch.Tensor] = deque(maxlen=last)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        found = trainer.callback_metrics
        if self.metric not in found:
            logged = ", ".join(sorted(found)) or "nothing"
            raise UserError(
                f"the spread of {self.metric} was asked for, but training logs {logged}. Set metric to one of these."
            )
        self._values.append(found[self.metric].detach().clone())

    def values(self) -> list[float]:
        """The recorded numbers, oldest first."""
        return torch.stack(list(self._values)).tolist() if self._values else []

    def results(self) -> dict[str, float]:
        """The metrics this adds at the end of a run; NaN where there are too few numbers."""
        seen = torch.tensor(self.values(), dtype=torch.float64)
        mean, std = (seen.mean().item(), seen.std().item()) if len(seen) > 1 else (math.nan, math.nan)
        return {f"{self.metric}_mean": mean, f"{self.metric}_std": std}

    def state_dict(self) -> dict:
        return {"values": self.values()}

    def load_state_dict(self, state_dict: dict) -> None:
        self._values.clear()
        self._values.extend(torch.tensor(value) for value in state_dict.get("values", ()))
