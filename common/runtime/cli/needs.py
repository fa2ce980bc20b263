"""Runs that other runs build on: a teacher, a baseline. They are trained first when they are missing."""

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from common.errors import UserError
from common.files import read_json, verify_checksum

REPO = Path(__file__).resolve().parents[3]


def override(key: str, value) -> str:
    """`key='value'` in Hydra's override grammar, for paths with any characters.

    There a backslash is literal unless a quote follows it.
    """
    text = re.sub(r"(\\*)'", r"\1\1\\'", str(value))
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"{key}='{text}'"


def is_usable(folder: Path, steps: int | None = None) -> bool:
    """True when the run in `folder` finished and its exported weights are intact.

    steps  optimiser steps it must have trained, None for any number; a shorter run does not count
    """
    result = folder / "result.json"
    if not result.is_file() or verify_checksum(folder / "export" / "model.safetensors") is not True:
        return False
    return steps is None or (read_json(result).get("step") or 0) >= steps


def wanted_steps(need: dict) -> int | None:
    """Steps of the needed run: of its overrides, else of its experiment's file; None where that names no number."""
    for text in need.get("overrides") or []:
        key, _, value = str(text).partition("=")
        if key == "trainer.max_steps" and value.isdigit():
            return int(value)
    path = REPO / "conf" / "experiment" / f"{need['experiment']}.yaml"
    steps = OmegaConf.select(OmegaConf.load(path), "trainer.max_steps") if path.is_file() else None
    return steps if isinstance(steps, int) else None


def ensure(name: str, need: dict, *, seed: int, paths: dict, say=print) -> dict:
    """The result record of the needed run, training it in a process of its own first when there is none.

    need   {experiment: slug, dir: run folder, overrides: [key=value, ...]}
    Two runs that need the same one wait for each other (a lock file in the folder). A run that finished with fewer
    steps than wanted continues up to them.
    Raises UserError when the needed run fails; its output is printed above.
    """
    unknown = set(need) - {"experiment", "dir", "overrides"}
    if unknown or "experiment" not in need or "dir" not in need:
        raise UserError(f"needs.{name} must hold experiment and dir (and may hold overrides), got {sorted(need)}.")
    folder, steps = Path(need["dir"]), wanted_steps(need)
    if is_usable(folder, steps):
        say(f"[{name}] using the finished {need['experiment']} run in {folder}")
        return read_json(folder / "result.json")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_usable(folder, steps):
            length = f" for {steps:,} steps" if steps else ""
            say(
                f"[{name}] no finished {need['experiment']} run in {folder}: training it first{length}. "
                f"For a quick try of this experiment: needs.{name}.dir=<another folder> "
                f"\"++needs.{name}.overrides=['trainer.max_steps=20']\"",
                flush=True,
            )
            command = [
                sys.executable,
                "-m",
                "projects.run",
                f"+experiment={need['experiment']}",
                f"seed={seed}",
                override("run.dir", folder.resolve()),
                *(override(f"paths.{key}", Path(value).resolve()) for key, value in paths.items()),
                *need.get("overrides", []),
            ]
            code = _run(command)
            if code or not is_usable(folder, steps):
                error = UserError(f"The run needed first ({name}: {need['experiment']}) did not finish; see above.")
                error.exit_code = code or 1
                raise error
    return read_json(folder / "result.json")


def _run(command: list[str]) -> int:
    """Run to the end, passing SIGTERM on, and return the exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK"):
        environment.pop(variable, None)
    child = subprocess.Popen(command, env=environment)
    try:
        before = signal.signal(signal.SIGTERM, lambda signum, frame: child.send_signal(signum))
    except ValueError:  # not in the main thread
        return child.wait()
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
