"""Random numbers as a function of (seed, step, name), independent of earlier draws.

A step that draws from here needs no generator state in a checkpoint: step 14 of a resumed run draws what step 14 of
the uninterrupted run drew. The idea of re-seeding per step follows EDM2 (arXiv 2312.02696, training loop); drawing the
joint batch and keeping this rank's rows makes the draw independent of the number of processes as well.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from common.tensors import only_shapes


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any mix of integers and words: sha256, so neighbouring steps are unrelated."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one training micro-step.

    seed        run seed
    step        micro-batches done before this one (>= 0)
    rank        this process, 0 <= rank < world_size
    world_size  processes that share the joint batch

    `normal` and `apply` draw for the JOINT batch (world_size x the local batch) and keep this rank's rows, so two
    processes train on exactly the numbers one process would. Memory: world_size x one draw, freed at once.
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1

    def generator(self, name: str, device: torch.device | str = "cpu", *, local: bool = False) -> torch.Generator:
        """A fresh generator for one named purpose; `local=True` differs per rank."""
        parts = (self.seed, self.step, name, self.rank) if local else (self.seed, self.step, name)
        return torch.Generator(device=device).manual_seed(derive_seed(*parts))

    def rows(self, local: int) -> slice:
        """This rank's rows of a joint batch made of `local` rows per rank."""
        return slice(self.rank * local, (self.rank + 1) * local)

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal of the shape, dtype and device of `like` (B, ...)."""
        if only_shapes(like):
            return torch.randn_like(like)  # planning: shapes only, generators cannot be traced
        shape = (like.shape[0] * self.world_size, *like.shape[1:])
        joint = torch.randn(shape, generator=self.generator(name, like.device), dtype=like.dtype, device=like.device)
        return joint[self.rows(like.shape[0])]

    def apply(self, name: str, sampler, local: int) -> Tensor:
        """`sampler(n, generator=...)` (a `common.diffusion.time` object) for the joint batch, on the CPU: (local, ...).

        Times are drawn on the CPU on purpose: which rows need a second network pass is then known to the host
        without a device synchronisation.
        """
        return sampler(local * self.world_size, generator=self.generator(name))[self.rows(local)]


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generators for one micro-step (dropout and anything that draws implicitly)."""
    torch.manual_seed(derive_seed(seed, step, "global", rank))
