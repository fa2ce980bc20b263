"""Improved MeanFlow: the average velocity trained as a regression to e - x, with guidance as an input.

for x, class y in data:
    t, r ~ sampler, r <= t;  e ~ N(0, I);  z = (1 - t) x + t e
    omega, [t_min, t_max] ~ samplers;  omega = 1 where t is outside the interval
    v_y, v_0 = velocity of the network with and without class   # a second head, or u(z, t, t)
    v_g = e - x + (1 - 1/omega) stop(v_y - v_0)                  # e - x where the class is dropped
    u, du/dt = jvp of u(z, t, r) along (v_y, 1, 0)
    V = u + (t - r) stop(du/dt)
    minimise w |V - v_g|^2 + w' |v_y - v_g|^2                    # w, w' = 1/stop(|.|^2 + c)^p
sample: x = e - u(e, t=1, r=0; omega, t_min, t_max, y)
"""

from collections.abc import Callable

from torch import Tensor, nn

from common.losses.meanflow import ImprovedMeanFlowLoss
from common.tasks.average_velocity import AverageVelocityModule


class ImprovedMeanFlow(AverageVelocityModule):
    """iMF (arXiv 2512.02012, algorithm 2).

    net          u(z, t, r, class_labels=..., omega=..., t_min=..., t_max=..., heads=...), e.g. `common.nets.mit.MiT`
    loss         compound velocity, auxiliary head or boundary, adaptive weights
    time         sampler of the pair (t, r)
    omega        sampler of the guidance scale (`common.diffusion.time.PowerOmega`), or None: no guidance
    interval     sampler of (t_min, t_max) (`common.diffusion.time.GuidanceInterval`), needed with omega
    label_drop   `common.diffusion.time.LabelDrop` or None
    optimizer, schedule   see `GenerativeModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        loss: ImprovedMeanFlowLoss,
        time: Callable,
        omega: Callable | None,
        interval: Callable | None,
        label_drop: Callable | None,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(
            net=net, time=time, label_drop=label_drop, optimizer=optimizer, schedule=schedule, omega=omega,
            interval=interval,
        )  # fmt: skip
        self.loss = loss

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; logs `train/loss`, `train/squared_u`, `train/squared_v`."""
        x, t, r, e, conditions = self.inputs(batch)
        return self.report(self.loss(self.net, x, t, r, e, **conditions))
