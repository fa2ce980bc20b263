"""From flow at 1/8 of the resolution to flow at full resolution, and from one frame's flow to the next one's start."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import NearestNDInterpolator
from torch import Tensor, nn

FACTOR = 8


class MaskHead(nn.Module):
    """Hidden state (B, C, h, w) -> logits (B, 9 x 64, h, w) of the convex combination; never weight-normalised.

    The factor 0.25 balances its gradients against those of the flow (arXiv 2003.12039, released code).
    """

    def __init__(self, hidden_channels: int, width: int = 256):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 9 * FACTOR**2, 1)

    def forward(self, h: Tensor) -> Tensor:
        return 0.25 * self.conv2(F.relu(self.conv1(h), inplace=True))


def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """flow (B, 2, h, w) in coarse pixels, mask logits (B, 576, h, w) -> (B, 2, 8 h, 8 w) in fine pixels.

    Each fine pixel is a convex combination of the 3x3 coarse neighbours of its coarse pixel, zero outside the image:
    channel (neighbour, row, column) of the mask is the weight at (row, column) of the 8x8 block. arXiv 2003.12039,
    section 3.3.
    """
    batch, channels, h, w = flow.shape
    mask = mask.view(batch, 1, 9, FACTOR, FACTOR, h, w).softmax(dim=2)
    near = F.unfold(FACTOR * flow, 3, padding=1).view(batch, channels, 9, 1, 1, h, w)
    fine = (mask * near).sum(dim=2)  # (B, 2, 8, 8, h, w)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, FACTOR * h, FACTOR * w)


def forward_interpolate(flow: Tensor) -> Tensor:
    """The flow warped forward by itself, the start for the next frame: (B, 2, h, w) pixels -> the same shape, device.

    Each pixel takes the flow of the point that lands nearest to it; points that leave the image are left out, and where
    all do the estimate is zero. A nearest-neighbour search on the CPU (scipy), without gradient.
    """
    field = flow.detach().double().cpu().numpy()
    batch, _, h, w = field.shape
    image, y, x = np.mgrid[:batch, :h, :w]
    landed = np.stack([x + field[:, 0], y + field[:, 1]], axis=-1)
    stays = ((landed > 0) & (landed < (w, h))).all(axis=-1)
    if not stays.any():
        return torch.zeros_like(flow)
    # The number of the image is a third axis, so far apart that no point of another image is ever the nearest.
    apart = 4 * (h + w) * image
    known = np.concatenate([landed, apart[..., None]], axis=-1)[stays]
    values = np.moveaxis(field, 1, -1)[stays]
    found = NearestNDInterpolator(known, values)(x, y, apart)
    found[~stays.any(axis=(1, 2))] = 0
    return torch.from_numpy(np.moveaxis(found, -1, 1)).to(flow)
