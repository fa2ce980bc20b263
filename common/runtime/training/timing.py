"""Seconds of real training steps, measured without training."""

import statistics
import time

import torch
from torch import nn

from common.runtime.training.module import ResearchModule, loss_of, modes_of, restore_modes, to_device


def step_times(module: ResearchModule, data, steps: int) -> dict[str, float]:
    """Median seconds of `steps` training steps: `forward_s`, `backward_s`, and `step_s` for both together.

    The batches are those the training loop would see; one more step before the first pays for the warm-up. Neither
    weights nor optimiser nor buffers nor random streams change, gradients are cleared, nothing is logged. The
    optimiser's own update and mixed precision are not part of it.

    data  data module; read from its `train_dataloader`
    """
    if data.trainer is None:
        data.setup("fit")
    cuda = module.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    modes = modes_of(module)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    trainer, module._trainer = module._trainer, None  # outside a trainer a module logs nothing
    rows = []
    try:
        if not module.training:
            module.train()
        with torch.random.fork_rng(devices=[module.device] if cuda else []), torch.enable_grad():
            torch.manual_seed(0)
            for number, batch in zip(range(steps + 1), data.train_dataloader(), strict=False):
                batch = to_device(batch, data, module.device)
                _clear(module)
                wait()
                started = time.perf_counter()
                loss = loss_of(module.training_step(batch, number))
                wait()
                forward = time.perf_counter()
                loss.backward()
                wait()
                ended = time.perf_counter()
                del loss
                rows.append((forward - started, ended - forward, ended - started))
    finally:
        module._trainer = trainer
        _clear(module)
        restore_modes(modes)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return dict(zip(("forward_s", "backward_s", "step_s"), medians, strict=False))


def _clear(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None
