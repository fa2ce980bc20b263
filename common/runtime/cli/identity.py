"""Which settings identify a run. The run's name and the check before a run is continued both use `identifies`.

No torch import: the name is needed before anything else.
"""

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from common.errors import UserError
from common.targets import current, resolve

# Settings that cannot change a trained weight, each with everything below it. All others identify a run.
IRRELEVANT = (
    # what is done with a run, and where
    "task", "resume", "run", "paths", "hydra", "experiment", "debug", "needs", "init.hint",
    # what is measured, drawn and shown
    "sample", "evaluate", "guidance", "decoder", "logger", "table", "callbacks", "published", "plan",
    # how long, on what
    "speed.threads", "trainer.max_steps", "trainer.devices", "trainer.num_nodes", "trainer.accelerator",
    "trainer.strategy", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps",
    "trainer.detect_anomaly", "trainer.profiler", "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    "trainer.check_val_every_n_epoch",
    # how data are read, and what is evaluated on
    "data.name", "data.root", "data.num_workers", "data.pin_memory", "data.keep", "data.checked_pairs",
    "data.source.verify", "data.source.cache_dir", "data.source.origin", "data.source.test_path",
    "data.eval_batch_size", "data.eval_fit", "data.eval_length", "data.evaluation", "data.val_split", "data.reference",
    "data.folders", "data.pans",
)  # fmt: skip
RELEVANT = ("callbacks.seeding", "callbacks.guard.replace")  # below one of the above, but they change weights
SECTIONS = ("trainer",)  # config groups whose choice changes irrelevant settings alone
# Values of absent settings whose class has no default: settings that were added later, or removed.
ABSENT_VALUES = {"project.loss_scaling": 1.0, "project.official_gradients": False, "project.odd_sizes": "pad"}
FOLDERS = ("root", "cache_dir")  # last keys of settings that only name where files are


def identifies(key: str) -> bool:
    """Whether the setting at the dotted path `key` can change the trained weights."""
    if _below(key, RELEVANT):
        return True
    return not _below(key, IRRELEVANT) and key.rpartition(".")[2] not in FOLDERS


def _below(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# The name


def run_name(seed: int, overrides: Iterable[str], tree: Mapping | None = None) -> str:
    """`seed0`, or `seed0-1a2b3c` when overrides change the result of the experiment.

    tree  the configuration with its interpolations unresolved: an override counts, too, when a setting that identifies
          the run is computed from it (a schedule that ends at `${trainer.max_steps}`)
    """
    sources = set(_sources(tree)) if tree is not None else set()
    changing = sorted(text for text in overrides if _changes(override_key(text), sources))
    digest = hashlib.sha256("\n".join(changing).encode()).hexdigest()[:6]
    return f"seed{seed}" + (f"-{digest}" if changing else "")


def override_key(text: str) -> str:
    """The dotted path an override changes: `+sampler@sample.sampler=heun` -> `sample.sampler`."""
    key = text.partition("=")[0].lstrip("+~")
    return key.rpartition("@")[2].rpartition(":")[2].replace("/", ".").lstrip(".")


def _changes(key: str, sources: set[str]) -> bool:
    if key == "seed" or key in SECTIONS:  # the seed is in the name already
        return False
    return identifies(key) or key in sources


def _sources(tree: Mapping) -> Iterator[str]:
    """Paths that a setting which identifies the run is computed from. `${x}/...` is a file below x, no such value."""
    for key, value in _leaves(tree):
        if isinstance(value, str) and identifies(key):
            yield from re.findall(r"\$\{([\w.]+)\}(?!/)", value)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def first_difference(before: Mapping, after: Mapping) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of a setting that makes `after` another run than `before`, None for the same run.

    A setting that one of them lacks has the default of its class there, so that a run of an older version continues
    when a class gained an option. Files are compared by name, and those of the data not at all: folders may move.
    """
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for key in sorted(old.keys() | new.keys()):
        if not identifies(key):
            continue
        values = [tree[key] if key in tree else _default(key, other, tree) for tree, other in ((old, new), (new, old))]
        if _comparable(key, values[0]) != _comparable(key, values[1]):
            return key, values[0], values[1]
    return None


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a tree that is no container, and of empty containers."""
    items: Iterable
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    else:
        items = ()
    if not items:
        yield path, node
    for key, child in items:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _default(key: str, other: Mapping, own: Mapping) -> Any:
    """The default of the option `key` that the tree `own` lacks, where both trees name the same class; else None."""
    if key in ABSENT_VALUES:
        return ABSENT_VALUES[key]
    parent, _, option = key.rpartition(".")
    target = own.get(f"{parent}._target_")
    if not isinstance(target, str) or current(target) != current(str(other.get(f"{parent}._target_"))):
        return None
    with suppress(UserError, ValueError, TypeError):
        parameter = inspect.signature(resolve(target)).parameters.get(option)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    return None


def _comparable(key: str, value: Any) -> Any:
    if isinstance(value, str) and key.rpartition(".")[2] == "_target_":
        return current(value)
    if isinstance(value, str) and "/" in value:  # data are compared by their fingerprint
        return "a file or folder" if key.startswith("data.") else PurePath(value).name
    return None if value in ({}, []) else value
