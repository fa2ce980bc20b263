"""What a run leaves behind for readers: result.json, tables, and the environment they came from.

Imports no torch, so that sweeps and tools load it quickly.
"""

import csv
import dataclasses
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic, read_json, write_json, write_text

ROOT = Path(__file__).resolve().parents[3]
CODE = ("common", "projects", "conf", "tools", "pyproject.toml")  # what decides the result of a run
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "timm", "torchmetrics", "torch-fidelity")


# ---------------------------------------------------------------------------------------------------------------------
# Environment


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """stdout of a git command in the repository, or None outside one."""
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.rstrip("\n") if run.returncode == 0 else None


def source_state(root: Path = ROOT) -> tuple[str, bool]:
    """(commit, dirty): 40 hex digits or "unknown"; dirty when code or configuration differ from that commit.

    Recorded results are outputs, not sources, and do not count.
    """
    commit = git("rev-parse", "HEAD", root=root)
    present = [name for name in CODE if (root / name).exists()]
    status = git("status", "--porcelain", "--", *present, root=root) if present else ""
    changed = [line for line in (status or "").splitlines() if not line.endswith("results.json")]
    return commit or "unknown", bool(changed)


def environment() -> dict:
    """`commit`, `dirty`, `versions` (python and the packages that decide a result) and `hardware`, one line such as
    "AMD EPYC 9474F, 2 cores" or "..., NVIDIA H200"."""
    commit, dirty = source_state()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"commit": commit, "dirty": dirty, "hardware": hardware(), "versions": versions}


def hardware() -> str:
    """CPU model, cores this process may use, and the CUDA devices torch sees (when torch is loaded)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_cpu_model(), f"{cores} core{'s' if cores != 1 else ''}"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    return ", ".join(parts)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# result.json

RESULT = "result.json"


def write_result(
    run_dir,
    *,
    experiment: str,
    task: str,
    overrides: Sequence[str],
    seed: int,
    step: int,
    wall_time_s: float,
    metrics: Mapping,
    objective: float | None = None,
) -> Path:
    """Writes `<run_dir>/result.json`, what sweeps, claims and tables read, and returns its path.

    metrics    name -> number, `Measurement`, or {"value": number, "record": dict | None}
    objective  the value a sweep minimises; None when the experiment names none
    The environment is added here. Numbers that are not finite are written as null.
    """
    run_dir = Path(run_dir)
    result = {
        "experiment": experiment,
        "task": task,
        "overrides": list(overrides),
        "seed": seed,
        "step": step,
        **environment(),
        "wall_time_s": round(float(wall_time_s), 3),
        "objective": _number(objective),
        "metrics": {name: _metric(value) for name, value in metrics.items()},
        "run_dir": os.path.relpath(run_dir, Path.cwd()),
    }
    write_json(run_dir / RESULT, result)
    return run_dir / RESULT


def read_result(run_dir) -> dict | None:
    """The result of a run folder, or None when the run has not finished (or its file is unreadable)."""
    try:
        result = read_json(Path(run_dir) / RESULT)
    except UserError:
        return None
    return result if isinstance(result, dict) and isinstance(result.get("metrics"), dict) else None


def _metric(value: Any) -> dict:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record = dataclasses.asdict(value)
        return {"value": _number(record["value"]), "record": record}
    if isinstance(value, Mapping):
        return {"value": _number(value["value"]), "record": value.get("record")}
    return {"value": _number(value), "record": None}


def _number(value) -> float | None:
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def show(value) -> str:
    """A cell: four significant digits, seconds and counts as they are, "-" for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 or not value.is_integer() else f"{value:.0f}"
    return str(value)


def columns_of(rows: Sequence[Mapping]) -> list[str]:
    """All keys of the rows, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def print_table(title: str, rows: Sequence[Mapping], *, console=None) -> None:
    """Prints dict rows as one rich table; numbers are right-aligned."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns_of(rows):
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(show(row.get(column))) for column in columns_of(rows)))
    console = console or Console()
    if not console.is_terminal and console.width < 160:
        console = Console(file=console.file, width=160)  # logs have no width; do not fold their tables
    console.print(table)


def markdown_table(rows: Sequence[Mapping]) -> str:
    """GitHub table of dict rows, ending in a newline."""
    columns = columns_of(rows)
    if not columns:
        return "(nothing recorded)\n"
    lines = [columns, ["---"] * len(columns)]
    lines += [[" ".join(show(row.get(column)).replace("|", "\\|").splitlines()) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_table(folder, name: str, rows: Sequence[Mapping]) -> list[Path]:
    """Writes `<folder>/<name>.csv` (full precision) and `<name>.md`; returns both paths."""
    folder = Path(folder)
    with atomic(folder / f"{name}.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns_of(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder / f"{name}.md", markdown_table(rows))
    return [folder / f"{name}.csv", folder / f"{name}.md"]


def comparison_table(
    rows: Sequence[Mapping], folder, *, title: str = "Comparison", name: str = "comparison", console=None
) -> list[Path]:
    """The closing table of an experiment: prints it, writes it as CSV and Markdown, returns the paths.

    rows  one dict per line: `label`, then any values, `steps`, `wall_time_s` (seconds); missing cells print as "-"
    """
    rows = [{str(key): value for key, value in row.items()} for row in rows]
    print_table(title, rows, console=console)
    return write_table(folder, name, rows)
