"""Curves of a run as pictures. No torch and no pyplot at import."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import atomic

LEGEND_WIDTH, LEGEND_MARK = 84, 8  # letters beside each other below a figure; those a marker and its gaps take up
LOG_SPAN = 1.5  # decades; wider ranges get a logarithmic axis
COLOURS = ("#2b5c8a", "#c2571a", "#3c7d4f", "#8a3c6b", "#6b6b6b", "#b08c1e")


def read_curves(metrics_csv) -> dict[str, tuple[list[int], list[float]]]:
    """metric -> (steps, values) from a metrics.csv with a `step` column, sparse rows and repeated steps allowed.

    A step that occurs twice (a resumed run) counts once, with its last value; cells that are no finite number
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
    return {key: (sorted(points), [points[step] for step in sorted(points)]) for key, points in curves.items()}


def _parse(text) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def plot_curves(metrics_csv, folder) -> list[Path]:
    """Draws `<folder>/loss.png` (every metric with "loss" in its last part) and `<folder>/fd.png` (those whose last
    part starts with fd or fid, an axis per kind of features) from a metrics.csv.

    Returns the files written, none for a run that logged neither.
    """
    folder = Path(folder)
    if not Path(metrics_csv).is_file():
        return []
    curves = read_curves(metrics_csv)
    chosen = {
        "loss": {key: curve for key, curve in curves.items() if "loss" in key.rpartition("/")[2].lower()},
        "fd": {key: curve for key, curve in curves.items() if key.rpartition("/")[2].lower().startswith(("fd", "fid"))},
    }
    # Lightning logs one value as x, x_step and x_epoch; the plain or per-step one is enough
    loss = chosen["loss"]
    chosen["loss"] = {
        k: c for k, c in loss.items() if not (k.endswith("_epoch") and (k[:-6] in loss or f"{k[:-6]}_step" in loss))
    }
    written = []
    if chosen["loss"]:
        plot_lines(chosen["loss"], folder / "loss.png", xlabel="step", ylabel="training loss")
        written.append(folder / "loss.png")
    if chosen["fd"]:
        panels: dict[str, dict] = {}
        for name, curve in chosen["fd"].items():
            kind, _, features = _kind_of_distance(name)
            label = f"{'FID' if kind == 'fid' else 'Fréchet distance'}, {features} (lower is better)"
            panels.setdefault(label if features else "Fréchet distance (lower is better)", {})[name] = curve
        plot_panels(panels, folder / "fd.png", xlabel="step")
        written.append(folder / "fd.png")
    return written


def _kind_of_distance(name: str) -> tuple[str, str, str]:
    """`val/fd_digits_one_step` -> ("fd", "_", "digits"): distances of different features share no scale."""
    kind, sep, rest = name.rpartition("/")[2].partition("_")
    return kind.lower(), sep, rest.partition("_")[0]


Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def plot_lines(lines: Lines, path, *, xlabel: str, ylabel: str) -> None:
    """`plot_panels` with one axis."""
    plot_panels({ylabel: lines}, path, xlabel=xlabel)


def plot_panels(panels: Mapping[str, Lines], path, *, xlabel: str) -> None:
    """One PNG with an axis per entry, labelled by its key, above each other; a line per entry of an axis.

    An axis is logarithmic when its values are positive and span more than `LOG_SPAN` decades. `val/x` and `test/x`
    share a colour: the curve while training, and a diamond for the number at the end. `.../x_floor` is a dashed level,
    and a line of many points is drawn faint under its running mean; the legend describes them.
    """
    figure, axes = new_figure(rows=len(panels))
    names = list(dict.fromkeys(name.rpartition("/")[2] for lines in panels.values() for name in lines))
    for axis, (ylabel, lines) in zip(axes if len(panels) > 1 else [axes], panels.items()):
        for name, (x, y) in lines.items():
            _draw(axis, name, x, y, COLOURS[names.index(name.rpartition("/")[2]) % len(COLOURS)])
        if wide(value for _, y in lines.values() for value in y):
            axis.set_yscale("log")
        axis.set_ylabel(ylabel, fontsize="medium" if len(panels) == 1 else "small")
        if len(panels) > 1:
            axis.legend(frameon=False, fontsize="small")
        else:
            longest = max((len(str(line.get_label())) for line in axis.lines), default=1)
            columns = min(3, len(axis.lines), max(1, LEGEND_WIDTH // (longest + LEGEND_MARK)))
            figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        axis.set_xlabel(xlabel)
    save_figure(figure, path)


def _draw(axis, name: str, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    split, _, metric = name.rpartition("/")
    if metric.endswith("_floor"):
        axis.axhline(y[-1], color=colour, linewidth=1.2, linestyle="--", label=f"{metric.removesuffix('_floor')}, "
                     "real images against real images")  # fmt: skip
    elif split == "test":
        axis.plot(x, y, "D", color=colour, markersize=6, label=f"{metric}, at the end, all samples")
    elif len(x) > 60:
        axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axis.plot(x, running_mean(y, len(y) // 25), color=colour, linewidth=1.6, label=metric)
    else:
        axis.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=4, label=metric)


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


def new_figure(rows: int = 1):
    """(figure, axes) of a size that reads well in a README, without touching pyplot's global state.

    rows   axes above each other that share x; axes is a list of them from 2 on
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2 if rows == 1 else 2.8 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.sharex(axes[0])
    return figure, axes[0] if rows == 1 else axes


def save_figure(figure, path) -> None:
    """Writes the PNG atomically, without a creation date, so that equal plots are equal files."""
    with atomic(path) as tmp:
        figure.savefig(tmp, format="png", metadata={"Software": None})
