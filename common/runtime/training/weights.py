"""Where a run's weights come from: a released or exported file, or a checkpoint of this repository."""

from pathlib import Path

from torch import Tensor, nn

from common.errors import UserError
from common.runtime.training.checkpoint import latest_complete, list_checkpoints, read_checkpoint, step_of
from common.runtime.training.ema import choose_average
from common.runtime.training.module import ResearchModule
from common.weights.load import LoadReport, load_into, load_tensors, stored_step

NETWORK = "net."  # a ResearchModule keeps its network under this name


def find_init(file: str | None, hint: str | None) -> Path | None:
    """The initial-weights file of a configuration, or None when training starts from random weights.

    Raises UserError naming the file and the fix when it is missing.
    """
    if not file:
        return None
    path = Path(file)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        fix = hint or "Set init.file=<model.safetensors | export folder | step-*.ckpt>, or null for random weights."
        raise UserError(f"Initial weights {path} do not exist (init.file). {fix}")
    return path


def network_tensors(path: Path, average: str | None = None) -> dict[str, Tensor]:
    """Tensors of the network in `path`, keys as in the network's state dict (without `net.`).

    average  for a step-*.ckpt: name of a stored average, or `raw`; None takes `ema` when there is one, else `raw`
    """
    path = Path(path)
    if path.suffix != ".ckpt":
        return load_tensors(path)
    checkpoint = read_checkpoint(path)
    stored = checkpoint.get("averages", {})
    name = average or ("ema" if "ema" in stored else "raw")
    tensors = dict(checkpoint["state_dict"])
    tensors.update(choose_average(stored, name) or {})
    return {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}


def initialise(net: nn.Module, path: Path, average: str | None = None) -> LoadReport:
    """Copy the weights in `path` into `net`. Raises UserError when the file is of another architecture.

    A network may complete or rename the tensors first, by its `prepare_weights(tensors)`: a file may hold the backbone
    alone. `model.map_augment.weight` may be in the file and not in the network: tuning without augmentation drops that
    input (ECT from EDM, arXiv 2406.14548).
    """
    tensors = network_tensors(path, average)
    if any(k.startswith("unet.") for k in tensors) and not hasattr(net, "unet"):
        # an EDM2 teacher: its network under our name, its uncertainty head dropped
        tensors = {k.replace("unet.", "model.", 1): v for k, v in tensors.items() if not k.startswith("logvar_")}
    if hasattr(net, "prepare_weights"):
        tensors = net.prepare_weights(tensors)  # type: ignore[operator]
    return load_into(net, tensors, name=str(path))


def trained_runs(run_dir: Path, most: int = 4) -> str:
    """A sentence that names the trained runs beside `run_dir`, the newest first; empty without any."""
    files = [list_checkpoints(folder) for folder in run_dir.parent.glob("*/checkpoints")]
    newest = sorted((found[0] for found in files if found), key=lambda path: path.stat().st_mtime, reverse=True)
    names = [f"run.dir={path.parent.parent} (step {step_of(path)})" for path in newest[:most]]
    more = f" and {len(newest) - most} more" if len(newest) > most else ""
    return f"Trained runs of this experiment: {', '.join(names)}{more}. " if names else ""


def trained_weights(module: ResearchModule, run_dir: Path, *, resume: str, init_file: str | None, average: str) -> dict:
    """Put the weights to be tested, sampled or exported into `module`: returns {file, step, average}.

    The newest complete checkpoint of the run counts; without one, `init.file`. `average` names an entry of the
    checkpoint's averages, or `raw`.
    """
    explicit = Path(resume) if resume not in ("auto", "never") else None
    path = explicit or latest_complete(run_dir / "checkpoints")
    if path is None:
        init = find_init(init_file, None)
        if init is None:
            raise UserError(
                f"No trained weights in {run_dir / 'checkpoints'}. {trained_runs(run_dir)}Train first (the same "
                f"command with task=fit), or give init.file=<model.safetensors | export folder | step-*.ckpt>."
            )
        initialise(module.net, init, None if init.suffix != ".ckpt" else average)
        return {"file": str(init), "step": 0, "average": "file"}
    initialise(module.net, path, average)
    return {"file": str(path), "step": stored_step(path), "average": average}
