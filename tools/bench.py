"""Step time and memory of a paper's code against the published procedure: `python -m tools.bench <name> [options]`.

A benchmark is one file of tools/benchmarks. It describes what is compared and builds the steps; everything else is
here: variants take turns inside one process, so that a change of load affects all of them, and the peak memory of each
is measured in a process of its own. Nothing is asserted.

    DESCRIPTION                  what the first variant is and what all of them do, one paragraph
    add_arguments(parser)        options of this benchmark
    variants(options) -> [name]  the baseline first
    cases(options) -> [case]     strings; every variant is timed in every case
    variants_of(case, options)   optional: the variants of one case, its own baseline first
    make(variant, options)       -> step(case, repeat) -> {column: number}; equal (case, repeat) = equal random draws
    remarks(rows) -> [sentence]  optional: what the table shows, printed below it
    metrics(rows) -> {name: number}  optional: the numbers a claim can ask for (conf/claim, `benchmark:`)
    plot(rows, path)             optional: a picture of its own instead of bars
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from common.errors import UserError, nearest
from common.files import write_json
from common.runtime.training import figures
from common.runtime.training.memory import peak_growth
from common.runtime.verbs import report

FOLDER = Path(__file__).resolve().parent / "benchmarks"
MEMORY_STEPS = 2  # the second step has the optimiser's state beside the activations


def names() -> list[str]:
    """Every benchmark there is."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name: str) -> ModuleType:
    """The benchmark called `name`. Raises UserError with the nearest name."""
    if name not in names():
        raise UserError(f"Benchmark '{name}' does not exist. {nearest(name, names())}Benchmarks: {', '.join(names())}.")
    return importlib.import_module(f"tools.benchmarks.{name}")


# ---------------------------------------------------------------------------------------------------------------------
# Time


def interleave(steps: Mapping[str, Callable], case: str, repeats: int, say: Callable = print) -> dict[str, list[dict]]:
    """Records {"wall", "cpu", **facts} per variant: all variants once, then all again in reverse order, and so on.

    wall, cpu  seconds; cpu is summed over the threads and hardly sees other programs
    One unmeasured round goes first.
    """
    records: dict[str, list[dict]] = {name: [] for name in steps}
    for repeat in range(-1, repeats):
        for name in list(steps) if repeat % 2 else reversed(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            facts = steps[name](case, max(repeat, 0))
            record = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **facts}
            if repeat >= 0:
                records[name].append(record)
        if repeat >= 0:
            say("  " + ", ".join(f"{name} {records[name][-1]['wall']:.2f} s" for name in steps), flush=True)
    return records


def summarise(records: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """One row per variant: median seconds and two ratios to the first variant. Columns the steps report are means.

    ratio      median of the wall-clock ratios taken round by round, quartiles as spread
    cpu ratio  ratio of the total CPU seconds: the mean cost where it depends on the draws, and hardly any load in it
    """
    baseline = next(iter(records.values()))
    rows = []
    for name, own in records.items():
        ratios = [mine["wall"] / theirs["wall"] for mine, theirs in zip(own, baseline)]
        low, high = quartiles(ratios)
        rows.append(
            {
                "variant": name,
                "step s": statistics.median(r["wall"] for r in own),
                "ratio": statistics.median(ratios),
                "quartiles": "" if own is baseline else f"{low:.3f} - {high:.3f}",
                "cpu ratio": sum(r["cpu"] for r in own) / sum(r["cpu"] for r in baseline),
                **{fact: statistics.mean(r[fact] for r in own) for fact in own[0] if fact not in ("wall", "cpu")},
            }
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile, inside the range of the values."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def measure_memory(step: Callable, case: str) -> float:
    """By how many MiB the process grows, at its peak, over what it held before the first step."""

    def steps() -> None:
        for repeat in range(MEMORY_STEPS):
            step(case, repeat)

    return peak_growth(steps)


def memory_of(arguments: Sequence[str], variant: str, case: str) -> float:
    """`measure_memory` in a fresh process with the same command line."""
    command = [sys.executable, "-m", "tools.bench", *arguments, "--memory-of", variant, case]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the memory measurement of '{variant}' failed: {done.stderr.strip().splitlines()[-1:]}. "
            "See it with the same command plus: --memory-of "
            f"'{variant}' '{case}', or leave it out with --no-memory."
        )
    return json.loads(done.stdout.splitlines()[-1])["mib"]


# ---------------------------------------------------------------------------------------------------------------------
# Report


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Bars of the median step time, a group per case and thread count."""
    groups = list(dict.fromkeys((row["case"], row["threads"]) for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = figures.new_figure()
    width = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        own = {(row["case"], row["threads"]): row["step s"] for row in rows if row["variant"] == variant}
        at = [group + (index - (len(variants) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(
            at,
            [own.get(group, 0) for group in groups],
            width,
            label=variant,
            color=figures.COLOURS[index % len(figures.COLOURS)],
        )
    axes.set_xticks(range(len(groups)), [f"{case}\n{n} thread{'s' * (n > 1)}" for case, n in groups])
    axes.set_ylabel("seconds per step (median)")
    figure.legend(loc="outside lower center", ncols=min(3, len(variants)), frameon=False)
    figures.save_figure(figure, path)


def tables(name: str, rows: Sequence[Mapping]) -> list[tuple[str, list[dict]]]:
    """(title, rows): one table, or one per case where the cases have columns of their own."""
    cases = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(dict(row))
    if len({(tuple(row), part[0]["variant"]) for part in cases.values() for row in part}) == 1:
        return [(f"{name}: ratios to '{rows[0]['variant']}'", [dict(row) for row in rows])]
    return [(f"{name}: ratios to '{part[0]['variant']}'", part) for part in cases.values()]


def run(name: str, benchmark: ModuleType, options: argparse.Namespace, arguments: Sequence[str]) -> list[dict]:
    """Measure, print and write; returns the rows of the table."""
    import torch

    started = time.perf_counter()
    variants, cases = benchmark.variants(options), benchmark.cases(options)
    variants_of = getattr(benchmark, "variants_of", lambda case, options: variants)
    say = (lambda *_, **__: None) if options.quiet else print
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = report.environment()
    print(benchmark.DESCRIPTION)
    print(
        f"{facts['hardware']}, torch {torch.__version__}, load average {report.show(load_before)}, "
        f"commit {facts['commit'][:9]}{' + changes' * facts['dirty']}, {options.repeats} repeats",
        flush=True,
    )
    memory = {}
    if not options.no_memory:
        for case in cases:
            for variant in variants_of(case, options):
                memory[variant, case] = memory_of(arguments, variant, case)
                say(f"memory, {case}, {variant}: {memory[variant, case]:.0f} MiB", flush=True)
    steps = {variant: benchmark.make(variant, options) for variant in variants}
    rows, raw = [], []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in cases:
            say(f"{case}, {threads} thread{'s' * (threads > 1)}", flush=True)
            chosen = {variant: steps[variant] for variant in variants_of(case, options)}
            records = interleave(chosen, case, options.repeats, say)
            raw.append({"case": case, "threads": threads, "records": records})
            rows += [
                {
                    "case": case,
                    "threads": threads,
                    **row,
                    **({} if options.no_memory else {"peak MiB": round(memory[row["variant"], case])}),
                }
                for row in summarise(records)
            ]
    for title, part in tables(name, rows):
        report.print_table(title, part)
    remarks = getattr(benchmark, "remarks", lambda rows: [])(rows)
    print(*remarks, sep="\n", end="\n" * bool(remarks))
    out = Path(options.out)
    written = report.write_table(out, name, rows)
    getattr(benchmark, "plot", plot)(rows, out / f"{name}.png")
    metrics = getattr(benchmark, "metrics", lambda rows: {})(rows)
    write_json(
        out / f"{name}.json",
        {
            "says": benchmark.DESCRIPTION,
            "arguments": list(arguments),
            "load": load_before,
            **facts,
            "measured": raw,
            "remarks": remarks,
            "metrics": {key: {"value": value} for key, value in metrics.items()},
            "wall_time_s": time.perf_counter() - started,
            "memory_mib": [{"variant": v, "case": c, "mib": m} for (v, c), m in memory.items()],
        },
    )
    for path in [*written, out / f"{name}.png", out / f"{name}.json"]:
        print(path)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = ", ".join(names())
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(
                f"usage: python -m tools.bench <name> [options]\n\n{__doc__.partition(chr(10))[0]}\n\n"
                f"benchmarks: {known}\noptions of one: python -m tools.bench <name> --help"
            )
            return 0
        name = arguments[0]
        benchmark = load(name)
        parser = argparse.ArgumentParser(
            prog=f"python -m tools.bench {name}",
            description=benchmark.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one table row each")
        parser.add_argument("--repeats", type=int, default=8, help="measured rounds")
        parser.add_argument("--out", default="outputs/bench", help="folder for csv, md, png and json")
        parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
        parser.add_argument("--quiet", action="store_true", help="only the table")
        parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "CASE"), help=argparse.SUPPRESS)
        benchmark.add_arguments(parser)
        options = parser.parse_args(arguments[1:])
        for field in ("repeats", *(["batch"] if hasattr(options, "batch") else [])):
            if getattr(options, field) < 1:
                raise UserError(f"--{field} must be >= 1, got {getattr(options, field)}.")
        if min(options.threads) < 1:
            raise UserError(f"--threads must be >= 1, got {min(options.threads)}.")
        if options.memory_of:
            import torch

            torch.set_num_threads(max(options.threads))
            variant, case = options.memory_of
            print(json.dumps({"mib": measure_memory(benchmark.make(variant, options), case)}))
            return 0
        run(name, benchmark, options, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
