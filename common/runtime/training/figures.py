"""Curves of a run as pictures. No torch and no pyplot at import."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import atomic

LOG_SPAN = 1.5  # decades; wider ranges get a logarithmic axis
COLOURS = ("#2b5c8a", "#c2571a", "#3c7d4f", "#8a3c6b", "#6b6b6b", "#b08c1e")


def read_curves(metrics_csv) -> dict[str, tuple[list[int], list[float]]]:
    """metric -> (steps, values) from a metrics.csv with a `step` column, sparse rows and repeated steps allowed.

    A step that stands there twice (a resumed run) counts once, with its last value; cells that are no finite number
    are left out.
    """
    curves: dict[str, dict[int, float]] = {}
    with open(metrics_csv, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _parse(row.get("step"))
            if step is None:
                continue
            for key, text in row.items():
                value = _parse(text) if isinstance(text, str) and key not in ("step", "epoch", None) else None
                if value is not None:
                    curves.setdefault(key, {})[int(step)] = value
    return {key: tuple(map(list, zip(*sorted(points.items())))) for key, points in curves.items()}


def _parse(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def plot_curves(metrics_csv, folder) -> list[Path]:
    """Draws `<folder>/loss.png` (every metric with "loss" in its last part) and `<folder>/fd.png` (those whose last
    part starts with fd or fid) from a metrics.csv; returns the files written, none for a run that logged neither."""
    folder = Path(folder)
    if not Path(metrics_csv).is_file():
        return []
    curves = read_curves(metrics_csv)
    chosen = {
        "loss": {key: curve for key, curve in curves.items() if "loss" in key.rpartition("/")[2].lower()},
        "fd": {key: curve for key, curve in curves.items() if key.rpartition("/")[2].lower().startswith(("fd", "fid"))},
    }
    # Lightning logs one value as x, x_step and x_epoch; the plain or per-step one says it all
    loss = chosen["loss"]
    chosen["loss"] = {
        k: c for k, c in loss.items() if not (k.endswith("_epoch") and (k[:-6] in loss or f"{k[:-6]}_step" in loss))
    }
    written = []
    for name, lines in chosen.items():
        if lines:
            label = "training loss" if name == "loss" else "Fréchet distance (lower is better)"
            plot_lines(lines, folder / f"{name}.png", xlabel="step", ylabel=label)
            written.append(folder / f"{name}.png")
    return written


def plot_lines(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path, *, xlabel: str, ylabel: str) -> None:
    """One PNG with a line per entry; the y axis is logarithmic when the values are positive and span a lot.

    `val/x` and `test/x` share a colour (line, and diamond for the final number), `.../x_floor` is a dashed level, and
    a line of many points is drawn faint under its running mean.
    """
    figure, axes = new_figure()
    names = list(dict.fromkeys(name.rpartition("/")[2] for name in lines))
    labelled = set()
    for name, (x, y) in lines.items():
        split, _, metric = name.rpartition("/")
        colour = COLOURS[names.index(metric) % len(COLOURS)]
        label = None if metric in labelled else metric
        labelled.add(metric)
        if metric.endswith("_floor"):
            axes.axhline(y[-1], color=colour, linewidth=1.2, linestyle="--", label=label)
        elif split == "test":
            axes.plot(x, y, "D", color=colour, markersize=6, label=label)
        elif len(x) > 60:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(x, running_mean(y, len(y) // 25), color=colour, linewidth=1.6, label=label)
        else:
            axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=4, label=label)
    if wide(value for _, y in lines.values() for value in y):
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside lower center", ncols=min(3, len(labelled)), frameon=False)
    save_figure(figure, path)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the ones before it, at most `window` of them."""
    means = []
    for index in range(len(values)):
        part = values[max(0, index + 1 - window) : index + 1]
        means.append(sum(part) / len(part))
    return means


def wide(values) -> bool:
    """Whether positive values span more than `LOG_SPAN` decades."""
    values = list(values)
    return bool(values) and min(values) > 0 and math.log10(max(values) / min(values)) > LOG_SPAN


def new_figure():
    """(figure, axes) of a size that reads well in a README, without touching pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path) -> None:
    """Writes the PNG atomically, without a creation date, so that equal plots are equal files."""
    with atomic(path) as tmp:
        figure.savefig(tmp, format="png", metadata={"Software": None})
