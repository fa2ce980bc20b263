"""Which noise level or time each training image gets. Every sampler: `sampler(n, generator=None, device="cpu") -> (n,)`
float32, drawn from `generator` or, when that is None, from the global random state of the device.

Units differ and are named in each docstring: "sigma" is a noise level in data units (0, inf), "t" is path time in
[0, 1] with 1 = noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from common import limits
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


ROWS = ("random", "first", "spread")


def _equal_rows(n: int, fraction: float, rows: str, generator: Generator | None, device) -> Tensor:
    """Which samples get r = t, (n,) bool; see `OrderThenMask`."""
    if rows == "random":
        return torch.rand(n, generator=generator, device=device) < fraction
    index = torch.arange(n, device=device)
    if rows == "first":
        return index < int(n * fraction)
    # float64: the share of any stretch of the batch is right to one sample
    return ((index + 1) * float(fraction) + 1e-9).floor() > (index * float(fraction) + 1e-9).floor()


def _check_pair(sampler) -> None:
    limits.number("equal", sampler.equal, least=0, most=1)
    limits.choice("rows", sampler.rows, ROWS)
    limits.number("uniform", sampler.uniform, least=0, most=1)


def _two_draws(sampler, n: int, generator: Generator | None, device) -> tuple[Tensor, Tensor]:
    """Two independent draws per sample, (n,) each, before any mask or order."""
    first = sampler.base(n, generator, device)
    second = (sampler.base if sampler.second is None else sampler.second)(n, generator, device)
    if sampler.uniform:
        drawn = [torch.rand(n, generator=generator, device=device) for _ in range(3)]
        chosen = drawn[0] < sampler.uniform
        first, second = torch.where(chosen, drawn[1], first), torch.where(chosen, drawn[2], second)
    return first, second


@dataclass(frozen=True, kw_only=True)
class OrderThenMask:
    """(t, r), both in the unit of `base`, r <= t: t = max and r = min of two draws, THEN r = t for a fraction `equal`.

    The samples with r = t have t = max of two draws, so their mean is higher than that of `base`. MeanFlow
    (arXiv 2505.13447): JAX code and py-meanflow v0; iMF.
    base     sampler of one time;   second: of the other one, None: `base`
    equal    fraction of samples with r = t; 1 is flow matching
    rows     which ones: "random": each by chance; "first": exactly the first floor(n equal), as in the JAX code;
             "spread": exactly that share, evenly over the batch, so that every process and micro-batch has as many
    uniform  fraction of samples whose two draws are uniform on [0, 1) instead
    Returns a pair of (n,) tensors.
    """

    base: object
    equal: float = 0.75
    rows: str = "random"
    second: object | None = None
    uniform: float = 0.0

    def __post_init__(self):
        _check_pair(self)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> tuple[Tensor, Tensor]:
        first, second = _two_draws(self, n, generator, device)
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        return t, torch.where(_equal_rows(n, self.equal, self.rows, generator, device), t, r)


@dataclass(frozen=True, kw_only=True)
class MaskThenOrder:
    """(t, r), both in the unit of `base`, r <= t: FIRST the second draw is set to the first for a fraction `equal`,
    then the pair is ordered. The samples with r = t follow `base` itself. pMF; py-meanflow v1 with `swap` off.

    base, second, equal, rows, uniform   as in `OrderThenMask`. pMF H: uniform 0.1
    swap     False: t stays the first draw and r = min(t, second), so a larger second draw gives r = t as well
    Returns a pair of (n,) tensors.
    """

    base: object
    equal: float = 0.75
    rows: str = "random"
    second: object | None = None
    uniform: float = 0.0
    swap: bool = True

    def __post_init__(self):
        _check_pair(self)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> tuple[Tensor, Tensor]:
        first, second = _two_draws(self, n, generator, device)
        second = torch.where(_equal_rows(n, self.equal, self.rows, generator, device), first, second)
        return torch.maximum(first, second) if self.swap else first, torch.minimum(first, second)


@dataclass(frozen=True, kw_only=True)
class PowerOmega:
    """omega (guidance scale): density ~ omega^-beta on [1, 1 + s_max]; beta 1: log-uniform. iMF (2512.02012)."""

    s_max: float = 7.0
    beta: float = 1.0

    def __post_init__(self):
        limits.number("s_max", self.s_max, least=0)
        limits.number("beta", self.beta, least=0)

    @property
    def largest(self) -> float:
        """The end of the range."""
        return 1 + self.s_max

    def quantile(self, u: Tensor) -> Tensor:
        """The omega below which a fraction u in [0, 1] of the draws lies, shape of u."""
        log_end = math.log1p(self.s_max)
        if self.beta == 1:
            return (u * log_end).exp()
        rest = 1 - self.beta
        return (torch.log1p(u * math.expm1(rest * log_end)) / rest).exp()

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        return self.quantile(torch.rand(n, generator=generator, device=device))


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval:
    """(t_min, t_max), times between which guidance acts: t_min uniform on [0, split), t_max on [split, 1). iMF, pMF.

    whole   always (0, 1): guidance at all times, in the paper's ablation the step before
    Returns a pair of (n,) tensors.
    """

    split: float = 0.5
    whole: bool = False

    def __post_init__(self):
        limits.number("split", self.split, above=0, most=1)

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> tuple[Tensor, Tensor]:
        if self.whole:
            return torch.zeros(n, device=device), torch.ones(n, device=device)
        low, high = (torch.rand(n, generator=generator, device=device) for _ in range(2))
        return low * self.split, self.split + high * (1 - self.split)


@dataclass(frozen=True, kw_only=True)
class LabelDrop:
    """Which samples lose their class label: (n,) bool, each with probability p.

    rows  "random": sample by sample; "first": as many, but always the first of the batch, as the official JAX code of
          MeanFlow, iMF and pMF does (with r = t in the first rows too, label-free samples then all have r = t)
    """

    p: float = 0.1
    rows: str = "random"

    def __post_init__(self):
        limits.number("p", self.p, least=0, most=1)
        limits.choice("rows", self.rows, ROWS[:2])

    def __call__(self, n: int, generator: Generator | None = None, device="cpu") -> Tensor:
        dropped = torch.rand(n, generator=generator, device=device) < self.p
        return dropped if self.rows == "random" else torch.arange(n, device=device) < dropped.sum()
