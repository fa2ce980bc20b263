"""What a module knows about the run it is part of."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The settings of a run that its module and callbacks read. The defaults serve notebooks and tests.

    seed              of the run; every random number of training derives from it (>= 0)
    samples_per_step  samples of the joint batch, over processes and accumulated micro-batches
    sampler           noise -> images of the `sample` section; None where a module generates no images
    decoder           latents -> images; None for a network that makes images itself
    picture_average   weights that pictures during training are drawn with: an entry of ema.profiles, or raw
    picture_seed      seed of what is drawn for them
    count_flops       () -> FLOPs of one optimiser step, None where they are not known in advance. Costs seconds
    """

    seed: int = 0
    samples_per_step: int = 0
    sampler: Callable | None = None
    decoder: Callable[[Tensor], Tensor] | None = None
    picture_average: str = "raw"
    picture_seed: int = 0
    count_flops: Callable[[], float | None] | None = None
