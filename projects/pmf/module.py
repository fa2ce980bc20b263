"""Pixel MeanFlow: improved MeanFlow on pixels, through a network that predicts images.

u(z, t, r) = (z - net(z, t, r)) / max(t, t_floor)  # net predicts an image
for x in data:
    t, r ~ sampler, r <= t;  e ~ noise_scale N(0, I);  z = (1 - t) x + t e
    v = (z - x) / max(t, t_floor), guided as in iMF
    u, du/dt = jvp of u along (network's velocity, 1, 0);  V = u + (t - r) stop(du/dt)
    minimise w |V - v|^2 + the same for the second head
             + perceptual distance(z - t u, x) where t < threshold
sample: x = net(e, t=1, r=0)
"""

from collections.abc import Callable

from torch import Tensor, nn

from common.losses.meanflow import ImprovedMeanFlowLoss
from common.optim.groups import matrix_groups
from common.tasks.average_velocity import AverageVelocityModule
from projects.pmf.method import Perceptual


class PixelMeanFlow(AverageVelocityModule):
    """pMF (arXiv 2601.22158): the loss of iMF in velocities, the prediction in images, and perceptual terms.

    net          as in iMF, with a prediction of x inside, e.g. `projects.pmf.network.PixelMiT`
    loss         as in iMF; its t_floor must be that of the network
    time         sampler of the pair (t, r)
    omega, interval   samplers of guidance scale and interval, or None: no guidance
    noise_scale  standard deviation of the noise at t = 1, data units
    perceptual   `projects.pmf.method.Perceptual` or None; its networks are read from files when training begins
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
        noise_scale: float,
        perceptual: Perceptual | None,
        label_drop: Callable | None,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(
            net=net, time=time, label_drop=label_drop, optimizer=optimizer, schedule=schedule, omega=omega,
            interval=interval, noise_scale=noise_scale,
        )  # fmt: skip
        self.loss = loss
        # no part of the module: frozen networks do not belong into checkpoints, averages or the optimiser
        object.__setattr__(self, "perceptual", perceptual)

    def setup(self, stage: str) -> None:
        """Reads the weights of the perceptual networks when training begins."""
        if stage == "fit" and self.perceptual is not None:
            self.perceptual.load()

    def on_fit_start(self) -> None:
        if self.perceptual is not None:
            self.perceptual.to(self.device)

    def parameter_groups(self) -> list[dict]:
        """The matrices of linear layers, for Muon, and everything else."""
        return matrix_groups(self)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; logs `train/loss`, `train/squared_u`, `train/squared_v`."""
        x, t, r, e, conditions = self.inputs(batch)
        perceptual = None
        if self.perceptual is not None:
            crops = self.draws().generator("crop", "cpu", local=True)
            perceptual = lambda image, x, t, weighted: self.perceptual(image, x, t, weighted, crops)
        return self.report(self.loss(self.net, x, t, r, e, **conditions, perceptual=perceptual))
