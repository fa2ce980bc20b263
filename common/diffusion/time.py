"""Which noise level or time each training image gets. Every sampler: `sampler(n, generator=None, device="cpu") -> (n,)`
float32, drawn from `generator` or, when that is None, from the global random state of the device.

Units differ and are named in each docstring: "sigma" is a noise level in data units (0, inf), "t" is path time in
[0, 1] with 1 = noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common.diffusion import limits
from common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """sigma: ln sigma ~ N(mean, std^2). EDM (arXiv 2206.00364) table 1: (-1.2, 1.2); ECT CIFAR-10: (-1.1, 2.0)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        limits.number("mean", self.mean)
        limits.number("std", self.std, least=0)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        return (torch.randn(n, generator=generator, device=device) * self.std + self.mean).exp()


@dataclass(frozen=True, kw_only=True)
class TruncatedLogNormal:
    """sigma: LogNormal(mean, std) conditioned on low <= sigma <= high (truncated p(t) of TCM, arXiv 2410.14895)."""

    mean: float = -1.1
    std: float = 2.0
    low: float = 1.0
    high: float = math.inf

    def __post_init__(self):
        limits.number("mean", self.mean)
        limits.number("std", self.std, above=0)
        limits.number("low", self.low, least=0)
        limits.number("high", self.high, above=self.low)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        def below(sigma):
            z = (math.log(sigma) - self.mean) / self.std if sigma > 0 else -math.inf
            return 0.5 * (1 + math.erf(z / math.sqrt(2)))

        low, high = below(self.low), below(self.high)
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64) * (high - low) + low
        z = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        sigma = (z * self.std + self.mean).exp()
        return sigma.clamp(self.low, self.high).float()


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """t: logit t ~ N(mean, std^2), t in (0, 1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        limits.number("mean", self.mean)
        limits.number("std", self.std, least=0)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        return (torch.randn(n, generator=generator, device=device) * self.std + self.mean).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """t (or any quantity): uniform on [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        limits.number("low", self.low)
        limits.number("high", self.high, above=self.low)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        return torch.rand(n, generator=generator, device=device) * (self.high - self.low) + self.low


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """sigma (or a guidance weight): ln value uniform on [ln low, ln high). VE training: (0.02, 100)."""

    low: float = 0.02
    high: float = 100.0

    def __post_init__(self):
        limits.sigma_range(self.low, self.high, ("low", "high"))

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        return self.low * (self.high / self.low) ** torch.rand(n, generator=generator, device=device)


@dataclass(frozen=True, kw_only=True)
class KarrasGridUniform:
    """sigma: u uniform on [low, high), sigma on the rho grid with u = 0 at sigma_min and u = 1 at sigma_max.

    SiD (arXiv 2404.04057): low 0.02, high 0.8, rho 7.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    low: float = 0.0
    high: float = 0.8

    def __post_init__(self):
        limits.sigma_range(self.sigma_min, self.sigma_max)
        limits.number("rho", self.rho, above=0)
        limits.number("low", self.low, least=0)
        limits.number("high", self.high, above=self.low, most=1)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        u = torch.rand(n, generator=generator, device=device) * (self.high - self.low) + self.low
        small, large = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (small + u * (large - small)) ** self.rho


@dataclass(frozen=True, kw_only=True)
class VPSigma:
    """sigma: VP noise level at t uniform on (epsilon_t, 1]. EDM (arXiv 2206.00364) table 1, VP training column."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def __post_init__(self):
        limits.number("beta_d", self.beta_d, above=0)
        limits.number("beta_min", self.beta_min, above=0)
        limits.number("epsilon_t", self.epsilon_t, above=0, most=1)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        t = 1 + torch.rand(n, generator=generator, device=device) * (self.epsilon_t - 1)
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()


@dataclass(frozen=True, kw_only=True)
class GridSigma:
    """sigma: one entry, uniformly chosen, of a fixed table of positive noise levels (iDDPM training).

    levels  the table, e.g. `IDDPMPrecond.levels()`
    """

    levels: tuple[float, ...]

    def __post_init__(self):
        if not len(self.levels):
            raise UserError("levels must hold at least one noise level, got none. Give the noise levels to draw from.")
        for level in self.levels:
            limits.sigma("levels", float(level))

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        index = torch.randint(len(self.levels), (n,), generator=generator, device=device)
        return torch.tensor(self.levels, dtype=torch.float32, device=device)[index]


def _equal_rows(n: int, fraction: float, exact: bool, generator: Generator | None, device) -> Tensor:
    """Which samples get r = t: (n,) bool, each with probability `fraction`, or exactly the first floor(n fraction)."""
    if exact:
        return torch.arange(n, device=device) < int(n * fraction)
    return torch.rand(n, generator=generator, device=device) < fraction


@dataclass(frozen=True, kw_only=True)
class OrderThenMask:
    """(t, r), both in the unit of `base`, r <= t: t = max and r = min of two draws, THEN r = t for a fraction `equal`.

    The samples with r = t have t = max of two draws, so their mean is higher than that of `base`. MeanFlow
    (arXiv 2505.13447) JAX code, iMF.
    exact  True: the first floor(n * equal) samples are the equal ones, as in the official code
    Returns a pair of (n,) tensors.
    """

    base: object
    equal: float = 0.75
    exact: bool = False

    def __post_init__(self):
        limits.number("equal", self.equal, least=0, most=1)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> tuple[Tensor, Tensor]:
        first, second = self.base(n, generator, device), self.base(n, generator, device)
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        return t, torch.where(_equal_rows(n, self.equal, self.exact, generator, device), t, r)


@dataclass(frozen=True, kw_only=True)
class MaskThenOrder:
    """(t, r), both in the unit of `base`, r <= t: FIRST the second draw is set to the first for a fraction `equal`,
    then the pair is ordered. The samples with r = t follow `base` itself. pMF, py-meanflow v1.

    Returns a pair of (n,) tensors.
    """

    base: object
    equal: float = 0.75
    exact: bool = False

    def __post_init__(self):
        limits.number("equal", self.equal, least=0, most=1)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> tuple[Tensor, Tensor]:
        first, second = self.base(n, generator, device), self.base(n, generator, device)
        second = torch.where(_equal_rows(n, self.equal, self.exact, generator, device), first, second)
        return torch.maximum(first, second), torch.minimum(first, second)
