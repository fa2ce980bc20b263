"""Noise paths z_t = a(t) x + s(t) e with e ~ N(0, I): coefficients, samples, and every conversion between predictions.

Time t is in [0, 1] everywhere: 0 = data, 1 = noise. Papers that count the other way enter and leave through
`DataTime` and `from_data_time` / `to_data_time`.

Four predictions describe the same network (x data, e noise, z the noisy state):
  denoiser  D = E[x | z]                data units
  eps       E[e | z]                    unit variance
  v         E[dz/dt | z] = a' D + s' eps
  score     grad_z log p_t(z) = -eps / s
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from common import limits
from common.tensors import append_dims

KINDS = ("denoiser", "eps", "v", "score")


@dataclass(frozen=True)
class PathSample:
    """One draw from the path: z = a x + s e (B, ...), v = a' x + s' e (B, ...), t (B,), x and e as given."""

    z: Tensor
    v: Tensor
    t: Tensor
    x: Tensor
    e: Tensor


class Path(ABC):
    """Coefficients of a path. t may have any shape; every method returns that shape."""

    @abstractmethod
    def a(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abstractmethod
    def s(self, t: Tensor) -> Tensor:
        """Weight of the noise (its standard deviation in data units)."""

    @abstractmethod
    def da(self, t: Tensor) -> Tensor:
        """da/dt."""

    @abstractmethod
    def ds(self, t: Tensor) -> Tensor:
        """ds/dt."""

    @abstractmethod
    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """The t at which s/a equals the noise level sigma (data units)."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level s/a in data units: z/a = x + sigma e is the EDM state at that time."""
        return self.s(t) / self.a(t)

    def sample(self, x: Tensor, e: Tensor, t: Tensor) -> PathSample:
        """x, e (B, ...), t (B,) in [0, 1]."""
        a, s, da, ds = (append_dims(c(t), x) for c in (self.a, self.s, self.da, self.ds))
        return PathSample(z=a * x + s * e, v=da * x + ds * e, t=t, x=x, e=e)

    def convert(self, value: Tensor, *, source: str, target: str, z: Tensor, t: Tensor) -> Tensor:
        """A prediction of kind `source` at (z, t), as kind `target`; kinds: denoiser, eps, v, score.

        value, z (B, ...), t (B,) strictly inside (0, 1) unless the formula has no division there: source v is exact on
        the closed interval for the linear path.
        """
        limits.choice("source", source, KINDS)
        limits.choice("target", target, KINDS)
        if source == target:
            return value
        # Two linear equations in (D, eps): z = a D + s eps, v = a' D + s' eps. z and one prediction give the others.
        a, s = append_dims(self.a(t), z), append_dims(self.s(t), z)
        if source == "score":
            if target == "eps":
                return -s * value
            source, value = "eps", -s * value
        if target == "score":
            return -self.convert(value, source=source, target="eps", z=z, t=t) / s
        da, ds = append_dims(self.da(t), z), append_dims(self.ds(t), z)
        if source == "v":
            # D = (s' z - s v) / (a s' - s a'), eps = (a v - a' z) / (a s' - s a'), by Cramer's rule.
            slope = a * ds - s * da  # determinant of (D, eps) -> (z, v); positive on every path
            return (ds * z - s * value) / slope if target == "denoiser" else (a * value - da * z) / slope
        if source == "denoiser":
            eps = (z - a * value) / s
            return eps if target == "eps" else da * value + ds * eps
        data = (z - s * value) / a
        return data if target == "denoiser" else da * data + ds * value


def transfer(z: Tensor, t: Tensor, *, source: Path, target: Path) -> tuple[Tensor, Tensor]:
    """The same noisy image on another path: (z, t) with equal noise level sigma = s/a, rescaled.

    z (B, ...), t (B,). Both states equal a (x + sigma e), only a differs.
    """
    new_t = target.t_of_sigma(source.sigma(t))
    return z / append_dims(source.a(t), z) * append_dims(target.a(new_t), z), new_t


@dataclass(frozen=True, kw_only=True)
class Linear(Path):
    """Flow matching: z = (1-t) x + t e, v = e - x. MeanFlow, rectified flow, SiT linear."""

    def a(self, t):
        return 1 - t

    def s(self, t):
        return t

    def da(self, t):
        return -torch.ones_like(t)

    def ds(self, t):
        return torch.ones_like(t)

    def t_of_sigma(self, sigma):
        return sigma / (1 + sigma)


@dataclass(frozen=True, kw_only=True)
class VE(Path):
    """z = x + sigma(t) e, with sigma(0) = sigma_min and sigma(1) = sigma_max (data units).

    rho  exponent of the Karras warp sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho,
         EDM (arXiv 2206.00364) eq. 5 read with t = 1 - i/(N-1); inf gives the geometric VE-SDE schedule.
    Raises UserError unless 0 < sigma_min < sigma_max and rho > 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        limits.sigma_range(self.sigma_min, self.sigma_max)
        limits.number("rho", self.rho, above=0)

    def a(self, t):
        return torch.ones_like(t)

    def da(self, t):
        return torch.zeros_like(t)

    def s(self, t):
        if math.isinf(self.rho):
            return self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + t * (high - low)) ** self.rho

    def ds(self, t):
        if math.isinf(self.rho):
            return self.s(t) * math.log(self.sigma_max / self.sigma_min)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return self.rho * (high - low) * (low + t * (high - low)) ** (self.rho - 1)

    def t_of_sigma(self, sigma):
        if math.isinf(self.rho):
            return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (sigma ** (1 / self.rho) - low) / (high - low)


@dataclass(frozen=True, kw_only=True)
class VP(Path):
    """Continuous variance preserving path: a = exp(-B(t)/2), s = sqrt(1 - a^2), B(t) = beta_d t^2 / 2 + beta_min t.

    Score SDE (arXiv 2011.13456) eq. 32-33 in EDM's notation (arXiv 2206.00364, table 1). SiT's "VP" path is this one.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def __post_init__(self):
        limits.number("beta_d", self.beta_d, above=0)
        limits.number("beta_min", self.beta_min, above=0)

    def _integral(self, t):
        return 0.5 * self.beta_d * t**2 + self.beta_min * t

    def a(self, t):
        return (-0.5 * self._integral(t)).exp()

    def s(self, t):
        return (-torch.expm1(-self._integral(t))).sqrt()

    def da(self, t):
        return -0.5 * (self.beta_d * t + self.beta_min) * self.a(t)

    def ds(self, t):
        return -self.a(t) * self.da(t) / self.s(t)

    def sigma(self, t):
        return torch.expm1(self._integral(t)).sqrt()

    def t_of_sigma(self, sigma):
        return ((self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min) / self.beta_d


@dataclass(frozen=True, kw_only=True)
class GVP(Path):
    """Trigonometric variance preserving path of SiT (arXiv 2401.08740): a = cos(pi t/2), s = sin(pi t/2)."""

    def a(self, t):
        return (0.5 * math.pi * t).cos()

    def s(self, t):
        return (0.5 * math.pi * t).sin()

    def da(self, t):
        return -0.5 * math.pi * (0.5 * math.pi * t).sin()

    def ds(self, t):
        return 0.5 * math.pi * (0.5 * math.pi * t).cos()

    def t_of_sigma(self, sigma):
        return sigma.atan() * (2 / math.pi)


@lru_cache(maxsize=32)
def _log_abar(steps: int, start: float, end: float, spacing: str) -> tuple[float, ...]:
    """ln abar at t = 0, 1/steps, ..., 1 (steps + 1 values, the first one 0). Plain floats: a cached tensor could be one
    that was made under FakeTensorMode.
    """
    power = 2 if spacing == "sqrt_linear" else 1
    betas = np.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=np.float64) ** power
    return (0.0, *np.cumsum(np.log1p(-betas)).tolist())


@dataclass(frozen=True, kw_only=True)
class DiscreteVP(Path):
    """DDPM's table of `steps` noise levels as a path: timestep j (0-based) is t = (j + 1) / steps, t = 0 is clean data.

    Between two timesteps ln abar is interpolated linearly, so a' and s' exist; derivatives at a node are those of the
    interval below it.
    spacing  "linear": beta linear from beta_start to beta_end (DDPM arXiv 2006.11239, DiT, PixArt);
             "sqrt_linear": sqrt(beta) linear, with 0.00085 and 0.012 the Stable Diffusion table.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    spacing: str = "linear"

    def __post_init__(self):
        limits.whole("steps", self.steps, least=2)
        limits.choice("spacing", self.spacing, ("linear", "sqrt_linear"))
        limits.number("beta_start", self.beta_start, above=0, most=0.999)
        limits.number("beta_end", self.beta_end, least=self.beta_start, most=0.999)

    def table(self, device="cpu") -> Tensor:
        """ln abar at t = 0, 1/steps, ..., 1: (steps + 1,) float64."""
        values = _log_abar(self.steps, self.beta_start, self.beta_end, self.spacing)
        return torch.tensor(values, dtype=torch.float64, device=device)

    def t_of_index(self, j: Tensor) -> Tensor:
        """Timestep index 0..steps-1 -> t in (0, 1], float64."""
        return (j.to(torch.float64) + 1) / self.steps

    def index_of_t(self, t: Tensor) -> Tensor:
        """Nearest timestep index 0..steps-1 (int64)."""
        return (t.to(torch.float64) * self.steps - 1).round().long().clamp(0, self.steps - 1)

    def _log_abar_and_slope(self, t):
        table = self.table(t.device)
        position = t.to(torch.float64) * self.steps
        low = (position.ceil().long() - 1).clamp(0, self.steps - 1)
        step = table[low + 1] - table[low]
        return table[low] + (position - low) * step, step * self.steps

    def a(self, t):
        return (0.5 * self._log_abar_and_slope(t)[0]).exp().to(t.dtype)

    def s(self, t):
        return (-torch.expm1(self._log_abar_and_slope(t)[0])).sqrt().to(t.dtype)

    def da(self, t):
        log_abar, slope = self._log_abar_and_slope(t)
        return (0.5 * slope * (0.5 * log_abar).exp()).to(t.dtype)

    def ds(self, t):
        log_abar, slope = self._log_abar_and_slope(t)
        return (-0.5 * slope * log_abar.exp() / (-torch.expm1(log_abar)).sqrt()).to(t.dtype)

    def sigma(self, t):
        return torch.expm1(-self._log_abar_and_slope(t)[0]).sqrt().to(t.dtype)

    def t_of_sigma(self, sigma):
        table = -self.table(sigma.device)  # increasing
        target = torch.log1p(sigma.to(torch.float64) ** 2)
        low = (torch.searchsorted(table, target.contiguous()) - 1).clamp(0, self.steps - 1)
        return ((low + (target - table[low]) / (table[low + 1] - table[low])) / self.steps).to(sigma.dtype)


@dataclass(frozen=True)
class DataTime:
    """A path seen in a dialect where t = 1 is DATA (SiT, LightningDiT, GMem): same states, time and v reversed."""

    path: Path

    def a(self, t):
        return self.path.a(1 - t)

    def s(self, t):
        return self.path.s(1 - t)

    def da(self, t):
        return -self.path.da(1 - t)

    def ds(self, t):
        return -self.path.ds(1 - t)

    def sample(self, x: Tensor, e: Tensor, t: Tensor) -> PathSample:
        """Like `Path.sample`; t (B,) with 1 = data, and v = dz/dt in that time."""
        ours = self.path.sample(x, e, 1 - t)
        return PathSample(z=ours.z, v=-ours.v, t=t, x=x, e=e)


def from_data_time(t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(t, v) of a t = 1 is DATA dialect -> canonical: t -> 1 - t AND v -> -v (both, or samples are garbage)."""
    return 1 - t, -v


to_data_time = from_data_time  # the map is its own inverse; two names so that call sites read


@dataclass(frozen=True)
class VelocityFromDataTime:
    """Wraps a velocity network of a t = 1 is DATA dialect: `wrapped(z, t)` is canonical, t = 1 noise."""

    velocity: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return -self.velocity(z, 1 - t)
