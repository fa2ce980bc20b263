"""Where a solve starts. Shape of the state (B, ...); draws come from torch's global generator by default."""

from collections.abc import Sequence

import torch
from torch import Tensor


def zeros(shape: Sequence[int], device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The usual start, z0 = 0."""
    return torch.zeros(*shape, device=device, dtype=dtype)


def normal(
    shape: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """z0 ~ N(0, std^2)."""
    return torch.randn(*shape, device=device, dtype=dtype, generator=generator) * std


def mixed_init(
    shape: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Entries N(0, 1) or 0, with probability 1/2 each: trains a layer to be path independent.

    Anil et al., Path Independent Equilibrium Models (arXiv 2211.09961), mixed initialisation.
    """
    z = torch.randn(*shape, device=device, dtype=dtype, generator=generator)
    return z * torch.empty_like(z).bernoulli_(0.5, generator=generator)
