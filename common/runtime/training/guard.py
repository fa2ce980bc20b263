"""Callbacks that stop a run cleanly: on non-finite numbers, and on signals from the user or the scheduler."""

import signal
import warnings
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from common import limits
from common.errors import UserError
from common.runtime.training.checkpoint import Checkpoints
from common.runtime.training.context import find_callback
from common.runtime.training.module import ResearchModule
from common.runtime.training.seeding import seed_step


class PerStepSeed(Callback):
    """Re-seeds torch's global generators before every micro-batch, so that a resumed run repeats implicit draws."""

    def __init__(self, *, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx) -> None:
        seed_step(self.seed, cast(ResearchModule, pl_module).micro_step, trainer.global_rank)


class NonFiniteStop(UserError):
    """The loss or a gradient is NaN or infinite; the weights were not updated with it."""

    exit_code = 3


class NonFiniteGuard(Callback):
    """Stops before the optimiser step when the loss or any gradient is not finite.

    One fused norm and one scalar read per optimiser step (the only device synchronisation the runtime adds; set
    `callbacks.guard=null` to do without). Under fp16 loss scaling infinite gradients are normal, so only the loss
    is watched there.

    replace  a number instead of null: continue as the training loops of EDM and ECT do. NaN in a gradient becomes 0 and
             +-infinity becomes +-replace (1e5 in EDM and in ECT's branch main, 0 in EDM2 and in ECT's branch imgnet).
             The first such step is warned about
    """

    def __init__(self, *, replace: float | None = None):
        self.replace = None if replace is None else limits.number("callbacks.guard.replace", replace, least=0)
        self._loss: torch.Tensor | None = None
        self._warned = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        loss, self._loss = self._loss, None
        watched = [] if loss is None else [loss.float().reshape(1)]
        grads = []
        if trainer.precision != "16-mixed":
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if grads:
                watched.append(torch.stack(torch._foreach_norm(grads, 1)).float())
        if not watched or bool(torch.isfinite(torch.cat(watched)).all()):
            return
        if self.replace is None:
            raise NonFiniteStop(self._describe(trainer, pl_module, loss))
        for grad in grads:
            torch.nan_to_num(grad, nan=0.0, posinf=self.replace, neginf=-self.replace, out=grad)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Step {trainer.global_step} has a loss or gradient that is not finite; NaN became 0 and infinity "
                f"{self.replace:g} (callbacks.guard.replace). Later ones are replaced without a warning.",
                stacklevel=2,
            )

    @staticmethod
    def _describe(trainer: Trainer, pl_module: LightningModule, loss) -> str:
        if loss is not None and not bool(torch.isfinite(loss).all()):
            culprit = f"the loss is {float(loss)}"
        else:
            name = next(
                (n for n, p in pl_module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()),
                "a gradient norm (overflow in the sum)",
            )
            culprit = f"the gradient of {name} is not finite"
        last = _last_checkpoint(trainer)
        resume = f"Last good checkpoint: {last}" if last else "No checkpoint had been written yet"
        return (
            f"Stopped at step {trainer.global_step} before the weights were updated: {culprit}. {resume}. "
            f"Lower the learning rate or run with +debug=nonfinite to find the operation."
        )


def _last_checkpoint(trainer: Trainer) -> Path | None:
    saver = find_callback(trainer, Checkpoints)
    return saver.last if saver else None


class Interrupted(UserError):
    """A signal stopped the run after it wrote a checkpoint. Exit code 128 + signal number."""

    def __init__(self, message: str, signum: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + int(signum)


class StopOnSignal(Callback):
    """SIGTERM and SIGINT: finish the current optimiser step, write a checkpoint, exit with 143 or 130.

    A second signal of the same kind stops at once, with the default behaviour. In a multi-process run every rank must
    receive the signal (torchrun, submitit and the terminal do that); the ranks agree before they write.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict = {}
        self._step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[signum] = signal.signal(signum, self._receive)
            except ValueError:  # not in the main thread (a notebook's worker, joblib threads): no handlers
                return

    def _receive(self, signum, frame) -> None:
        if self.received is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self._step:  # inside gradient accumulation: not a step boundary
            return
        self._step = trainer.global_step
        wanted = self.received or 0
        if trainer.world_size > 1:
            wanted = int(trainer.strategy.reduce(torch.tensor(float(wanted), device=pl_module.device), reduce_op="max"))
        if not wanted:
            return
        saver = find_callback(trainer, Checkpoints)
        if saver is None:
            where = "No checkpoint was written (callbacks.checkpoints is off)."
        elif saver.last is not None and saver.last.name == f"step-{trainer.global_step:08d}.ckpt":
            where = f"Checkpoint: {saver.last}. The same command continues from there."
        else:
            where = f"Checkpoint: {saver.save(trainer)}. The same command continues from there."
        name = signal.Signals(wanted).name
        raise Interrupted(f"{name} received: stopped after step {trainer.global_step}. {where}", wanted)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()
