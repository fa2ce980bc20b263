"""The perceptual terms of pMF: distances of the implied clean image from the data, at low noise only."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn

from common import limits
from common.errors import UserError


class Perceptual(nn.Module):
    """Sum of weight * w d(crop(image), crop(x)) over distances d, for the samples with t < t_below. pMF, section 3.

    distances  name -> module (image, x) -> (B,), images (B, 3, crop, crop) in [-1, 1]; frozen here, in evaluation mode.
               What has a method `load` reads its weights there (`projects.pmf.perceptual`)
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

    def load(self) -> None:
        """Weights of the distances from their files. Raises UserError naming a file that is missing."""
        for distance in self.distances.values():
            if hasattr(distance, "load"):
                distance.load()

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
    images: Tensor,
    size: int,
    generator: Generator | None = None,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A crop of each image, (B, C, H, W) -> (B, C, size, size), resized by `resize_matrix`.

    area    range of its share of the image, uniform
    aspect  range of width over height, uniform in the logarithm
    generator   on the CPU
    """
    height, width = images.shape[2:]
    u = torch.rand(4, len(images), generator=generator)
    share = height * width * (area[0] + (area[1] - area[0]) * u[0])
    ratio = (math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * u[1]).exp()
    rows = (share / ratio).sqrt().round().clamp(1, height)
    columns = (share * ratio).sqrt().round().clamp(1, width)
    top = (u[2] * (height - rows + 1)).floor()
    left = (u[3] * (width - columns + 1)).floor()
    down, across = (
        resize_matrix(start, length, whole, size).to(images.device, images.dtype, non_blocking=True)[:, None]
        for start, length, whole in ((top, rows, height), (left, columns, width))
    )
    return down @ images @ across.mT


def resize_matrix(start: Tensor, length: Tensor, whole: int, size: int) -> Tensor:
    """(B, size, whole): how `size` pixels are made of those from `start` on, `length` (B,) of `whole`, float32.

    Cubic interpolation (Keys, a = -1/2), widened where pixels are dropped (antialiasing). Pixels beside the crop count
    where the kernel reaches them, none outside the image: as jax.image.scale_and_translate, which the official code
    calls.
    """
    step = (length / size)[:, None, None]
    centre = (torch.arange(size)[:, None] + 0.5) * step + start[:, None, None] - 0.5
    x = (centre - torch.arange(whole)).abs() / step.clamp(min=1.0)
    near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(2, keepdim=True)
