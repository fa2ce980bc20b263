"""`task=plan`: what a run would cost, computed on fake tensors: no weights, activations or data are allocated."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from common.errors import UserError
from common.runtime.training.module import ResearchModule


@dataclass(frozen=True)
class Plan:
    """Cost of one run. Memory in bytes per process, FLOPs of the joint batch of one optimiser step."""

    parameters: int  # raw network, as papers count
    trainable: int
    micro_batch: int  # samples per process and micro-step
    world_size: int
    flops_per_step: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    steps: int
    images: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes + self.activation_bytes
        )


def raw_parameters(module: ResearchModule) -> int:
    """Parameters of the network without its wrapper: the number papers publish. A shared one counts once."""
    return sum(p.numel() for p in module.raw.parameters())


def micro_batch(batch_size: int, world_size: int, accumulate: int) -> int:
    """Samples per process and micro-step. Raises UserError when the batch cannot be split evenly."""
    if batch_size < 1:
        raise UserError(f"data.batch_size must be >= 1, got {batch_size}. Set data.batch_size to images per step.")
    parts = world_size * accumulate
    if batch_size % parts:
        raise UserError(
            f"data.batch_size={batch_size} cannot be split over {world_size} processes x {accumulate} accumulated "
            f"micro-batches. Choose a multiple of {parts}."
        )
    return batch_size // parts


def world_size(cfg: DictConfig) -> int:
    """Processes the trainer section asks for; words such as `auto` count as one per node."""
    devices = cfg.trainer.devices
    if isinstance(devices, str | int):
        count = max(int(devices), 1) if str(devices).lstrip("-").isdigit() else 1
    else:
        count = len(devices)
    return count * cfg.trainer.num_nodes


def _for_planning(cfg: DictConfig) -> DictConfig:
    """What cannot be traced is left out: data-dependent row selection (every row takes every pass, an upper bound) and
    the augmentation, which is no matrix work.
    """
    cfg = cfg.copy()
    for key, value in (("project.loss.skip_zero", False), ("project.augment", None)):
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, value)
    return cfg


def build_fake(cfg: DictConfig):
    """(fake mode, module) of the configuration, its parameters fake CPU tensors: shapes without storage."""
    from hydra.utils import instantiate

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module = instantiate(_for_planning(cfg).project, _convert_="all")
    return mode, module.train()


class _NoModules:
    """In place of the counter's table by module, whose hooks fail inside `torch.func.jvp` and cost time elsewhere."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def flop_counter() -> FlopCounterMode:
    """A counter that includes the fused attention of CPUs, the device of fake tensors; torch 2.14 counts 0 for it."""

    def forward(q, k, v, *others, **named):
        return sdpa_flop_count(q, k, v)

    def backward(g, q, k, v, *others, **named):
        return sdpa_backward_flop_count(g, q, k, v)

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def fake_training_step(cfg: DictConfig, images: int) -> tuple[ResearchModule, float, int]:
    """One forward and backward of a batch of `images` samples on fake tensors: (module, FLOPs, bytes of activations
    kept for the backward). An equilibrium takes every step its solver may take: an upper bound.
    """
    mode, module = build_fake(cfg)
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    lower = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(cfg.trainer.precision))
    autocast = torch.autocast("cpu", dtype=lower) if lower else nullcontext()
    with mode, flop_counter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with autocast:
            loss = module.fake_step(module.fake_batch(images))
        loss.backward()
    return module, float(counter.get_total_flops()), sum(kept.values())


def optimizer_bytes_per_element(make_optimizer) -> float:
    """Bytes of optimiser state per parameter, measured on one small real tensor of 4096 elements."""
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer([parameter])
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(t.numel() * t.element_size() for t in state if torch.is_tensor(t) and t.numel() > 1) / 4096


def make_plan(cfg: DictConfig) -> Plan:
    """The plan of a configuration for its precision and world size."""
    world = world_size(cfg)
    accumulate = cfg.trainer.accumulate_grad_batches
    local = micro_batch(cfg.data.batch_size, world, accumulate)
    module, flops, activations = fake_training_step(cfg, local)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    left_out = tuple(module.unaveraged)
    averaged = sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and not n.startswith(left_out))
    weights = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    strategy = OmegaConf.select(cfg, "trainer.strategy._target_", default="") or ""
    shard = world if strategy.endswith("FSDPStrategy") else 1
    return Plan(
        parameters=raw_parameters(module),
        trainable=trainable,
        micro_batch=local,
        world_size=world,
        flops_per_step=flops * world * accumulate,
        weight_bytes=weights // shard,
        gradient_bytes=4 * trainable // shard,
        optimizer_bytes=int(optimizer_bytes_per_element(module.make_optimizer) * trainable) // shard,
        average_bytes=4 * averaged * len(cfg.ema.profiles) if cfg.ema else 0,
        activation_bytes=activations,
        steps=cfg.trainer.max_steps,
        images=cfg.trainer.max_steps * cfg.data.batch_size,
    )


def plan_task(cfg: DictConfig) -> float:
    """Print the plan as a table; raise UserError when the parameter count differs from the published one."""
    from rich.console import Console
    from rich.table import Table

    plan = make_plan(cfg)
    expected = cfg.plan.parameters
    if expected is not None and plan.parameters != expected:
        raise UserError(
            f"The network has {plan.parameters:,} parameters, the published setting {expected:,} (plan.parameters). "
            f"Undo the overrides of project.net, or set plan.parameters=null for a network of your own."
        )
    mib = 2**20
    rows = [
        ("parameters of the network", f"{plan.parameters:,}" + (" (as published)" if expected else "")),
        ("processes x micro-batch", f"{plan.world_size} x {plan.micro_batch} samples"),
        ("precision", str(cfg.trainer.precision)),
        ("FLOPs per optimiser step", f"{plan.flops_per_step / 1e9:,.2f} GFLOP (every row through every pass)"),
        ("weights", f"{plan.weight_bytes / mib:,.1f} MiB"),
        ("gradients", f"{plan.gradient_bytes / mib:,.1f} MiB"),
        ("optimiser state", f"{plan.optimizer_bytes / mib:,.1f} MiB"),
        ("weight averages", f"{plan.average_bytes / mib:,.1f} MiB"),
        ("activations kept for the backward", f"{plan.activation_bytes / mib:,.1f} MiB"),
        ("sum per process", f"{plan.total_bytes / mib:,.1f} MiB"),
        ("optimiser steps", f"{plan.steps:,}"),
        ("samples seen", f"{plan.images:,}"),
        ("training FLOPs in all", f"{plan.flops_per_step * plan.steps:.3e}"),
    ]
    if cfg.plan.peak_tflops:
        hours = plan.flops_per_step * plan.steps / (cfg.plan.peak_tflops * 1e12 * plan.world_size) / 3600
        rows.append((f"hours at {cfg.plan.peak_tflops:g} TFLOP/s per device, fully used", f"{hours:.2f}"))
    table = Table(title=f"plan of {cfg.run.experiment}", show_header=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return float(plan.total_bytes)
