"""Running averages of the weights during training; any number of them side by side, one chosen at test time.

The decay formulas live in `common.diffusion.ema`; this module only applies them. Lightning's `WeightAveraging` callback
keeps one average per run, which is not enough to compare EDM2's power-function lengths after the fact.
"""

from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from common.diffusion.ema import update_
from common.errors import UserError, nearest
from common.runtime.training.context import context_of


class WeightAverages(Callback):
    """Keeps `averages[name]` of the module's parameters, updated once per optimiser step.

    profiles  name -> decay object of `common.diffusion.ema` with `.decay(step=, batch_size=, images_seen=) -> float`;
              null removes an inherited entry
    every     update every k optimiser steps with the decay of k steps' worth of images

    Memory: one copy of the parameters per profile, but for those under the module's `unaveraged` prefixes. Averages of
    16-bit parameters are kept in float32: a decay of 0.9999 moves a bfloat16 number by less than its last digit.
    Buffers are not averaged: evaluation uses the current ones.
    Saved in the checkpoint under "averages" as plain tensors.
    """

    def __init__(self, *, profiles: dict, every: int = 1):
        if every < 1:
            raise UserError(f"ema.every must be >= 1, got {every}. Set ema.every=1 to update at every step.")
        self.profiles = {name: profile for name, profile in profiles.items() if profile is not None}
        for name, profile in self.profiles.items():
            if not callable(getattr(profile, "decay", None)):
                raise UserError(
                    f"ema.profiles.{name} is no average but {profile}. Give it a _target_ of common.diffusion.ema as "
                    f"in conf/ema, or set ema.profiles.{name}=null."
                )
        self.every = every
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._last_step = 0
        self._pending: dict | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left_out = tuple(getattr(pl_module, "unaveraged", ()))
        named = {n: p for n, p in pl_module.named_parameters() if p.requires_grad and not n.startswith(left_out)}
        restored = self._pending or {}
        for profile in self.profiles:
            if profile in restored:
                self.averages[profile] = {n: _wide(t).to(named[n].device) for n, t in restored[profile].items()}
            else:
                self.averages[profile] = {n: _wide(p.detach()).clone() for n, p in named.items()}
        self._pending = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step  # on_fit_start comes before the step counter is restored

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self._last_step or step % self.every:
            return
        self._last_step = step
        samples = context_of(pl_module).samples_per_step
        named = dict(pl_module.named_parameters())
        for profile, decay in self.profiles.items():
            average = self.averages[profile]
            beta = decay.decay(step=step, batch_size=samples * self.every, images_seen=step * samples)
            update_(list(average.values()), [_wide(named[name].detach()) for name in average], beta)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        checkpoint["averages"] = {profile: dict(tensors) for profile, tensors in self.averages.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        self._pending = checkpoint.get("averages", {})


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least; the tensor itself when it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


@contextmanager
def averaged(module: torch.nn.Module, tensors: dict[str, Tensor] | None):
    """Run the body with `tensors` (parameter name -> value) in place of the module's own; None changes nothing.

    The storages are exchanged, not copied, and exchanged back afterwards, also after an exception.
    """
    if tensors is None:
        yield module
        return
    named = dict(module.named_parameters())
    kept = {name: named[name].data for name in tensors}
    try:
        for name, value in tensors.items():
            named[name].data = value.to(kept[name].dtype)
        yield module
    finally:
        for name, value in kept.items():
            named[name].data = value


def choose_average(available: dict, name: str) -> dict | None:
    """The stored average called `name`, or None for `raw` (the weights as trained)."""
    if name == "raw":
        return None
    if name not in available:
        options = ["raw", *available]
        raise UserError(
            f"The average '{name}' is not in this run. {nearest(name, options)}"
            f"Set evaluate.average to one of: {', '.join(options)}."
        )
    return available[name]
