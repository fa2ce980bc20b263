"""Samplers: from standard normal noise z (B, C, H, W) to images, with any denoiser.

`sampler(denoiser, z, noise=None) -> x` in the type of z. The state is kept in float64 (float32 loses about 1e-5
relative per step at sigma = 80), the network runs in whatever type it likes.
  denoiser   D = denoiser(x, sigma), x (B, C, H, W) float64, sigma (B,) float64, data units. When it has
             `sigma_min`, `sigma_max` or `round_sigma` (preconditioners have), the grid respects them, as in EDM's code.
  noise      noise(k) -> (B, C, H, W): the k-th fresh standard normal draw; only stochastic samplers need it
             (`ImageNoise.noise`)
  nfe        network evaluations per image
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common import limits
from common.diffusion.paths import Path
from common.errors import UserError
from common.tensors import append_dims


def karras_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """steps + 1 noise levels from sigma_max down to sigma_min, then 0. EDM (arXiv 2206.00364) eq. 5.

    With steps = 1 the grid is [sigma_max, 0]. Raises UserError unless steps >= 1 and 0 < sigma_min < sigma_max.
    """
    limits.whole("steps", steps, least=1)
    limits.sigma_range(sigma_min, sigma_max)
    limits.number("rho", rho, above=0)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def _supported(denoiser, grid: list[float]) -> list[float]:
    """The grid moved to levels the network was trained on, when it was trained on a table."""
    rounder = getattr(denoiser, "round_sigma", None)
    if rounder is None:
        return grid
    return [*rounder(torch.tensor(grid[:-1], dtype=torch.float64)).tolist(), 0.0]


def _grid(denoiser, steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    low = max(sigma_min, getattr(denoiser, "sigma_min", 0.0))
    high = min(sigma_max, getattr(denoiser, "sigma_max", math.inf))
    return _supported(denoiser, karras_grid(steps, low, high, rho))


def _denoise(denoiser, x: Tensor, sigma: float) -> Tensor:
    return denoiser(x, torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)


def _need(noise: Callable | None, why: str) -> Callable:
    if noise is None:
        raise UserError(f"{why} draws fresh noise, got noise=None. Pass noise=ImageNoise(...).noise.")
    return noise


@dataclass(frozen=True, kw_only=True)
class Euler:
    """First-order probability-flow solver dx/dsigma = (x - D)/sigma on the Karras grid. nfe = steps."""

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        karras_grid(self.steps, self.sigma_min, self.sigma_max, self.rho)

    @property
    def nfe(self) -> int:
        return self.steps

    @torch.no_grad()
    def __call__(self, denoiser: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        grid = _grid(denoiser, self.steps, self.sigma_min, self.sigma_max, self.rho)
        x = z.to(torch.float64) * grid[0]
        for sigma, after in pairwise(grid):
            x = x + (after - sigma) / sigma * (x - _denoise(denoiser, x, sigma))
        return x.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class Heun:
    """EDM (arXiv 2206.00364) algorithm 2: second-order steps, optional churn; algorithm 1 when churn is 0.
    nfe = 2 steps - 1.

    churn          S_churn: gamma = min(churn / steps, sqrt(2) - 1) for sigma in [s_min, s_max]; 0 = deterministic
    s_min, s_max   noise levels at which noise is added (S_tmin, S_tmax)
    s_noise        standard deviation of the added noise. ImageNet-64: churn 40, 0.05, 50, 1.003
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self):
        karras_grid(self.steps, self.sigma_min, self.sigma_max, self.rho)
        limits.number("churn", self.churn, least=0)
        limits.number("s_min", self.s_min, least=0)
        limits.number("s_max", self.s_max, least=self.s_min)
        limits.number("s_noise", self.s_noise, least=0)

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    @torch.no_grad()
    def __call__(self, denoiser: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        grid = _grid(denoiser, self.steps, self.sigma_min, self.sigma_max, self.rho)
        x = z.to(torch.float64) * grid[0]
        for k, (sigma, after) in enumerate(pairwise(grid)):
            # Lines 4 to 6: raise the noise level to (1 + gamma) sigma by adding noise of variance raised^2 - sigma^2.
            if self.churn > 0 and self.s_min <= sigma <= self.s_max:
                gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
                raised = _supported(denoiser, [sigma * (1 + gamma), 0.0])[0]
                added = math.sqrt(max(raised**2 - sigma**2, 0.0)) * self.s_noise
                x = x + added * _need(noise, "Heun with churn > 0")(k).to(x)
                sigma = raised
            # Lines 7 and 8: Euler step along dx/dsigma = (x - D) / sigma.
            slope = (x - _denoise(denoiser, x, sigma)) / sigma
            moved = x + (after - sigma) * slope
            # Lines 10 and 11: again with the mean of the slopes at both ends (trapezoidal rule).
            if after > 0:
                slope = 0.5 * (slope + (moved - _denoise(denoiser, moved, after)) / after)
                moved = x + (after - sigma) * slope
            x = moved
        return x.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """DDIM (arXiv 2010.02502) eq. 12 on any path: z_r = a_r D + s_r eps, uniform times from t_max to 0. nfe = steps.

    path    `common.diffusion.paths` object; the denoiser still gets the EDM state z/a and sigma = s/a
    t_max   starting time; must be < 1 on paths whose data weight vanishes at 1 (Linear, GVP)
    eta     0 = deterministic, 1 = DDPM-like fresh noise (eq. 16)
    """

    path: Path
    steps: int = 50
    t_max: float = 1.0
    eta: float = 0.0

    def __post_init__(self):
        limits.whole("steps", self.steps, least=1)
        limits.number("t_max", self.t_max, above=0, most=1)
        limits.number("eta", self.eta, least=0, most=1)
        if not float(self.path.a(torch.tensor(self.t_max, dtype=torch.float64))) > 1e-6:
            raise UserError(
                f"t_max must leave some data weight on {type(self.path).__name__}, got {self.t_max}. Set t_max=0.99."
            )

    @property
    def nfe(self) -> int:
        return self.steps

    @torch.no_grad()
    def __call__(self, denoiser: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        times = torch.linspace(self.t_max, 0, self.steps + 1, dtype=torch.float64)
        # the last state is the denoised image itself, also on a VE path, whose own last level is sigma_min
        a, s = [*self.path.a(times).tolist()[:-1], 1.0], [*self.path.s(times).tolist()[:-1], 0.0]
        x = z.to(torch.float64) * s[0]
        for k in range(self.steps):
            data = _denoise(denoiser, x / a[k], s[k] / a[k])
            eps = (x - a[k] * data) / s[k]
            # Standard deviation of the part of the noise that is replaced by a fresh draw (eq. 16):
            # eta s_r sqrt(1 - (s_r a_t / (s_t a_r))^2). With eta = 1 the variance of the DDPM posterior.
            keep = max(1 - (s[k + 1] * a[k] / (s[k] * a[k + 1])) ** 2, 0.0)
            fresh = self.eta * s[k + 1] * math.sqrt(keep)
            x = a[k + 1] * data + math.sqrt(max(s[k + 1] ** 2 - fresh**2, 0.0)) * eps
            if fresh > 0:
                x = x + fresh * _need(noise, "DDIM with eta > 0")(k).to(x)
        return x.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """Consistency sampling (arXiv 2303.01469 algorithm 1): x = f(sigma_max z, sigma_max), then for every level m of
    `mids` x = f(x + m n, m) with fresh noise n. nfe = 1 + len(mids).

    mids   decreasing noise levels below sigma_max; () is one step. ECT: (0.821,) on CIFAR-10, (1.526,) on ImageNet-64
    """

    sigma_max: float = 80.0
    mids: Sequence[float] = ()

    def __post_init__(self):
        limits.sigma("sigma_max", self.sigma_max)
        levels = [self.sigma_max, *self.mids]
        for level in levels[1:]:
            limits.sigma("mids", level)
        if any(not after < before for before, after in pairwise(levels)):
            raise UserError(
                f"mids must decrease and lie below sigma_max={self.sigma_max}, got {list(self.mids)}. "
                "Sort them from large to small, e.g. mids=[0.821]."
            )

    @property
    def nfe(self) -> int:
        return 1 + len(self.mids)

    @torch.no_grad()
    def __call__(self, denoiser: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        levels = _supported(denoiser, [float(self.sigma_max), *map(float, self.mids), 0.0])[:-1]
        x = _denoise(denoiser, z.to(torch.float64) * levels[0], levels[0])
        for k, level in enumerate(levels[1:]):
            x = _denoise(denoiser, x + level * _need(noise, "Multistep with mids")(k).to(x), level)
        return x.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class FlowEuler:
    """Euler steps z_r = z_t - (t - r) v(z_t, t) from t = 1 (noise) to t = 0 (data). nfe = steps.

    The first argument of the call is a velocity, v = velocity(z, t) with t (B,) in [0, 1], not a denoiser.
    shift   timestep shift t -> shift t / (1 + (shift - 1) t); 1 = uniform grid
    """

    steps: int = 50
    shift: float = 1.0

    def __post_init__(self):
        limits.whole("steps", self.steps, least=1)
        limits.number("shift", self.shift, above=0)

    @property
    def nfe(self) -> int:
        return self.steps

    @torch.no_grad()
    def __call__(self, velocity: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        uniform = [1 - i / self.steps for i in range(self.steps + 1)]
        times = [self.shift * t / (1 + (self.shift - 1) * t) for t in uniform]
        x = z.to(torch.float64)
        for t, r in pairwise(times):
            x = x - (t - r) * _denoise(velocity, x, t)
        return x.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class AverageVelocitySteps:
    """z_r = z_t - (t - r) u(z_t, t, r) over times from 1 (noise) to 0 (data); MeanFlow, iMF, pMF. nfe = steps.

    The first argument of the call is an average velocity, u = velocity(z, t, r) with t, r (B,), not a denoiser
    (`common.diffusion.guidance.BoundVelocity`). Its `noise_scale`, if it has one, multiplies the starting noise.
    steps   uniform grid of so many intervals; ignored when `times` is given
    times   own grid: the times between 1 and 0, decreasing, e.g. [0.5]; the steps are then one more
    omega   guidance scale, a condition of the network, in its trained range; None: a network without guidance
    t_min, t_max   times between which it guides
    beyond  also take an omega above the trained range
    """

    steps: int = 1
    times: Sequence[float] | None = None
    omega: float | None = None
    t_min: float = 0.0
    t_max: float = 1.0
    beyond: bool = False

    def __post_init__(self):
        limits.whole("steps", self.steps, least=1)
        inner = list(self.times or ())
        grid = [1.0, *inner, 0.0]
        for time in inner:
            limits.number("times", time)
        if any(not after < before for before, after in pairwise(grid)):
            raise UserError(f"times must decrease and lie between 1 and 0, got {inner}. Set times=[0.5].")
        if self.omega is not None:
            limits.number("omega", self.omega, least=1)
        limits.number("t_min", self.t_min, least=0, most=1)
        limits.number("t_max", self.t_max, least=self.t_min, most=1)

    @property
    def nfe(self) -> int:
        return self.steps if self.times is None else len(self.times) + 1

    @property
    def variant(self) -> str:
        """The guidance as part of a file name, e.g. "omega8-t0.4-0.65"; empty without."""
        return "" if self.omega is None else f"omega{self.omega:g}-t{self.t_min:g}-{self.t_max:g}"

    @torch.no_grad()
    def __call__(self, velocity: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        uniform = [1 - i / self.steps for i in range(self.steps + 1)]
        grid = uniform if self.times is None else [1.0, *map(float, self.times), 0.0]
        given = {} if self.omega is None else {"omega": self.omega, "t_min": self.t_min, "t_max": self.t_max}
        if given and self.beyond:
            given["beyond"] = True
        x = z.to(torch.float64) * getattr(velocity, "noise_scale", 1.0)
        for times in pairwise(grid):
            t, r = (torch.full((x.shape[0],), time, dtype=x.dtype, device=x.device) for time in times)
            x = x - append_dims(t - r, x) * velocity(x, t, r, **given).to(x.dtype)
        return x.to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class Direct:
    """x = generator(z): the network itself maps noise to images, as the generator of a GAN does. nfe = 1.

    truncation  t > 0: z from the normal distribution cut off at -t and t (the same z moved there, so that image i stays
                image i); fewer kinds of images, each more typical. None: as trained
    """

    truncation: float | None = None

    def __post_init__(self):
        if self.truncation is not None:
            limits.number("truncation", self.truncation, above=0)

    @property
    def nfe(self) -> int:
        return 1

    @torch.no_grad()
    def __call__(self, generator: Callable, z: Tensor, noise: Callable | None = None) -> Tensor:
        if self.truncation is not None:
            # by the quantiles: the share of the distribution below stays; in float64, whose tails reach far enough
            t = math.erf(self.truncation / math.sqrt(2))
            z = (torch.erfinv(t * torch.erf(z.double() / math.sqrt(2))) * math.sqrt(2)).to(z.dtype)
        return generator(z)


def noise_shape(net) -> tuple[int, ...]:
    """Shape of the noise one image starts from: the network's `noise_shape`, else that of the image."""
    return tuple(getattr(net, "noise_shape", None) or (net.img_channels, net.img_resolution, net.img_resolution))


BLOCK = 64  # images drawn together; part of the definition of "image i", never change it


class ImageNoise:
    """Fixed randomness per image: image i gets the same z, the same noise(k) and the same label in any batch, in any
    order and on any device (drawn on the CPU).

    seed      any int; indices: image numbers >= 0 of this batch, in order
    shape     (C, H, W), or (z_dim,) for a generator that starts from a vector
    device, dtype   of the returned tensors
    """

    def __init__(
        self,
        *,
        seed: int,
        indices: Sequence[int] | Tensor,
        shape: Sequence[int],
        device="cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.seed = int(seed)
        self.indices = torch.as_tensor(indices, dtype=torch.long, device="cpu").reshape(-1)
        if not self.indices.numel() or int(self.indices.min()) < 0:
            raise UserError("indices must hold at least one image number >= 0. Ask for 1 sample or more.")
        self.shape = tuple(int(n) for n in shape)
        self.device = device
        self.dtype = dtype

    @property
    def z(self) -> Tensor:
        """Starting noise, (B, C, H, W) standard normal."""
        return self._rows("z", self._normal).to(self.device, self.dtype)

    def noise(self, k: int) -> Tensor:
        """The k-th fresh draw, (B, C, H, W) standard normal, independent of z and of every other k."""
        return self._rows(f"noise{int(k)}", self._normal).to(self.device, self.dtype)

    def labels(self, num_classes: int) -> Tensor:
        """One uniformly drawn class per image, (B,) int64 in [0, num_classes)."""
        limits.whole("num_classes", num_classes, least=1)
        draw = lambda generator: torch.randint(num_classes, (BLOCK,), generator=generator)
        return self._rows("label", draw).to(self.device)

    def _normal(self, generator: torch.Generator) -> Tensor:
        return torch.randn((BLOCK, *self.shape), generator=generator)

    def _rows(self, stream: str, draw: Callable) -> Tensor:
        blocks, which = torch.unique(self.indices // BLOCK, return_inverse=True)
        drawn = []
        for block in blocks.tolist():
            digest = hashlib.sha256(f"{self.seed}/{stream}/{block}".encode()).digest()
            drawn.append(draw(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)))
        return torch.stack(drawn)[which, self.indices % BLOCK]
