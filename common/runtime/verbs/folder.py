"""The folder of a run: which run it holds, where training continues, what is moved aside."""

import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from common.errors import UserError
from common.files import checksum_path, read_json, verify_checksum, write_json, write_text
from common.runtime.cli.identity import first_difference
from common.runtime.training.checkpoint import latest_complete, list_checkpoints, step_of, unusable
from common.runtime.verbs.assemble import Assembled
from common.runtime.verbs.report import environment, read_result
from common.weights.load import stored_step

# What a run writes into its folder. `resume=never` puts these aside and touches nothing else there.
OUTPUTS = (
    "checkpoints", "config.yaml", "overrides.yaml", "environment.json", "run.json", "seconds.json", "metrics.csv",
    "result.json", "error.json", "run.log", "export", "pictures", "samples", "test", "tensorboard", "wandb",
    "comparison.csv", "comparison.md",
)  # fmt: skip
OTHER_FOLDER = "Choose another folder with run.dir=<folder>, or start over with resume=never."


def is_first_process() -> bool:
    """Whether this process writes the files of a run that may have several processes."""
    return not getattr(rank_zero_only, "rank", 0)


def starting_point(run: Assembled) -> Path | None:
    """The checkpoint to continue from, None for a run that starts at step 0. Writes and moves nothing.

    Raises UserError when the folder holds a run with other settings or on other data, when it holds checkpoints of
    which none can be used, and for a `resume` that is no file.
    """
    checkpoints, resume = run.folder / "checkpoints", run.cfg.resume
    if resume == "never":
        return None
    if resume == "auto":
        start = latest_complete(checkpoints, say=print if is_first_process() else lambda text: None)
        if start is None and list_checkpoints(checkpoints):
            raise UserError(
                f"{checkpoints} holds checkpoints, but none that can be used (see above). Copy them again, or start "
                f"over with resume=never, which keeps them aside."
            )
    else:
        start = Path(resume)
        if not start.is_file():
            raise UserError(f"resume={resume} is no checkpoint file. Use resume=auto, resume=never or a step-*.ckpt.")
    if start is not None:
        _check_same_run(run)
    return start


def _check_same_run(run: Assembled) -> None:
    folder, stored = run.folder, run.folder / "config.yaml"
    if stored.is_file():
        found = first_difference(_plain(stored), run.plain)
        if found is not None:
            key, before, after = found
            raise UserError(f"{folder} holds a run with other settings: {key} was {before}, is {after}. {OTHER_FOLDER}")
    before, now = run_facts(folder).get("data"), data_fingerprint(run)
    if before and now and before != now:
        raise UserError(
            f"{folder} holds a run on other data: the files at data.root={run.plain['data'].get('root')} are not those "
            f"it was started with. {OTHER_FOLDER}"
        )


def _plain(path: Path) -> dict:
    tree = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no configuration. {OTHER_FOLDER}")
    return {str(key): value for key, value in tree.items()}


def run_facts(folder: Path) -> dict:
    """`run.json`: `id` (of the run at services such as W&B) and `data` (fingerprint); empty before the first start."""
    path = folder / "run.json"
    return read_json(path) if path.is_file() else {}


def data_fingerprint(run: Assembled) -> str | None:
    """Fingerprint of the split trained on; None for data that have none, such as mixtures of sets."""
    split = getattr(run.data, "train_split", "train")
    if split not in getattr(run.data, "splits", ()) or not hasattr(run.data, "fingerprint"):
        return None
    with suppress(UserError):  # of latents: the pictures they were made of may not be here
        return run.data.fingerprint(split)
    return None


def finished_result(run: Assembled) -> dict | None:
    """The result of the run in the folder when all steps asked for were trained, measured and exported, else None.

    Also None when the `evaluate` section has changed since: there is something to measure then.
    """
    start, stored, steps = run.start, run.folder / "config.yaml", run.cfg.trainer.max_steps
    if start is None or steps < 0 or not stored.is_file() or stored_step(start) < steps:
        return None
    result, weights = read_result(run.folder), run.folder / "export" / "model.safetensors"
    if result is None or result.get("step") != stored_step(start) or verify_checksum(weights) is not True:
        return None
    return result if _plain(stored).get("evaluate") == run.plain["evaluate"] else None


def prepare(run: Assembled, overrides: list[str]) -> None:
    """Prepare the folder for this run: files of other runs are moved aside, its settings and facts written.

    A run that starts over puts the whole earlier run aside. One that continues from an older checkpoint puts the
    checkpoints and pictures of later steps aside: the newest ones are then always those of the continued run.
    """
    if not is_first_process():
        return
    folder = run.folder
    if run.cfg.resume == "never":
        set_aside(folder, [folder / name for name in OUTPUTS], "Starting over: the earlier run is kept in")
    facts = run_facts(folder)
    if run.start is not None:
        set_aside(folder, unusable(folder / "checkpoints"), "Checkpoints that cannot be used are kept in")
        step = stored_step(run.start)
        later = [path for path in list_checkpoints(folder / "checkpoints") if step_of(path) > step]
        pictures = [path for path in (folder / "pictures").glob("step-*") if step_of(path) > step]
        if set_aside(folder, later, f"Continuing from step {step}: later checkpoints are kept in"):
            set_aside(folder, pictures, "Later pictures are kept in")
            facts.pop("id", None)  # services cannot delete steps: they record what follows as another run
    facts.setdefault("id", secrets.token_hex(6))
    facts["data"] = facts.get("data") or data_fingerprint(run)
    write_json(folder / "run.json", facts)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(run.plain)))
    write_text(folder / "overrides.yaml", OmegaConf.to_yaml(overrides))
    write_json(folder / "environment.json", environment())


def set_aside(folder: Path, paths: list[Path], note: str) -> Path | None:
    """Move what exists of `paths` (below `folder`) to `<folder>/earlier-<n>` and print where; None if nothing does.

    A checkpoint takes its checksum along.
    """
    found = [path for path in paths if path.exists()]
    found += [checksum_path(path) for path in found if checksum_path(path).is_file()]
    if not found:
        return None
    numbers = [int(name) for p in folder.glob("earlier-*") if (name := p.name.partition("-")[2]).isdigit()]
    aside = folder / f"earlier-{max(numbers, default=0) + 1}"
    for path in found:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    print(f"{note} {aside}", flush=True)
    return aside
