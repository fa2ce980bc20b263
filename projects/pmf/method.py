"""The perceptual terms of pMF: distances of the implied clean image from the data, at low noise only."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from common.diffusion import limits
from common.errors import UserError


class Perceptual(nn.Module):
    """Sum of weight * w d(crop(image), crop(x)) over distances d, for the samples with t < t_below. pMF, section 3.

    distances  name -> module (image, x) -> (B,), images (B, 3, crop, crop) in [-1, 1]; frozen here, in evaluation mode
    weights    name -> factor; the paper: LPIPS (VGG) 0.4, ConvNeXtV2 features 0.1
    t_below    the paper: 0.8, and 0.6 for L/32 and H
    crop       side of a random resized crop, the same for both images; None: the images as they are
    """

    def __init__(
        self,
        *,
        distances: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        t_below: float = 0.8,
        crop: int | None = 224,
    ):
        super().__init__()
        if set(distances) != set(weights):
            raise UserError(f"perceptual.weights must name {sorted(distances)}, got {sorted(weights)}. Give one each.")
        self.distances = nn.ModuleDict(distances).requires_grad_(False).eval()
        self.weights = {name: limits.number(f"weights.{name}", value, least=0) for name, value in weights.items()}
        self.t_below = limits.number("t_below", t_below, least=0, most=1)
        self.crop = None if crop is None else limits.whole("crop", crop, least=1)

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(
        self, image: Tensor, x: Tensor, t: Tensor, weighted: Callable[[Tensor], Tensor], generator: Generator | None
    ) -> Tensor:
        """(B,): image, x (B, C, H, W), t (B,); `weighted` applies the adaptive weight; generator (CPU) of the crops."""
        if self.crop is not None:
            image, x = random_resized_crop(torch.cat([image, x], dim=1), self.crop, generator).chunk(2, dim=1)
        near = t < self.t_below
        total = torch.zeros_like(t)
        for name, distance in self.distances.items():
            total = total + self.weights[name] * weighted(torch.where(near, distance(image, x), 0.0))
        return total


def random_resized_crop(
    images: Tensor, size: int, generator: Generator | None = None, smallest: float = 0.08
) -> Tensor:
    """A square crop of smallest..1 of the area of each image, (B, C, H, W) -> (B, C, size, size), bilinear."""
    batch = len(images)
    area, left, top = torch.rand(3, batch, generator=generator)
    side = (smallest + (1 - smallest) * area).sqrt()
    move = torch.zeros(batch, 2, 3)
    move[:, 0, 0] = move[:, 1, 1] = side
    move[:, 0, 2], move[:, 1, 2] = (1 - side) * (2 * left - 1), (1 - side) * (2 * top - 1)
    grid = F.affine_grid(move.to(images), [batch, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
