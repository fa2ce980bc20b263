"""From a composed configuration to one of the verbs. No torch import here: `--help` and refusals must be instant."""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from common.errors import UserError, nearest, user_error
from common.limits import RANGES
from common.runtime.cli import paths
from common.runtime.cli.identity import run_name
from common.targets import current

VERBS = ("fit", "test", "sample", "export", "plan")


def register_resolvers() -> None:
    """OmegaConf resolvers used by conf/config.yaml. Idempotent."""

    def hydra_value(path: str, default):
        from hydra.core.hydra_config import HydraConfig

        if not HydraConfig.initialized():
            return default
        composed: Any = HydraConfig.instance().cfg
        return OmegaConf.select(composed, path, default=default)

    def experiment_name() -> str:
        return str(hydra_value("hydra.runtime.choices.experiment", "none")).replace("/", "_")

    OmegaConf.register_new_resolver("experiment_name", experiment_name, replace=True)
    OmegaConf.register_new_resolver("count", len, replace=True)  # of a list

    def name(seed, _root_) -> str:
        overrides = list(hydra_value("hydra.overrides.task", []))
        tree: Any = OmegaConf.to_container(_root_, resolve=False)
        return run_name(seed, overrides, tree)

    OmegaConf.register_new_resolver("run_name", name, replace=True)
    OmegaConf.register_new_resolver("run_dir", paths.run_dir, replace=True)
    OmegaConf.register_new_resolver("folder", paths.expanded, replace=True)
    # cached: a job of a sweep resolves this with overrides of its own, and must get the folder of the sweep
    OmegaConf.register_new_resolver("sweep_dir", paths.sweep_dir, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("hydra_record", lambda mode: ".hydra" if "MULTIRUN" in str(mode) else None,
                                    replace=True)  # fmt: skip


def help_text(conf: Path) -> str:
    """What `python -m projects.run --help` prints: verbs, experiments with their first comment line, where to look."""
    rows = []
    for path in sorted((conf / "experiment").glob("*.yaml")):
        lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("# ")]
        rows.append(f"  {path.stem:<28} {next((line for line in lines if not line.startswith('@')), '')}")
    sections = sorted(p.name for p in conf.iterdir() if p.is_dir())
    return "\n".join(
        [
            "usage: python -m projects.run +experiment=<name> [task=<verb>] [key=value ...] [-m]",
            "",
            "  task=fit      train, or continue the newest complete checkpoint (default)",
            "  task=test     the paper's metrics beside the published numbers",
            "  task=sample   what the network makes: images (grid, PNGs, npz), predictions, text, reconstructions",
            "  task=export   safetensors + configuration that load without Hydra",
            "  task=plan     parameters, FLOPs and memory, without allocating anything",
            "  -m            sweep over comma-separated values; table and plot at the end",
            "  --cfg job     print the composed configuration; --hydra-help for the rest of Hydra",
            "",
            "experiments (conf/experiment):",
            *rows,
            "",
            f"config groups (conf/): {', '.join(sections)}",
            "every key can be overridden: data.batch_size=64 trainer=gpu logger=wandb project.optimizer.lr=3e-4",
        ]
    )


def explain(error: Exception, conf: Path) -> tuple[str | None, int]:
    """(one sentence, exit code) for an exception that a user's input caused; (None, 1) for a fault of the program."""
    from hydra.errors import InstantiationException

    from common.runtime.cli.explain import explain_hydra_error, is_composition_error

    refusal = user_error(error)
    if refusal is not None:
        return _with_section(str(refusal), error), refusal.exit_code
    if is_out_of_memory(error):
        sentence = (
            "There is not enough memory. Lower data.batch_size or sample.batch_size, or make the network smaller."
        )
        return _with_section(sentence, error), 2
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__  # raised by a library's constructor: its message, and the section being built
        known = isinstance(cause, ValueError) or type(cause).__name__ == "MisconfigurationException"
        return (_with_section(" ".join(str(cause).split()), error), 2) if known else (None, 1)
    if is_composition_error(error):
        return explain_hydra_error(error, conf), 2
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} is not writable. Choose another folder with paths.outputs=<folder>.", 2
    making_folders = error.__traceback__ is not None and traceback.extract_tb(error.__traceback__)[-1].name == "mkdir"
    if isinstance(error, OSError) and error.filename and (error.errno in (17, 20, 28, 30) or making_folders):
        return f"Cannot write {error.filename}: {error.strerror}. Choose another folder with paths.outputs=<folder>.", 2
    return None, 1


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether Python, or torch on any device, could not allocate memory, anywhere in the chain of causes."""
    while error is not None:
        kind = type(error).__name__
        allocation = isinstance(error, RuntimeError) and (
            "can't allocate memory" in str(error) or "out of memory" in str(error)
        )
        if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or allocation:
            return True
        error = error.__cause__ or error.__context__
    return False


def _with_section(sentence: str, error: BaseException | None) -> str:
    """The sentence, led by the section Hydra was building (`project.net: ...`) unless it names that section itself."""
    while error is not None:
        found = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        if found:
            section = found.group(1)
            return sentence if section.split(".")[0] + "." in sentence else f"{section}: {sentence}"
        error = error.__cause__ or error.__context__
    return sentence


def open_sections(schema: dict) -> dict:
    """The schema with the sections whose keys are names a user chooses left open."""
    from common.runtime.cli.check import OPEN

    return {**schema, "needs": OPEN, "table": OPEN, "published": OPEN}


def quiet() -> None:
    """Filter out Lightning's advertisements and notes on its internals; warnings about the run stay."""
    import logging
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*", ".*no .validation_step.*",
        ".*broadcast_buffers. is deprecated.*", ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*", ".*lightning.pytorch.*litlogger.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)


def move_targets(node) -> None:
    """Replace every `_target_` of `node` that names a moved class by its old path with the present path."""
    if OmegaConf.is_dict(node):
        target = node.get("_target_")
        if isinstance(target, str) and current(target) != target:
            OmegaConf.update(node, "_target_", current(target))
    children = node.keys() if OmegaConf.is_dict(node) else range(len(node))
    for key in children:
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node[key]):
            move_targets(node[key])


def is_sweep() -> bool:
    """True inside a job of `-m`."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def launch(cfg: DictConfig):
    """Check the configuration, then run its verb. Returns the value a sweep optimises, or None."""
    from hydra.core.hydra_config import HydraConfig

    conf = Path(__file__).resolve().parents[3] / "conf"
    if cfg.task not in VERBS:
        raise UserError(
            f"task={cfg.task} is not a verb. {nearest(str(cfg.task), VERBS)}Set task to one of: {', '.join(VERBS)}."
        )
    if HydraConfig.initialized():  # the folder Hydra made is the run folder, also inside a sweep
        OmegaConf.update(cfg, "run.dir", HydraConfig.get().runtime.output_dir)
        choices = HydraConfig.get().runtime.choices
        OmegaConf.update(cfg, "run.experiment", str(choices.get("experiment") or "none").replace("/", "_"))
        if choices.get("evaluate") == "none":
            measure_nothing(cfg, conf)
    for key, folder in cfg.paths.items():
        OmegaConf.update(cfg, f"paths.{key}", paths.expanded(folder, f"paths.{key}"))
    try:
        return _launch(cfg, conf)
    finally:
        paths.remove_empty(Path(cfg.run.dir), Path(cfg.paths.outputs))  # of a refused command, or a plan


def measure_nothing(cfg: DictConfig, conf: Path) -> None:
    """`evaluate=none` switches measuring off: keys that an experiment sets for another evaluation are dropped.

    Which weights are shown and exported stays (`evaluate.average`).
    """
    average = OmegaConf.select(cfg, "evaluate.average")
    section = OmegaConf.load(conf / "evaluate" / "none.yaml")
    with open_dict(cfg):
        cfg.evaluate = section
        cfg.evaluate.average = section.average if average is None else average


def _launch(cfg: DictConfig, conf: Path):
    if isinstance(cfg.speed.threads, int) and RANGES["speed.threads"].holds(cfg.speed.threads):
        os.environ["OMP_NUM_THREADS"] = str(cfg.speed.threads)  # before torch is imported, which the check does
    quiet()

    from common.runtime.cli.check import check, check_data
    from common.runtime.cli.explain import read_schema

    check_data(cfg, conf)
    check(cfg, schema=open_sections(read_schema(conf)))
    move_targets(cfg)
    run_dir = Path(cfg.run.dir)
    if not os.access(run_dir if run_dir.exists() else run_dir.parent, os.W_OK):
        raise UserError(f"{run_dir} is not writable. Choose another folder with paths.outputs=<folder>.")

    import importlib

    module = importlib.import_module(f"common.runtime.verbs.{cfg.task}")
    result = getattr(module, f"{cfg.task}_task")(cfg)
    sys.stdout.flush()
    return result
