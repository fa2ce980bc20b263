"""Random numbers of one sample, the same whatever the number of processes and workers."""

import hashlib

import numpy as np


class PositionDraws:
    """Random numbers keyed by (seed, position) and `purpose`: an endless stream for each sample of the run.

    Raw Philox words, because numpy promises those never change between versions.
    """

    def __init__(self, seed: int, position: int, purpose: str = "paired augmentation"):
        key = hashlib.sha256(f"{purpose} {seed} {position}".encode()).digest()[:16]
        self._words = np.random.Philox(key=int.from_bytes(key, "little"))

    def uniform(self) -> float:
        """In [0, 1)."""
        return (int(self._words.random_raw()) >> 11) * 2.0**-53

    def uniforms(self, count: int) -> np.ndarray:
        """The next `count` of `uniform`, float64 (count,)."""
        return (self._words.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, count: int) -> int:
        """0..count-1."""
        return int(self.uniform() * count)

    def between(self, low: float, high: float) -> float:
        """In [low, high)."""
        return low + (high - low) * self.uniform()

    def coin(self) -> bool:
        """True with probability 1/2."""
        return self.uniform() < 0.5
