"""What a module and its callbacks know about the run they are part of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=Callback)


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


def context_of(module: nn.Module) -> RunContext:
    """The context of a module, the defaults for one that has none."""
    found = getattr(module, "context", None)
    return found if isinstance(found, RunContext) else RunContext()


def find_callback(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's first callback of this kind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def logging_interval(trainer: Trainer) -> int:
    """Optimiser steps between two logged rows."""
    return max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
