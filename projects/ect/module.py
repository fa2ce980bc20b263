"""Easy Consistency Tuning: a diffusion model is pulled, stage by stage, from denoiser to consistency function.

f = pretrained denoiser
for step, y in data:
    s = step // steps_per_stage                    # the stage
    t ~ exp(N(mean, std^2));  r = max(0, t (1 - n(t) / q^(s+1)))
    eps ~ N(0, I);  mask = one dropout mask for both calls
    target = y if r = 0 else stop(f(y + r eps, r, mask))
    minimise w(t, r) (sqrt(|f(y + t eps, t, mask) - target|^2 + c^2) - c)
sample: x = f(80 z, 80);  second step: x = f(x + m n, m)
"""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from common.errors import UserError
from common.losses.consistency import ConsistencyLoss, stage_of_step
from common.runtime.training.generative import GenerativeModule


class Ect(GenerativeModule):
    """ECT (arXiv 2406.14548, algorithm 1); with random initial weights the same code is consistency training.

    net                   preconditioned network; `common.diffusion.precond.ECMPrecond` gives f(x, sigma_min) = x in
                          evaluation
    loss                  pairs, weighting and metric
    time                  sampler of t in data units, ln t ~ N(mean, std^2)
    steps_per_stage       optimiser steps d before the gap t - r shrinks once more
    stages                number of stages; the last one is kept
    first_stage           stage at step 0 (0; the final stage at once is an ablation)
    distill               ECD, the ablation: x_r is the initial model's ODE step from x_t to r instead of y + r eps;
                          keeps a frozen copy of the initial weights (memory: the network once more, in checkpoints too)
    optimizer, schedule   see `GenerativeModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        loss: ConsistencyLoss,
        time: Callable,
        steps_per_stage: int,
        stages: int,
        first_stage: int,
        distill: bool,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(net=net, optimizer=optimizer, schedule=schedule)
        if steps_per_stage < 1 or stages < 1 or first_stage < 0:
            raise UserError(
                f"project.steps_per_stage and project.stages must be >= 1 and project.first_stage >= 0, got "
                f"{steps_per_stage}, {stages} and {first_stage}."
            )
        self.loss = loss
        self.time = time
        self.steps_per_stage = steps_per_stage
        self.stages = stages
        self.first_stage = first_stage
        self.ode_teacher = copy.deepcopy(net).requires_grad_(False) if distill else None

    @property
    def stage(self) -> int:
        """Stage of the optimiser step under way: a function of the step number alone."""
        derived = stage_of_step(self.global_step, self.steps_per_stage, self.stages)
        return min(self.first_stage + derived, self.stages - 1)

    def on_train_start(self) -> None:
        if self.ode_teacher is None:
            return
        if self.global_step == 0:  # a resumed run has the copy from its checkpoint
            self.ode_teacher.load_state_dict(self.net.state_dict())
        self.ode_teacher.raw.eval()  # no dropout, but the training scalings: those are the diffusion model's

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; logs `train/loss` and `train/stage`."""
        y = batch["image"]
        draws = self.draws()
        t = draws.apply("t", self.time, len(y))  # on the CPU: rows with r = 0 are known without a device sync
        masks = None  # the one draw that differs with the number of processes: a joint one would be too large
        if self.loss.sync_dropout:
            masks = self.net.draw_dropout(y, draws.generator("dropout", y.device, local=True))
        loss = self.loss(
            self.net,
            y,
            t,
            draws.normal("eps", y),
            stage=self.stage,
            class_labels=self.one_hot(batch["label"]),
            dropout_masks=masks,
            ode_teacher=self.ode_teacher,
        ).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/stage", float(self.stage))
        return loss
