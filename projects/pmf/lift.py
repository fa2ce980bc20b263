"""What a narrow network can predict when the data fill two dimensions of many: the clean image, or the velocity?"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.losses.meanflow import ImprovedMeanFlowLoss
from common.runtime.training.figures import new_figure, save_figure
from common.tasks.average_velocity import AverageVelocityModule

BANDWIDTHS = (0.1, 0.2, 0.5, 1.0, 2.0)
COLOURS = ("#bbbbbb", "#2b5c8a")


class EmbeddedCurveMeanFlow(AverageVelocityModule):
    """pMF (arXiv 2601.22158), toy experiment: its loss on points of `projects.pmf.embedded_plane`, without classes.

    Metrics over generated points x with the plane A (D, 2), all in units where data have deviation 1 per coordinate:
    off_plane    mean of |x - A A^T x| over the mean of |real point|: 0 for data
    off_plane_noise   the same for the noise the points were made of: what a network leaves that removes nothing
    mmd          maximum mean discrepancy of A^T x from as many real points, see `mmd2`
    mmd_floor    the same between two sets of real points

    net, loss, time, noise_scale   as in `projects.pmf.module.PixelMeanFlow`
    optimizer, schedule   see `ResearchModule`
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        loss: ImprovedMeanFlowLoss,
        time: Callable,
        noise_scale: float,
        optimizer: Callable,
        schedule: Callable | None,
    ):
        super().__init__(
            net=net, time=time, label_drop=None, optimizer=optimizer, schedule=schedule, noise_scale=noise_scale
        )
        self.loss = loss

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; logs `train/loss`, `train/squared_u`, `train/squared_v`."""
        x, t, r, e, conditions = self.inputs(batch)
        return self.report(self.loss(self.net, x, t, r, e, **conditions))

    def evaluation_step(self, batch: dict) -> dict[str, tuple[Tensor, float]]:
        """Sums and counts; point i of the split is compared with generated point i."""
        plane, count = batch["plane"], float(len(batch["position"]))
        real = batch["image"].flatten(1)
        made = self.generate(batch["position"].cpu(), sampler=self.context.sampler, seed=1).flatten(1)
        noise = self.draws().normal("reference noise", batch["image"]).flatten(1) * self.noise_scale
        size = real.norm(dim=1).mean()
        flat, wanted, other = (points @ plane for points in (made, real, batch["other"].flatten(1)))
        return {
            "off_plane": (off_plane(made, plane).sum() / size, count),
            "off_plane_noise": (off_plane(noise, plane).sum() / size, count),
            "mmd": (mmd2(flat, wanted) * count, count),
            "mmd_floor": (mmd2(other, wanted) * count, count),
        }

    def finalise(self, means: dict[str, float]) -> dict[str, float]:
        """Square roots of the squared discrepancies."""
        return {name: max(value, 0.0) ** 0.5 if name.startswith("mmd") else value for name, value in means.items()}

    def preview(self, data, stem: Path, *, samples: int, seed: int) -> list[Path]:
        """`<stem>.png`: generated points over real ones, both seen in the plane."""
        indices = torch.arange(max(samples, 1000))
        made = self.generate(indices, sampler=self.context.sampler, seed=seed).flatten(1).cpu()
        distance = off_plane(made, data.plane).mean()
        figure, axes = new_figure()
        figure.set_size_inches(5, 5)
        for points, colour in ((data.flat("test", 0, len(indices)), COLOURS[0]), (made @ data.plane, COLOURS[1])):
            axes.scatter(*points.numpy().T, s=3, color=colour)
        axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        axes.set_title(f"D = {data.dimension}, {self.net.prediction}-prediction: {distance:.3g} off the plane")
        save_figure(figure, stem.with_name(f"{stem.name}.png"))
        return [stem.with_name(f"{stem.name}.png")]


def off_plane(points: Tensor, plane: Tensor) -> Tensor:
    """|x - A A^T x| (B,) of points x (B, D); plane A (D, 2) with orthonormal columns."""
    return (points - (points @ plane) @ plane.T).norm(dim=1)


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of x (N, d) and y (M, d), >= 0, 0 for equal sets.

    The kernel is the mean of exp(-|a - b|^2 / (2 h^2)) over h in `BANDWIDTHS`. Gretton et al. (JMLR 2012), equation 5:
    of two sets of one law it is about (1 - mean kernel) (1/N + 1/M), not 0.
    """

    def kernel(a, b):
        squared = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        return sum((squared / (-2 * h**2)).exp().mean() for h in BANDWIDTHS) / len(BANDWIDTHS)

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
