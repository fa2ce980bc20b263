"""Settings of the `speed` section: they change how a network is computed, and its outputs by rounding alone."""

import torch
from omegaconf import DictConfig
from torch import nn

from common.runtime.training.module import ResearchModule


def apply_speed(module: ResearchModule, cfg: DictConfig, *, backend: str | None = None) -> None:
    """Memory layout and compilation of the module's network, in place; state-dict keys stay as they are.

    speed.channels_last  null: on a CPU, where `python -m tools.bench ect --contiguous` shows the gain; not on CUDA,
                         where it has not been measured yet. Networks of two-dimensional convolutions only
    speed.compile        the map of an equilibrium (`net.cell`), else the raw network: the solver around a map takes
                         another number of steps each time and would be compiled anew for each
    backend              of torch.compile; None: torch's default
    """
    channels_last = cfg.speed.channels_last
    if channels_last is None:
        channels_last = cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    # a network with filters over three axes has another layout, and torch refuses to convert part of it
    if channels_last and not any(p.dim() == 5 for p in module.net.parameters()):
        module.net.to(memory_format=torch.channels_last)
    if cfg.speed.compile:
        compiled_part(module).compile(**({"backend": backend} if backend else {}))


def apply_tf32(wanted: bool) -> None:
    """TensorFloat-32 for float32 products and convolutions on CUDA, both on or both off.

    torch's own default allows it in convolutions alone; before torch 1.12 it did in both.
    """
    if not torch.cuda.is_available():
        return
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


def compiled_part(module: ResearchModule) -> nn.Module:
    """The sub-module that `speed.compile` compiles: the equilibrium's `cell` where there is one."""
    cell = getattr(module.net, "cell", None)
    return cell if isinstance(cell, nn.Module) else module.raw
