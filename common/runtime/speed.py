"""The words of the `speed` section that change how a network is computed and nothing but rounding of what it gives."""

import torch
from omegaconf import DictConfig

from common.runtime.generative import GenerativeModule


def apply_speed(module: GenerativeModule, cfg: DictConfig, *, backend: str | None = None) -> None:
    """Memory layout and compilation of the module's network, in place; state-dict keys stay as they are.

    speed.channels_last  null: on a CPU, where `python -m tools.bench ect --contiguous` shows the gain; not on CUDA,
                         where it has not been measured yet
    backend              of torch.compile; None: torch's default
    """
    channels_last = cfg.speed.channels_last
    if channels_last is None:
        channels_last = cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if channels_last:
        module.net.to(memory_format=torch.channels_last)
    if cfg.speed.compile:
        module.net.raw.compile(**({"backend": backend} if backend else {}))
