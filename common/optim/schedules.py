"""Learning-rate multipliers `schedule(step) -> float` for `torch.optim.lr_scheduler.LambdaLR`; step counts from 0.

Schedules count in units of `per_step`: 1 means steps, the batch size means images. `warmup` is a linear ramp from 0
over that many units (0 = none), as in EDM: the very first step then has learning rate 0.
All are frozen and picklable.
"""

import math
from dataclasses import dataclass

from common import limits
from common.errors import UserError


def _check(schedule, *positive: str) -> None:
    limits.number("warmup", schedule.warmup, least=0)
    for name in positive:
        limits.number(name, getattr(schedule, name), above=0)


def ramp(n: float, warmup: float) -> float:
    """min(n / warmup, 1); 1 without warm-up."""
    return min(n / warmup, 1.0) if warmup > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Constant:
    """1 after the warm-up."""

    warmup: float = 0.0
    per_step: float = 1.0

    def __post_init__(self):
        _check(self, "per_step")

    def __call__(self, step: int) -> float:
        return ramp(step * self.per_step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """1 / sqrt(max(n / reference, 1)). EDM2 (arXiv 2312.02696) eq. 67: reference 70000 steps (35000 at 64 px); ECT on
    ImageNet-64: 2000.
    """

    reference: float = 70000.0
    warmup: float = 0.0
    per_step: float = 1.0

    def __post_init__(self):
        _check(self, "per_step", "reference")

    def __call__(self, step: int) -> float:
        n = step * self.per_step
        return ramp(n, self.warmup) / math.sqrt(max(n / self.reference, 1.0))


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from 1 at `start` to `final` at `total` (and `final` from then on), times the warm-up.

    start  None: the end of the warm-up
    """

    total: float
    final: float = 0.0
    warmup: float = 0.0
    per_step: float = 1.0
    start: float | None = None

    def __post_init__(self):
        _check(self, "per_step", "total")

    def __call__(self, step: int) -> float:
        n = step * self.per_step
        start = self.warmup if self.start is None else self.start
        done = min(max((n - start) / max(self.total - start, 1e-12), 0.0), 1.0)
        return ramp(n, self.warmup) * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True)
class Poly:
    """(1 - progress)^power from 1 at the end of the warm-up to `final` at `total`; power 1 is a straight line.

    every  the line is a stair: the value changes every so many steps (HamNet: 10)
    """

    total: float
    power: float = 1.0
    final: float = 0.0
    warmup: float = 0.0
    per_step: float = 1.0
    every: int = 1

    def __post_init__(self):
        _check(self, "per_step", "total", "power", "every")

    def __call__(self, step: int) -> float:
        n = step * self.per_step
        stair = step // self.every * self.every * self.per_step
        done = min(max((stair - self.warmup) / max(self.total - self.warmup, 1e-12), 0.0), 1.0)
        return ramp(n, self.warmup) * (self.final + (1 - self.final) * (1 - done) ** self.power)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """1 until `at`, `factor` from there on, times the warm-up. IGNN's graph classification: half from epoch 51 on."""

    at: float
    factor: float = 0.5
    warmup: float = 0.0
    per_step: float = 1.0

    def __post_init__(self):
        _check(self, "per_step", "at", "factor")

    def __call__(self, step: int) -> float:
        n = step * self.per_step
        return ramp(n, self.warmup) * (self.factor if n >= self.at else 1.0)


@dataclass(frozen=True, kw_only=True)
class OneCycleLinear:
    """Two straight lines: from `start` up to 1 at `share` of all steps, then down to `final` at their end.

    The numbers of torch's OneCycleLR with anneal_strategy "linear", of which RAFT and DEQ-Flow (arXiv 2204.08442, code)
    take total = training steps + 100 and share .05: the peak is the optimiser's own learning rate.

    total  steps of the training;   extra  added to them, so that the last step still learns
    start  multiplier of the first step (torch: 1 / div_factor)
    final  multiplier after total + extra steps (torch: 1 / (div_factor * final_div_factor))
    """

    total: float
    extra: float = 100.0
    share: float = 0.05
    start: float = 1 / 25
    final: float = 1 / 25e4

    def __post_init__(self):
        limits.number("total", self.total, above=0)
        limits.number("extra", self.extra, least=0)
        if not (0 < self.share < 1 and self.share * (self.total + self.extra) > 1):
            raise UserError(
                f"share={self.share!r} leaves no step to rise in. Set it between 0 and 1, above 1 / (total + extra)."
            )

    def __call__(self, step: int) -> float:
        peak, end = self.share * (self.total + self.extra) - 1, self.total + self.extra - 1
        if step <= peak:
            return self.start + (1 - self.start) * step / peak
        return 1 + (self.final - 1) * min((step - peak) / (end - peak), 1.0)
