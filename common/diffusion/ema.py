"""Running averages of weights: decay formulas, the update, and EDM2's choice of the average after training.

Every profile has `.decay(*, step, batch_size, images_seen) -> float`: b in average = b average + (1 - b) weights.
  step         optimiser steps done, this one included
  batch_size   images since the previous update
  images_seen  images seen, this update's included
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.errors import UserError


class ConstantDecay:
    """b = decay at every step. every: when the average is only updated every k steps, k, and b becomes decay^k."""

    def __init__(self, *, decay: float = 0.9999, every: int = 1):
        self.value = limits.number("decay", decay, least=0, most=1) ** limits.whole("every", every, least=1)

    def decay(self, *, step: int, batch_size: int, images_seen: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class HalfLife:
    """b = 0.5^(batch / min(images, ramp * n)), n = images seen BEFORE this update, as in EDM's training loop.

    images   half-life H in images (EDM CIFAR-10: 500_000); ramp: shorter half-life early on (0.05), None = no ramp.
    The first update with a ramp copies the weights.
    """

    images: float = 500_000
    ramp: float | None = 0.05

    def __post_init__(self):
        limits.number("images", self.images, above=0)
        if self.ramp is not None:
            limits.number("ramp", self.ramp, above=0)

    def decay(self, *, step: int, batch_size: int, images_seen: int) -> float:
        half = self.images
        if self.ramp is not None:
            half = min(half, self.ramp * (images_seen - batch_size))
        return 0.5 ** (batch_size / max(half, 1e-8))


@dataclass(frozen=True, kw_only=True)
class PowerFunction:
    """EDM2 (arXiv 2312.02696) eq. 127: b = (1 - batch/images_seen)^(gamma + 1). The first update copies the weights.

    std   relative standard deviation of the profile, in (0, 0.28868]: the width of the average as a share of training
    """

    std: float = 0.05

    def __post_init__(self):
        gamma_of_std(self.std)

    def decay(self, *, step: int, batch_size: int, images_seen: int) -> float:
        if batch_size >= images_seen:
            return 0.0
        return (1 - batch_size / images_seen) ** (gamma_of_std(self.std) + 1)


def gamma_of_std(std: float) -> float:
    """Exponent gamma of the profile with relative standard deviation `std`. EDM2 eq. 126: the largest real root of
    x^3 + 7 x^2 + (16 - 1/s^2) x + (12 - 1/s^2).
    """
    limits.number("std", std, above=0, most=0.28868)  # 1/sqrt(12) up to rounding: gamma = 0, the plain mean
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    # A double root (rounding gives it an imaginary dust) is still real.
    return max(0.0, float(roots[abs(roots.imag) < 1e-6].real.max()))


def std_of_gamma(gamma: float) -> float:
    """Relative standard deviation of a power-function profile. EDM2 eq. 123."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@torch.no_grad()
def update_(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """averages <- decay averages + (1 - decay) params, in place, one fused call, no wait for the device.

    averages, params: equally long lists with equal shapes. decay is a Python float in [0, 1].
    """
    if not len(averages):
        return
    if any(a.dtype != p.dtype or a.device != p.device for a, p in zip(averages, params)):
        params = [p.to(device=a.device, dtype=a.dtype, non_blocking=True) for a, p in zip(averages, params)]
    torch._foreach_lerp_(list(averages), list(params), 1 - decay)


def _inner(t_a, gamma_a, t_b, gamma_b):
    """Integral of the product of two profiles p(x) = (gamma+1) x^gamma / t^(gamma+1) on [0, t]. EDM2 eq. 151."""
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_late = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (early / late) ** gamma_late / ((gamma_a + gamma_b + 1) * late)


def posthoc_weights(*, times: Sequence[float], stds: Sequence[float], time: float, std: float) -> np.ndarray:
    """Weights w (n,), summing to 1, so that sum_i w_i snapshot_i is closest to the average with `std` at `time`.

    times, stds   of the stored snapshots, n each; time in images (or any unit), std relative. A std that was tracked is
                  best reconstructed from snapshots of two widths, e.g. 0.05 and 0.10.
    Least squares on the profiles, EDM2 algorithm 3. Raises UserError for empty or unequal lists or times <= 0.
    """
    if not len(times) or len(times) != len(stds):
        raise UserError(f"times and stds must be equally long and not empty, got {len(times)} and {len(stds)}.")
    for value in (*times, time):
        limits.number("times", float(value), above=0)
    # Minimise |sum_i w_i p_i - p|^2 over w: A w = b with A_ij = <p_i, p_j>, b_i = <p_i, p> (EDM2 algorithm 3). Only
    # ratios of times matter, so the target ends at 1.
    scale = float(time)
    t = np.asarray(times, dtype=np.float64) / scale
    gamma = np.array([gamma_of_std(float(s)) for s in stds])
    target = gamma_of_std(std)
    gram = _inner(t[:, None], gamma[:, None], t[None], gamma[None])
    right = _inner(t, gamma, 1.0, target)
    # The same snapshot twice makes the system singular: of its solutions lstsq takes the smallest.
    if len(set(zip(t, gamma))) < len(t):
        weights = np.linalg.lstsq(gram, right, rcond=None)[0]
    else:
        weights = np.linalg.solve(gram, right)
    return weights / weights.sum()


def combine(snapshots: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i snapshot_i, accumulated in float64, each tensor in the type of the first snapshot.

    snapshots   name -> tensor, same names and shapes in all
    """
    if not len(snapshots) or len(snapshots) != len(weights):
        raise UserError(f"snapshots and weights must be equally many, got {len(snapshots)} and {len(weights)}.")
    result = {}
    for name, first in snapshots[0].items():
        total = torch.zeros_like(first, dtype=torch.float64)
        for snapshot, weight in zip(snapshots, weights):
            total += float(weight) * snapshot[name].to(total)
        result[name] = total.to(first.dtype)
    return result
