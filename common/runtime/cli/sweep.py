"""Every job's result of a sweep in one table and one plot, for any launcher and sweeper."""

import atexit
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from common.files import read_json, write_json
from common.runtime.training import figures
from common.runtime.verbs import report

ERROR = "error.json"
PLAN = "sweep.json"  # in the sweep folder: how many jobs, and what differs between them
_open_sweeps: set[str] = set()  # sweep folders of this process whose table has not been shown


class SweepTable(Callback):
    """Writes `table.csv`, `table.md` and `table.png` into the sweep folder and prints the table with its paths.

    Jobs are found on disk (`<sweep folder>/<job>/.hydra/overrides.yaml` and `result.json`), because their processes may
    be anywhere. Hydra ends a sweep with a failed job by an exception, without calling its callbacks; the table is then
    shown when the process exits, with the error in the failed job's row.

    published  the paper's numbers of an ablation, shown in a column "published": overrides of a job, as in
               "a.b=1, c=d" -> number. A job has the number whose overrides it has all
    """

    def __init__(self, published: Mapping[str, float] | None = None) -> None:
        self.published = {} if published is None else {str(key): float(published[key]) for key in published}
        self.started = 0.0  # seconds since the epoch; older jobs in the same folder are not of this sweep

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        self.started = time.time() - 1.0  # coarse file-system clocks
        folder = str(Path(config.hydra.sweep.dir).absolute())
        write_json(Path(folder) / PLAN, planned_jobs(config))
        print(f"sweep folder: {folder} (the same command continues there)", flush=True)
        _open_sweeps.add(folder)
        atexit.register(_finish, folder, self.started, self.published)

    def on_job_start(self, config: DictConfig, **kwargs) -> None:
        if config.hydra.mode.name == "MULTIRUN":
            print(job_heading(config), flush=True)

    def on_job_end(self, config: DictConfig, job_return, **kwargs) -> None:
        if config.hydra.mode.name != "MULTIRUN" or job_return.status is None or job_return.status.name != "FAILED":
            return
        error = job_return._return_value
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        write_json(Path(config.hydra.runtime.output_dir) / ERROR, {"type": type(error).__name__, "message": text})

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        _finish(str(Path(config.hydra.sweep.dir).absolute()), self.started, self.published)


def planned_jobs(config: DictConfig) -> dict:
    """{jobs: how many, or None where only the sweeper knows; swept: the keys that take several values}."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    given = [str(text) for text in config.hydra.overrides.task]
    given += [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    swept = [o for o in OverridesParser.create().parse_overrides(given) if o.is_sweep_override()]
    keys = [split_override(str(override.input_line))[0] for override in swept]
    if config.hydra.sweeper.get("n_trials"):
        return {"jobs": int(config.hydra.sweeper.n_trials), "swept": keys}
    if any(isinstance(override.value(), Glob) for override in swept):
        return {"jobs": None, "swept": keys}
    return {"jobs": math.prod(sum(1 for _ in override.sweep_iterator()) for override in swept), "swept": keys}


def job_heading(config: DictConfig) -> str:
    """`[3 of 8] lr=0.001, seed=0`, printed before a job of a sweep begins."""
    path = Path(config.hydra.sweep.dir) / PLAN
    plan = read_json(path) if path.is_file() else {"jobs": None, "swept": []}
    own = dict(split_override(str(text)) for text in config.hydra.overrides.task)
    values = ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in plan["swept"] if key in own)
    of = f" of {plan['jobs']}" if plan["jobs"] else ""
    return f"[{int(config.hydra.job.num) + 1}{of}] {values}".rstrip()


def _finish(folder: str, started: float, published: Mapping[str, float]) -> None:
    if folder in _open_sweeps:
        _open_sweeps.discard(folder)
        jobs = read_jobs(folder, since=started)
        if jobs:
            summarise(folder, jobs, published)


def read_jobs(folder, since: float = 0.0) -> list[dict]:
    """The jobs of a sweep folder, by job number: dicts with `job`, `overrides` {key: text}, `result` (dict or None)
    and `error` (text or None). Job folders whose overrides are older than `since` (epoch seconds) are left out."""
    jobs = []
    for path in Path(folder).rglob(".hydra/overrides.yaml"):
        run = path.parent.parent
        if path.stat().st_mtime < since:
            continue
        overrides = dict(split_override(str(text)) for text in OmegaConf.load(path))
        result, error = report.read_result(run), None
        if (run / ERROR).is_file() and (run / ERROR).stat().st_mtime >= since:
            failure = read_json(run / ERROR)
            result, error = None, f"{failure['type']}: {failure['message']}"
        elif result is None:
            error = "no result.json: the job was stopped before it finished"
        jobs.append(
            {"job": run.relative_to(folder).as_posix(), "overrides": overrides, "result": result, "error": error}
        )
    return sorted(jobs, key=lambda job: (len(job["job"]), job["job"]))


def split_override(text: str) -> tuple[str, str]:
    """`+a.b=c` -> ("a.b", "c")."""
    key, _, value = text.partition("=")
    return key.lstrip("+~"), value


def swept_keys(jobs: Sequence[Mapping]) -> list[str]:
    """The overrides that are not the same in all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job["overrides"])
    return [key for key in keys if len({job["overrides"].get(key) for job in jobs}) > 1]


def published_number(overrides: Mapping[str, str], published: Mapping[str, float]) -> float | None:
    """The number of the first entry whose overrides are all among those of the job, None without one."""
    for words, number in published.items():
        wanted = dict(split_override(word.strip()) for word in _words(words))
        if all(_plain(overrides.get(key)) == _plain(value) for key, value in wanted.items()):
            return number
    return None


def _plain(text: str | None):
    """Numbers as numbers; text in lower case: Hydra writes true as True."""
    return _value(text.lower()) if isinstance(text, str) else text


def _words(text: str) -> list[str]:
    """ "a=[1,2], b=3" -> ["a=[1,2]", "b=3"]: cut at the commas outside brackets."""
    return re.split(r",\s*(?![^\[]*\])", text)


def table_rows(jobs: Sequence[Mapping], published: Mapping[str, float] | None = None) -> list[dict]:
    """One row per job: job, swept values, objective, metrics, published number (only if there are such), step, wall
    time, error (only if there is one)."""
    keys = swept_keys(jobs)
    results = [job["result"] or {} for job in jobs]
    metrics = list(dict.fromkeys(name for result in results for name in result.get("metrics", {})))
    rows = []
    for job, result in zip(jobs, results):
        row = {"job": job["job"], **{key: _value(job["overrides"].get(key)) for key in keys}}
        if any(r.get("objective") is not None for r in results):
            row["objective"] = result.get("objective")
        row |= {name: result.get("metrics", {}).get(name, {}).get("value") for name in metrics}
        if published:
            row["published"] = published_number(job["overrides"], published)
        row |= {"step": result.get("step"), "wall_time_s": result.get("wall_time_s")}
        if any(other["error"] for other in jobs):
            row["error"] = job["error"]
        rows.append(row)
    return rows


def summarise(folder, jobs: Sequence[Mapping], published: Mapping[str, float] | None = None) -> list[Path]:
    """Writes and prints the table of a sweep; returns the paths. No plot when no job has a number."""
    rows = table_rows(jobs, published)
    written = report.write_table(folder, "table", rows)
    if plot(rows, swept_keys(jobs), Path(folder) / "table.png"):
        written.append(Path(folder) / "table.png")
    failed = sum(job["error"] is not None for job in jobs)
    note = f", {failed} failed" if failed else ""
    report.print_table(f"Sweep of {len(jobs)} jobs{note}", _shown(rows))
    for job in jobs:
        if job["error"]:
            print(f"job {job['job']} failed: {job['error']}")
    for path in written:
        print(path)
    return written


def _shown(rows: Sequence[Mapping]) -> list[dict]:
    """The rows as a terminal can hold them: no error texts, no second copy of the objective, four metrics at most, and
    of a swept key its last word where that is enough. The smallest objective of several is marked as the best."""
    same = _metric_name(rows)
    metrics = [name for name in report.columns_of(rows) if "/" in name]
    hidden = {"error", *([] if same in (None, "objective") else ["objective"]), *metrics[4:]} - {same}
    columns = report.columns_of(rows)
    short = {key: key.partition("@")[0] if "@" in key else key.rpartition(".")[2] for key in columns if "/" not in key}
    used = list(short.values())
    names = {key: short[key] if key in short and used.count(short[key]) == 1 else key for key in columns}
    shown = [{names[key]: value for key, value in row.items() if key not in hidden} for row in rows]
    objectives = [row["objective"] for row in rows if row.get("objective") is not None]
    if len(objectives) > 1:
        shown = [
            {**line, "best": "*" if row.get("objective") == min(objectives) else ""} for row, line in zip(rows, shown)
        ]
    return shown


def plot(rows: Sequence[Mapping], keys: Sequence[str], path) -> bool:
    """The metric of `_metric_name` against the swept value: a line for numbers, bars for words.

    With several swept keys the one with the most values (numbers first, a seed last) is the axis, the others are the
    legend; repeats of a point (seeds) are drawn and joined by their mean. Returns whether there was anything to draw.
    """
    metric = _metric_name(rows)
    good = [row for row in rows if metric and row.get(metric) is not None]
    if not good:
        return False
    axis = _axis(good, keys)
    groups: dict[str, list[tuple]] = {}
    for row in good:
        rest = [f"{key.rpartition('.')[2]}={row[key]}" for key in keys if key not in (axis, "seed")]
        groups.setdefault(", ".join(rest), []).append((row[axis] if axis else row["job"], row[metric]))
    points = [x for group in groups.values() for x, _ in group]
    figure, axes = figures.new_figure()
    if axis and all(isinstance(x, int | float) for x in points):
        _draw_lines(axes, groups, log_x=figures.wide(points))
    else:
        _draw_bars(axes, groups)
    if figures.wide(row[metric] for row in good):
        axes.set_yscale("log")
    axes.set_xlabel(axis or "job")
    axes.set_ylabel(metric)
    if len(groups) > 1:
        axes.legend(frameon=False)
    figures.save_figure(figure, path)
    return True


def _metric_name(rows: Sequence[Mapping]) -> str | None:
    """The metric equal to the objective, else `objective`; without an objective the first metric."""
    skip = {"job", "step", "wall_time_s", "error", "published"}
    names = [name for name in report.columns_of(rows) if name not in skip]
    metrics = [name for name in names if "/" in name and any(isinstance(row.get(name), float) for row in rows)]
    if "objective" in names:
        same = [name for name in metrics if all(row.get(name) == row.get("objective") for row in rows)]
        return same[0] if same else "objective"
    return metrics[0] if metrics else None


def _axis(rows: Sequence[Mapping], keys: Sequence[str]) -> str | None:
    def rank(key: str):
        values = [row.get(key) for row in rows]
        return (key != "seed", all(isinstance(v, int | float) for v in values), len(set(values)))

    return max(keys, key=rank) if keys else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw_lines(axes, groups: Mapping[str, list[tuple]], log_x: bool) -> None:
    for index, (label, points) in enumerate(groups.items()):
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        xs = sorted({x for x, _ in points})
        axes.plot(xs, [_mean([y for x, y in points if x == at]) for at in xs], color=colour, linewidth=1.5, label=label)
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, markersize=5)
    if log_x:
        axes.set_xscale("log")
    values = sorted({x for points in groups.values() for x, _ in points})
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()


def _draw_bars(axes, groups: Mapping[str, list[tuple]]) -> None:
    names = list(dict.fromkeys(str(x) for points in groups.values() for x, _ in points))
    width = 0.8 / len(groups)
    for index, (label, points) in enumerate(groups.items()):
        colour = figures.COLOURS[index % len(figures.COLOURS)]
        values = {name: [y for x, y in points if str(x) == name] for name in names}
        places = [at for at, name in enumerate(names) if values[name]]
        axes.bar(
            [at - 0.4 + width * (index + 0.5) for at in places],
            [_mean(values[names[at]]) for at in places],
            width=width * 0.95,
            color=colour,
            label=label,
        )
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=20 if max(map(len, names)) > 10 else 0,
        ha="right" if max(map(len, names)) > 10 else "center",
    )


def _value(text: str | None):
    """An override's text as int or float when it is one."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
