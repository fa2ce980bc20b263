"""Dotted paths (`_target_`) in configurations and exports: which are allowed, and what they name.

A path names a class defined in this repository, one of the few functions in `FUNCTIONS`, or a library class listed in
`FAMILIES` or `CLASSES`. Nothing else is imported or looked up, so that neither an experiment file nor an export can run
other code. A class that moved is found under its old path, too (`MOVED`): run folders and exports of older versions
stay usable.
"""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from common.errors import UserError, nearest

OURS = ("common.", "projects.")
# Packages of ours that no configuration builds anything from: the command line (its hook of sweeps aside, see
# common.runtime.cli.hydra_sections), and the readers and writers of files.
CLOSED = ("common.runtime.cli.", "common.runtime.verbs.", "common.files.", "common.targets.", "common.weights.")
OPENED = (
    "common.runtime.verbs.evaluate.Evaluation",
    "common.runtime.verbs.evaluate.SplitEvaluation",
    "common.weights.vae.SdVae",
    "common.weights.vae.LatentDecoder",
)
# Functions a configuration may call. Any other function may write files or start programs; give a class instead.
FUNCTIONS = ("common.deq.layers.apply_norm", "common.ham.replace.with_ham", "common.nets.timm_model.create")
# Library classes a configuration may name: all of a package that derive from this base.
FAMILIES = {
    "torch.nn": "torch.nn.Module",
    "torch.optim": "torch.optim.Optimizer",
    "torch.optim.lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "torchvision.transforms.v2": "torch.nn.Module",
    "timm.loss": "torch.nn.Module",
    "timm.optim": "torch.optim.Optimizer",
    "timm.scheduler": "timm.scheduler.scheduler.Scheduler",
}
# And single ones, by package. Left out: what loads files or runs programs, such as DeepSpeed's compiler.
CLASSES = {
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.callbacks": (
        "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor", "ModelSummary",
        "RichModelSummary", "RichProgressBar", "TQDMProgressBar", "ThroughputMonitor", "Timer",
    ),
    "lightning.pytorch.loggers": ("CSVLogger", "CometLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
    "lightning.pytorch.plugins": ("DoublePrecision", "FSDPPrecision", "HalfPrecision", "MixedPrecision"),
    "lightning.pytorch.plugins.environments": (
        "LSFEnvironment", "LightningEnvironment", "MPIEnvironment", "SLURMEnvironment", "TorchElasticEnvironment",
    ),
    "lightning.pytorch.profilers": ("AdvancedProfiler", "PassThroughProfiler", "PyTorchProfiler", "SimpleProfiler"),
    "lightning.pytorch.strategies": (
        "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy",
    ),
}  # fmt: skip
CONFIGURATION = (*OURS, *(f"{package}." for package in (*FAMILIES, *CLASSES)))
# An export may come from elsewhere: networks and samplers alone, nothing that reads, writes or downloads.
EXPORT = ("common.nets.", "common.deq.", "common.ham.", "common.diffusion.", "projects.", "torch.nn.")

# Old path -> present path, of a module or of one class; the longest that fits counts.
MOVED = {
    "common.data.images": "common.data.images.module",
    "common.data.augment": "common.data.images.augment",
    "common.data.cifar": "common.data.images.cifar",
    "common.data.digits": "common.data.images.digits",
    "common.data.folder": "common.data.images.folder",
    "common.data.mnist": "common.data.images.mnist",
    "common.data.latents": "common.data.latents.module",
    "common.data.latent_cache": "common.data.latents.cache",
    "common.data.segmentation": "common.data.segmentation.module",
    "common.data.paired": "common.data.segmentation.augment",
    "common.data.segmentation_pairs": "common.data.segmentation.pairs",
    "common.data.segmentation_sources": "common.data.segmentation.sources",
    "common.data.segmentation_names": "common.data.segmentation.names",
    "common.data.palette": "common.data.segmentation.palette",
    "common.data.camvid": "common.data.segmentation.camvid",
    "common.data.digit_canvas": "common.data.segmentation.digit_canvas",
    "common.data.graph": "common.data.graph.module",
    "common.data.graph_files": "common.data.graph.files",
    "common.data.chains": "projects.torchdeq.chains",
    "common.data.text": "common.data.text.module",
    "common.data.corpus": "common.data.text.corpus",
    "common.data.signal": "projects.torchdeq.signal_data",
    "common.data.signal_source": "projects.torchdeq.signals",
    "common.data.lifted": "projects.pmf.embedded_plane",
    "common.data.lifted.LiftedCurve": "projects.pmf.embedded_plane.EmbeddedCurve",
    "projects.pmf.lifted": "projects.pmf.embedded_plane",
    "projects.pmf.lifted.LiftedCurve": "projects.pmf.embedded_plane.EmbeddedCurve",
    "projects.pmf.lift.LiftedMeanFlow": "projects.pmf.lift.EmbeddedCurveMeanFlow",
    "common.nets.raft.correlation": "projects.deq_flow.raft.correlation",
    "common.nets.raft.encoder": "projects.deq_flow.raft.encoder",
    "common.nets.raft.network": "projects.deq_flow.raft.network",
    "common.nets.raft.update": "projects.deq_flow.raft.update",
    "common.nets.raft.upsample": "projects.deq_flow.raft.upsample",
    "common.nets.inr": "projects.torchdeq.inr_networks",
    "common.nets.sagan": "projects.hamburger.sagan",
    "common.nets.hamnet": "projects.hamburger.hamnet",
    "common.nets.context": "projects.hamburger.context",
    "common.nets.van": "projects.hamburger.van",
    "common.nets.pmf": "projects.pmf.network",
    "common.losses.flow": "projects.deq_flow.losses",
    "common.metrics.flow": "projects.deq_flow.metrics",
    "common.weights.flow": "projects.deq_flow.weights",
    "common.runtime.launch": "common.runtime.cli.launch",
    "common.runtime.check": "common.runtime.cli.check",
    "common.runtime.explain": "common.runtime.cli.explain",
    "common.runtime.needs": "common.runtime.cli.needs",
    "common.runtime.lock": "common.runtime.cli.lock",
    "common.runtime.sweep": "common.runtime.cli.sweep",
    "common.runtime.fit": "common.runtime.verbs.fit",
    "common.runtime.test": "common.runtime.verbs.test",
    "common.runtime.sample": "common.runtime.verbs.sample",
    "common.runtime.plan": "common.runtime.verbs.plan",
    "common.runtime.report": "common.runtime.verbs.report",
    "common.runtime.evaluate": "common.runtime.verbs.evaluate",
    "common.runtime.module": "common.runtime.training.module",
    "common.runtime.generative": "common.runtime.training.generative",
    "common.runtime.callbacks": "common.runtime.training.callbacks",
    "common.runtime.checkpoint": "common.runtime.training.checkpoint",
    "common.runtime.ema": "common.runtime.training.ema",
    "common.runtime.guard": "common.runtime.training.guard",
    "common.runtime.logger": "common.runtime.training.logger",
    "common.runtime.seeding": "common.runtime.training.seeding",
    "common.runtime.solver_health": "common.runtime.training.solver_health",
    "common.runtime.gradient_norm": "common.runtime.training.gradient_norm",
    "common.runtime.memory": "common.runtime.training.memory",
    "common.runtime.speed": "common.runtime.training.speed",
    "common.runtime.spread": "common.runtime.training.spread",
    "common.runtime.timing": "common.runtime.training.timing",
    "common.runtime.weights": "common.runtime.training.weights",
    "common.tasks.equilibrium": "common.runtime.training.equilibrium",
    "common.deq.torchdeq_api": "common.torchdeq.api",
    "common.deq.torchdeq_config": "common.torchdeq.config",
    "common.deq.torchdeq_core": "common.torchdeq.core",
    "common.deq.torchdeq_grad": "common.torchdeq.grad",
    "common.deq.torchdeq_norm": "common.torchdeq.norm",
    "common.deq.torchdeq_solver": "common.torchdeq.solver",
    "common.deq.initial": "common.torchdeq.initial",
    "common.diffusion.limits": "common.limits",
    "common.data.segmentation.EqualSizes": "common.data.sampler.EqualSizes",
    "common.data.paired.PositionDraws": "common.data.draws.PositionDraws",
}


def current(target: str) -> str:
    """The present path of what `target` names: itself, unless it has moved."""
    parts = target.split(".")
    for cut in range(len(parts), 1, -1):
        moved = MOVED.get(".".join(parts[:cut]))
        # A package may have the name of a module that moved into it. So only a name directly below an old module is
        # an old path: common.data.images.X moved, common.data.images.cifar.X is the present path.
        if moved is not None and cut >= len(parts) - 1 and not f"{target}.".startswith(f"{moved}."):
            return ".".join([moved, *parts[cut:]])
    return target


def resolve(target: str, allowed: Sequence[str] = CONFIGURATION) -> Any:
    """The class or function at a dotted path. Imports nothing outside `allowed`, a list of beginnings of paths.

    Ours: a class, under the module that defines it, or one of `FUNCTIONS`. Of libraries: the classes of `FAMILIES` and
    `CLASSES`. Names that a module only imported are not allowed.
    Raises UserError for a path that is not allowed or does not exist, with the nearest name.
    """
    if not isinstance(target, str) or not target:
        raise UserError(f"_target_ must be the dotted path of a class or function, got {target!r}.")
    path = current(target)
    if not path.startswith(tuple(allowed)):
        raise UserError(
            f"_target_ {target} is not allowed: only targets below {_listed(allowed)} are. "
            f"{nearest(path.split('.')[0], _roots(allowed))}".rstrip()
        )
    if any(part.startswith("_") or not part.isidentifier() for part in path.split(".")):
        raise UserError(f"_target_ {target} is not allowed: no part of a target may be a private name.")
    if path.startswith(OURS):
        if path.startswith(CLOSED) and path not in OPENED:
            raise UserError(f"_target_ {target} is not allowed: a configuration builds nothing from that package.")
        return _of_ours(target, path)
    return _of_library(target, path)


def _of_ours(target: str, path: str) -> Any:
    parts = path.split(".")
    found, depth = _import(target, parts)
    home = ".".join(parts[:depth])
    for index in range(depth, len(parts)):
        found = _member(target, found, parts, index)
        if not callable(found) or getattr(found, "__module__", None) != home:
            raise UserError(f"_target_ {target} is not a class or function of {home}: {_kind(found)}.")
    if inspect.ismodule(found):
        raise UserError(f"_target_ {target} is a module, not a class or function.")
    if not inspect.isclass(found) and path not in FUNCTIONS:
        raise UserError(
            f"_target_ {target} is a function: of functions only {', '.join(FUNCTIONS)} are allowed. Give a class."
        )
    return found


def _of_library(target: str, path: str) -> type:
    package, _, name = path.rpartition(".")
    packages = (*FAMILIES, *CLASSES)
    if package not in packages:
        raise UserError(
            f"_target_ {target} is not allowed: of libraries only classes directly in {', '.join(packages)} are. "
            f"{nearest(package, packages)}".rstrip()
        )
    parts = path.split(".")
    module, _ = _import(target, parts[:-1])
    if package in CLASSES:
        if name not in CLASSES[package]:
            raise UserError(
                f"_target_ {target} is not allowed. {nearest(name, CLASSES[package])}"
                f"Allowed of {package}: {', '.join(CLASSES[package])}."
            )
        return _member(target, module, parts, len(parts) - 1)
    found = _member(target, module, parts, len(parts) - 1)
    base_module, _, base = FAMILIES[package].rpartition(".")
    wanted = getattr(importlib.import_module(base_module), base)
    home = f"{getattr(found, '__module__', None) or ''}."
    if not inspect.isclass(found) or not issubclass(found, wanted) or not home.startswith(f"{parts[0]}."):
        raise UserError(
            f"_target_ {target} is not allowed: of {package} only classes derived from {FAMILIES[package]} are, and "
            f"{_kind(found)}."
        )
    return found


def _member(target: str, found: Any, parts: list[str], index: int) -> Any:
    if not hasattr(found, parts[index]):
        where = ".".join(parts[:index])
        raise UserError(
            f"_target_ {target} does not exist: {where} has no {parts[index]}. "
            f"{nearest(parts[index], _public(found))}".rstrip()
        )
    return getattr(found, parts[index])


def _import(target: str, parts: list[str]) -> tuple[Any, int]:
    """(the longest prefix of the path that is a module, number of its parts)."""
    found, depth = None, 0
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise UserError(f"_target_ {target}: importing {name} failed: {error}.") from error
            return found, depth - 1
        except Exception as error:
            raise UserError(f"_target_ {target}: importing {name} failed: {type(error).__name__}: {error}.") from error
    return found, depth


def _public(found: Any) -> list[str]:
    names = [name for name in dir(found) if not name.startswith("_")]
    if inspect.ismodule(found) and getattr(found, "__path__", None):
        import pkgutil

        names += [module.name for module in pkgutil.iter_modules(found.__path__)]
    return names


def _roots(allowed: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(entry.split(".")[0] for entry in allowed))


def _listed(allowed: Sequence[str]) -> str:
    if allowed == CONFIGURATION:
        return f"{' and '.join(OURS)}, and some classes of {', '.join(_roots(allowed)[2:])},"
    return ", ".join(allowed)


def _kind(found: Any) -> str:
    if inspect.ismodule(found):
        return f"it is the module {found.__name__}"
    home = getattr(found, "__module__", None)
    what = "class" if inspect.isclass(found) else "function"
    return f"it is a {what} of {home}" if callable(found) and home else f"it is a {type(found).__name__}"
