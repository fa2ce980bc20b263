"""The folders of runs and sweeps. Checked while the configuration is composed: Hydra makes the folder right after."""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from common.errors import UserError
from common.runtime.cli.identity import identifies, override_key

# Overrides that do not make another sweep: the same command with one of them continues in the same folder.
SAME_SWEEP = ("task", "resume", "run", "paths", "hydra", "logger", "callbacks", "speed.threads", "data.num_workers")


def expanded(folder: str | None, key: str) -> str:
    """The folder with `~` resolved. Raises UserError when it is empty: a path below it would begin at the root."""
    if folder is None or not str(folder).strip():
        raise UserError(f"{key} is empty. Was it set from an unset variable? Set {key}=<folder>.")
    return str(Path(str(folder)).expanduser())


def run_dir(outputs: str, experiment: str, name: str) -> str:
    """`<outputs>/<experiment>/<name>`. Raises UserError for a name that leads out of `outputs`."""
    for key, value in (("run.experiment", experiment), ("run.name", name)):
        path = PurePosixPath(str(value))
        if not path.parts or path.is_absolute() or {"..", "~"} & set(path.parts):
            raise UserError(
                f"{key}={value} leads out of paths.outputs. Use a plain name, or set the whole folder with run.dir=."
            )
    return f"{expanded(outputs, 'paths.outputs')}/{experiment}/{name}"


def sweep_dir(outputs: str, overrides: Iterable[str]) -> str:
    """`<outputs>/multirun/<experiment>/sweep-<hash>`: the same command finds its folder again, and continues in it."""
    overrides = list(overrides)
    named = [text.partition("=")[2] for text in overrides if override_key(text) == "experiment"]
    experiment = named[-1] if named and named[-1].replace("_", "").isalnum() else "experiments"
    deciding = sorted(text for text in overrides if _makes_another_sweep(text))
    digest = hashlib.sha256("\n".join(deciding).encode()).hexdigest()[:8]
    return f"{expanded(outputs, 'paths.outputs')}/multirun/{experiment}/sweep-{digest}"


def _makes_another_sweep(text: str) -> bool:
    key, value = override_key(text), text.partition("=")[2]
    swept = any(mark in value for mark in ",(")
    same = any(key == name or key.startswith(f"{name}.") for name in SAME_SWEEP)
    return swept or identifies(key) or not same


def remove_empty(folder: Path, outputs: Path) -> None:
    """Remove `folder` if it is empty, and then the empty folders above it up to `outputs`."""
    folder, outputs = folder.absolute(), outputs.absolute()
    for place in (folder, *folder.parents):
        if place != folder and not place.is_relative_to(outputs):
            return
        try:
            place.rmdir()
        except OSError:  # not empty, or not there
            return
