"""MeanFlow: a network of average velocities, trained from scratch, that makes an image in one call.

for x in data:
    t, r ~ sampler, r <= t, r = t for a share of the samples;  e ~ N(0, I)
    z = (1 - t) x + t e;  v = e - x                # guidance: v = omega v + kappa u(z,t,t|y) + ... (Eq. 19)
    u, du/dt = jvp of u(z, t, r) along (v, 1, 0)
    target = stop(v - (t - r) du/dt)
    minimise w |u - target|^2,  w = 1/stop(|u - target|^2 + c)^p
sample: x = e - u(e, t=1, r=0);  in more steps: z_r = z_t - (t - r) u(z_t, t, r)
"""

from collections.abc import Callable

from torch import Tensor, nn

from common.losses.meanflow import MeanFlowLoss
from common.tasks.average_velocity import AverageVelocityModule


class MeanFlow(AverageVelocityModule):
    """MeanFlow (arXiv 2505.13447, algorithm 1); with r = t in all samples (`time.equal=1`) it is flow matching.

    net          u(z, t, r, class_labels=..., ...), see `common.losses.meanflow`
    loss         identity, guidance in the target, adaptive weight
    time         sampler of the pair (t, r): `common.diffusion.time.OrderThenMask` or `MaskThenOrder`
    label_drop   `common.diffusion.time.LabelDrop` or None
    augment      `common.data.images.augment.EdmAugment` or None
    optimizer, schedule   see `GenerativeModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        loss: MeanFlowLoss,
        time: Callable,
        label_drop: Callable | None,
        augment: Callable | None,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(net=net, time=time, label_drop=label_drop, optimizer=optimizer, schedule=schedule)
        self.loss = loss
        self.augment = augment

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; logs `train/loss`, `train/squared_u`, `train/squared_v`."""
        x, t, r, e, conditions = self.inputs(batch, self.augment)
        return self.report(self.loss(self.net, x, t, r, e, **conditions))
