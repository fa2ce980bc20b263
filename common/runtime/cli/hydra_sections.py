"""Hydra's own sections (`hydra.callbacks`, launcher, sweeper, logging), checked before Hydra builds anything from them.

Hydra instantiates these sections before it calls our function, and Python's logging calls any factory that its
configuration names. So the configuration loader itself refuses what is not in the lists below, wherever it was set: in
a file, in an experiment, on the command line, or in one job of a sweep (also in a worker process of a launcher).
"""

import re
from collections.abc import Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, nearest

CALLBACKS = ("common.runtime.cli.sweep.SweepTable", "hydra.experimental.callbacks.LogJobReturnCallback")
LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
SWEEPERS = (
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    *(
        f"optuna.samplers.{name}Sampler"
        for name in ("BruteForce", "CmaEs", "GP", "Grid", "NSGAII", "NSGAIII", "QMC", "Random", "TPE")
    ),
)
LOGGING = (
    "logging.Formatter",
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.handlers.RotatingFileHandler",
    "logging.handlers.TimedRotatingFileHandler",
    "colorlog.ColoredFormatter",
    "colorlog.StreamHandler",
)
SECTIONS = {
    "callbacks": CALLBACKS,
    "launcher": LAUNCHERS,
    "sweeper": SWEEPERS,
    "hydra_logging": LOGGING,
    "job_logging": LOGGING,
}
BUILT = ("_target_", "()", "class", "queue", "listener")  # keys whose value names what is called
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# Commands for a cluster's shell: only as typed on the command line, never from a file.
TYPED = ("setup", "teardown", "python", "srun_args", "additional_parameters", "container_image", "container_mounts")
# Variables a configuration may set for its run; others change which programs and files later commands take.
ENVIRONMENT = re.compile(
    r"(OMP|MKL|OPENBLAS)_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|PYTORCH_(CUDA_)?ALLOC_CONF|"
    r"NCCL_[A-Z0-9_]*(DEBUG|DISABLE|IFNAME|TIMEOUT|LEVEL)|WANDB_(MODE|PROJECT|ENTITY|NAME|TAGS|RUN_GROUP)|"
    r"ONESTEP_(OUTPUTS|CACHE|WEIGHTS)|DATA_ROOT|HYDRA_FULL_ERROR"
)


class CheckedConfigLoader(ConfigLoaderImpl):
    """Hydra's configuration loader, refusing configurations whose `hydra` section would run other code."""

    def load_configuration(self, config_name, overrides, *args, **kwargs) -> DictConfig:
        for override in overrides:
            if "pkg://" in override:
                raise UserError(f"{override} would import a package: give folders, hydra.searchpath=[file://<folder>].")
        config = super().load_configuration(config_name, overrides, *args, **kwargs)
        check_hydra(config)
        return config


def use_checked_loader() -> None:
    """Make `hydra.main` load configurations through `CheckedConfigLoader`. Idempotent."""
    import hydra._internal.hydra as entry

    if not hasattr(entry, "ConfigLoaderImpl"):
        raise RuntimeError("this version of hydra-core loads configurations by another way: it cannot be checked")
    entry.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]


def check_hydra(config: DictConfig) -> None:
    """Raises UserError, one line per problem, when the `hydra` section of a composed configuration names what is in no
    list of this module. References (`${...}`) in the checked sections are replaced by their present values.
    """
    hydra = config.get("hydra")
    if hydra is None:
        return
    typed = [text.lstrip("+").partition("=")[0] for text in hydra.get("overrides", {}).get("hydra", [])]
    problems: list[str] = []
    for section, allowed in SECTIONS.items():
        problems += _entry(hydra, section, f"hydra.{section}", allowed, typed)
    if OmegaConf.select(hydra, "sweeper.custom_search_space") is not None:
        problems.append("hydra.sweeper.custom_search_space would call a function: give hydra.sweeper.params instead.")
    for name in OmegaConf.select(hydra, "job.env_set") or {}:
        if not ENVIRONMENT.fullmatch(str(name)):
            problems.append(f"hydra.job.env_set.{name} is not allowed. Set {name} in the shell.")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _entry(parent: Any, key: Any, path: str, allowed: tuple[str, ...], typed: list[str]) -> Iterator[str]:
    """Problems of `parent[key]` and of what is below it."""
    raw = parent._get_node(key)
    if raw is None or raw._is_missing():
        return
    if raw._is_interpolation():
        text = str(raw._value())
        if key in BUILT:
            yield f"{path} must be written out, got {text}."
            return
        if not re.fullmatch(r"\$\{[^{}]*\}", text):
            if not re.search(r"^[^$]|[^}]$", text):  # may stand for a whole section
                yield f"{path} must be a value or one plain reference, got {text}."
            return  # text with references in it is text
        try:
            value = parent[key]
        except OmegaConfBaseException:  # known to Hydra only later: the job's number, its folder
            if not re.fullmatch(r"\$\{hydra\.(job|run|sweep|runtime)\.\w+\}", text):
                yield f"{path} refers to {text}, which does not exist."
            return
        with flag_override(parent, ["readonly", "struct"], False):
            parent[key] = value
    value = parent[key]
    if key in TYPED and value and path not in typed:
        yield f"{path} runs commands in a shell: type it on the command line ({path}=...); files may not set it."
    if key in BUILT and value is not None and value not in allowed:
        yield f"{path}={value} is not allowed. {nearest(str(value), allowed)}Allowed here: {', '.join(allowed)}."
    elif isinstance(value, DictConfig):
        for inner in value:
            yield from _entry(value, inner, f"{path}.{inner!s}", allowed, typed)
    elif isinstance(value, ListConfig):
        for index in range(len(value)):
            yield from _entry(value, index, f"{path}.{index}", allowed, typed)
    elif isinstance(value, str) and "\n" in value:
        yield f"{path} must be one line of text."  # a cluster's job script would run the next line
    elif isinstance(value, str) and value.startswith("ext://") and value not in STREAMS:
        yield f"{path}={value} is not allowed: a log goes to {' or '.join(STREAMS)}."
