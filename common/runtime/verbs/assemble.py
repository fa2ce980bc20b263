"""The objects of one run, built from its configuration."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common.errors import UserError, nearest, user_error
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.training.context import RunContext
from common.runtime.training.module import ResearchModule
from common.runtime.training.solver_health import equilibria
from common.runtime.training.speed import apply_speed, apply_tf32
from common.runtime.training.weights import find_init
from common.runtime.verbs.evaluate import Evaluation, SplitEvaluation
from common.runtime.verbs.plan import make_plan, micro_batch, world_size

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


@dataclass
class Assembled:
    """The objects of one run."""

    cfg: DictConfig
    plain: dict
    folder: Path
    data: Any  # the data module
    module: ResearchModule
    sampler: Any  # that of the sample section; unused by modules that generate no images
    evaluation: Evaluation | SplitEvaluation | None  # None for verbs that measure nothing
    start: Path | None = None  # checkpoint that training continues from


def instantiate(node, **options):
    """Hydra's instantiate with plain Python containers; a UserError of a constructor keeps its message."""
    import hydra

    return hydra.utils.instantiate(node, _convert_="all", **options)


def assemble(cfg: DictConfig, *, training: bool, measuring: bool) -> Assembled:
    """Build what a verb needs. The cheapest checks come first: batch size, data files, then the network."""
    plain = cast(dict, OmegaConf.to_container(cfg, resolve=True))
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise UserError(
            f"trainer.precision={cfg.trainer.precision} is not known. {nearest(str(cfg.trainer.precision), PRECISIONS)}"
            f"Set it to one of: {', '.join(PRECISIONS)}."
        )
    if training:
        micro_batch(cfg.data.batch_size, world_size(cfg), cfg.trainer.accumulate_grad_batches)
    data = instantiate(cfg.data)
    without_data = cfg.evaluate.get("statistics") and not cfg.evaluate.get("floor")  # task=test then reads none
    if training or (measuring and not without_data):
        data.check()
    if training and not plain["needs"] and not list_checkpoints(Path(cfg.run.dir) / "checkpoints"):
        find_init(cfg.init.file, cfg.init.hint)
    sampler = instantiate(cfg.sample.sampler)
    evaluation = build_evaluation(cfg, training=training) if measuring else None
    apply_tf32(cfg.speed.tf32)
    if cfg.speed.threads:
        torch.set_num_threads(cfg.speed.threads)
    torch.manual_seed(cfg.seed)
    module = instantiate(cfg.project)
    module.context = RunContext(
        seed=cfg.seed,
        samples_per_step=cfg.data.batch_size,
        sampler=sampler,
        decoder=build_decoder(cfg, needed=training or measuring) if module.uses_sampler else None,
        picture_average=cfg.sample.average,
        picture_seed=cfg.sample.seed,
        count_flops=partial(_planned_flops, cfg, module.net),
    )
    if training or measuring:
        module.check_data(data)
    if evaluation:
        evaluation.check(module, data)
    if training and not module.automatic_optimization:
        _check_manual(cfg)
    apply_speed(module, cfg)
    return Assembled(cfg, plain, Path(cfg.run.dir), data, module, sampler, evaluation)


def _planned_flops(cfg: DictConfig, net: nn.Module) -> float | None:
    """FLOPs of one optimiser step; None with an equilibrium, whose solver may stop before the plan's upper bound."""
    return None if equilibria(net) else make_plan(cfg).flops_per_step


def build_decoder(cfg: DictConfig, *, needed: bool):
    """What turns a network's latents into images, None where it makes images itself.

    needed  raise UserError now when its files are not there, instead of at the first image
    """
    decoder = instantiate(cfg.decoder) or None
    if needed and decoder is not None:
        decoder.check()
    return decoder


def _check_manual(cfg: DictConfig) -> None:
    """Raises UserError for what a module that alternates between its optimisers cannot have."""
    if cfg.trainer.accumulate_grad_batches != 1 or cfg.trainer.gradient_clip_val is not None:
        raise UserError(
            "This experiment alternates between two optimisers: set trainer.accumulate_grad_batches=1 and "
            "trainer.gradient_clip_val=null. For large batches use more processes."
        )
    if OmegaConf.select(cfg, "trainer.strategy.find_unused_parameters") is False:
        raise UserError(
            "This experiment alternates between two optimisers, and each backward pass reaches the parameters of one: "
            "set trainer.strategy.find_unused_parameters=true."
        )


def build_evaluation(cfg: DictConfig, *, training: bool) -> Evaluation | SplitEvaluation:
    """The evaluation of a configuration.

    With an extractor file missing, training prints a note at the start and continues without metrics (`task=test`
    measures them later). Every other verb raises UserError.
    """
    if not cfg.evaluate.get("extractors"):
        return instantiate(cfg.evaluate)
    without = cfg.evaluate.copy()
    without.extractors = {}
    nothing_measured = instantiate(without)  # raises for errors in the section itself
    try:
        return instantiate(cfg.evaluate)
    except Exception as error:
        refusal = user_error(error)
        if not training or refusal is None:
            raise
        print(f"note: no metrics in this run, measure later with task=test: {refusal}", flush=True)
        return nothing_measured


def task_overrides() -> list[str]:
    """What the user typed, or nothing outside Hydra's own entry."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
