"""A paper's claim, measured here: `python -m tools.claim ect [--seeds 1 2 3] [--fresh] [--no-record] [--strict]`.

A claim (conf/claim/<slug>.yaml) names runs to make side by side, the numbers to read from their result.json, and the
relations the paper states. The tool makes the runs (finished ones of the same code are reused, interrupted ones
continue), prints mean and spread over the seeds and whether each relation held, and appends a record to
projects/<slug>/results.json. A relation that fails is recorded as failed.

    claim: one sentence of the paper
    source: arXiv number, table or figure
    seeds: [1, 2, 3]
    headline:        # optional {says, name, measure, against, baseline}: a measure and its baseline for README.md,
                     # shown as "<says>: <name> 8.3, <against> 33"
    runs:            # name -> {experiment, overrides: [key=value, ...], needs: [earlier run names]}, or
                     # {benchmark, options: [...]}: `python -m tools.bench <benchmark> <options>`, once per seed;
                     # "{teacher}" in an override is replaced by the folder of run `teacher` with the same seed;
                     # task=test among the overrides measures given weights instead of training
    measures:        # name -> {run, metric: key of its result.json or of the benchmark's metrics, says: words for the
                     # table}
    relations:       # [{left, op: ">=" "<=" ">" "<", factor, right, says}]: left op factor * right,
                     # tested on every seed and on the means
"""

import argparse
import hashlib
import operator
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml

from common.errors import UserError, nearest
from common.files import read_json, write_json
from common.runtime.cli.needs import override
from common.runtime.verbs import report
from tools import bench

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FIELDS = {
    "claim": {"claim", "source", "seeds", "headline", "runs", "measures", "relations"},
    "headline": {"says", "name", "measure", "against", "baseline"},
    "run": {"experiment", "overrides", "needs"},
    "benchmark": {"benchmark", "options"},
    "measure": {"run", "metric", "says"},
    "relation": {"left", "op", "factor", "right", "says"},
}
STAMP = "claim.json"  # in a run folder: what made it


# ---------------------------------------------------------------------------------------------------------------------
# The declaration


def load_claim(slug: str, conf: Path = ROOT / "conf") -> dict:
    """The declaration of a claim, with every name in it checked. Raises `UserError` naming the field and the fix."""
    path = conf / "claim" / f"{slug}.yaml"
    slugs = claim_slugs(conf)
    if slug not in slugs:
        raise UserError(
            f"Claim '{slug}' does not exist. {nearest(slug, slugs)}Claims: {', '.join(slugs) or 'none'} (conf/claim)."
        )
    claim = yaml.safe_load(path.read_text(encoding="utf-8"))
    where = f"conf/claim/{slug}.yaml"
    _fields(claim, "claim", where, required=FIELDS["claim"] - {"headline"})
    if not claim["seeds"] or not all(isinstance(seed, int) for seed in claim["seeds"]):
        raise UserError(f"{where}: seeds must be a list of integers, got {claim['seeds']!r}.")
    seen: list[str] = []
    for name, run in claim["runs"].items():
        if isinstance(run, dict) and "benchmark" in run:
            _fields(run, "benchmark", f"{where}: runs.{name}", required={"benchmark"})
            _known(run["benchmark"], bench.names(), f"{where}: runs.{name}.benchmark", "a benchmark")
            run["options"] = [str(option) for option in run.get("options", [])]
            continue
        _fields(run, "run", f"{where}: runs.{name}", required={"experiment"})
        run.setdefault("overrides", [])
        run["needs"] = [run["needs"]] if isinstance(run.get("needs"), str) else run.get("needs", [])
        for need in run["needs"]:
            _known(need, seen, f"{where}: runs.{name}.needs", "a run declared above it")
        if not (conf / "experiment" / f"{run['experiment']}.yaml").is_file():
            experiments = [p.stem for p in (conf / "experiment").glob("*.yaml")]
            raise UserError(
                f"{where}: runs.{name}.experiment '{run['experiment']}' does not exist. "
                f"{nearest(run['experiment'], experiments)}List them with: ls conf/experiment"
            )
        seen.append(name)
    for name, measure in claim["measures"].items():
        _fields(measure, "measure", f"{where}: measures.{name}", required={"run", "metric"})
        _known(measure["run"], claim["runs"], f"{where}: measures.{name}.run", "a declared run")
    if "headline" in claim:
        _fields(claim["headline"], "headline", f"{where}: headline", required=FIELDS["headline"])
        for key in ("measure", "baseline"):
            _known(claim["headline"][key], claim["measures"], f"{where}: headline.{key}", "a declared measure")
    for index, relation in enumerate(claim["relations"]):
        here = f"{where}: relations.{index}"
        _fields(relation, "relation", here, required={"left", "op", "right"})
        relation.setdefault("factor", 1)
        relation.setdefault("says", f"{relation['left']} {relation['op']} {relation['factor']} x {relation['right']}")
        _known(relation["op"], OPERATORS, f"{here}.op", "an operator")
        for side in ("left", "right"):
            _known(relation[side], claim["measures"], f"{here}.{side}", "a declared measure")
    return claim


def claim_slugs(conf: Path = ROOT / "conf") -> list[str]:
    return sorted(path.stem for path in (conf / "claim").glob("*.yaml"))


def _fields(node, kind: str, where: str, required) -> None:
    if not isinstance(node, dict):
        raise UserError(f"{where} must be a mapping with {', '.join(sorted(FIELDS[kind]))}, got {node!r}.")
    for key in node:
        _known(key, sorted(FIELDS[kind]), where, f"a field of a {kind}")
    for key in sorted(required):
        if key not in node:
            raise UserError(f"{where} lacks the field {key}.")


def _known(name, options, where: str, what: str) -> None:
    if name not in options:
        raise UserError(
            f"{where}: '{name}' is not {what}. {nearest(str(name), options)}"
            f"Options: {', '.join(map(str, options)) or 'none'}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def code_hash(root: Path = ROOT) -> str:
    """16 hex digits of the code and configuration a run depends on (contents, not commits; without documentation)."""
    tops = ("common", "projects", "conf", "tools/benchmarks")
    listed = report.git("ls-files", "-co", "--exclude-standard", "--", *tops, root=root)
    names = (
        listed.splitlines()
        if listed is not None
        else [path.relative_to(root).as_posix() for top in tops for path in (root / top).rglob("*")]
    )
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        path = root / name
        elsewhere = name.startswith(("conf/claim/", "conf/sweep/", "conf/debug/", "conf/hydra/"))
        if path.suffix in (".py", ".yaml") and path.is_file() and not elsewhere:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run_arguments(run: Mapping, seed: int, folder: Path, folders: Mapping[str, Path]) -> list[str]:
    """The command line of one run after `python -m projects.run`; `{name}` becomes the folder of run `name`."""
    arguments = [f"+experiment={run['experiment']}", f"seed={seed}", override("run.dir", folder.resolve())]
    for text in run["overrides"]:
        key, _, value = str(text).partition("=")
        if any(f"{{{name}}}" in value for name in folders):
            for name, other in folders.items():
                value = value.replace(f"{{{name}}}", str(other.resolve()))
            text = override(key, value)
        arguments.append(str(text))
    return arguments


def benchmark_arguments(run: Mapping, folder: Path) -> list[str]:
    """The command line of one benchmark after `python -m tools.bench`."""
    return [run["benchmark"], "--out", str(folder.resolve()), *run["options"]]


def execute(arguments: Sequence[str], module: str = "projects.run") -> int:
    """`python -m module *arguments` in a process of its own, its output on ours; returns the exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode


def make_runs(
    claim: Mapping,
    seed: int,
    folder: Path,
    *,
    code: str,
    fresh: bool = False,
    run: Callable[[Sequence[str], str], int] = execute,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict]:
    """All runs of one seed, in order, under `folder`; returns run name -> result record.

    A finished run made by the same command and code is reused; an unfinished one is started again in its folder, where
    the runtime continues its last checkpoint; a folder made by anything else is emptied first.
    Raises `UserError` when a run fails or leaves no result.
    """
    say = say or (lambda text: print(text, flush=True))  # before the run's own output, also in a pipe
    results: dict[str, dict] = {}
    stamps: dict[str, dict] = {}
    folders: dict[str, Path] = {}
    for name, spec in claim["runs"].items():
        place = folder / name
        if "benchmark" in spec:
            module, arguments, used = "tools.bench", benchmark_arguments(spec, place), []
            written = place / f"{spec['benchmark']}.json"
        else:
            module, arguments = "projects.run", run_arguments(spec, seed, place, folders)
            # where that verb writes its numbers
            written = (place / "test" if "task=test" in arguments else place) / "result.json"
            used = [
                other
                for other in folders
                if other in spec["needs"] or any(f"{{{other}}}" in str(text) for text in spec["overrides"])
            ]
        stamp = {"arguments": arguments, "code": code, "needs": {other: stamps[other] for other in used}}
        folders[name], stamps[name] = place, stamp
        same = not fresh and _stamp(place) == stamp
        result = _result(written) if same else None
        if result is not None:
            say(f"[seed {seed}] {name}: reusing {place}")
        else:
            if not same and place.exists():
                shutil.rmtree(place)
            write_json(place / STAMP, stamp)
            say(f"[seed {seed}] {name}: python -m {module} {' '.join(arguments)}")
            status = run(arguments, module)
            result = _result(written)
            if status or result is None:
                why = f"ended with exit code {status}" if status else f"left no {written.name}"
                raise UserError(
                    f"Run '{name}' of seed {seed} {why}; see its output above. "
                    f"Start again with the same command: finished runs are kept."
                )
        results[name] = result
    return results


def _result(path: Path) -> dict | None:
    """The numbers a finished run or benchmark wrote, None when there are none."""
    if path.name == "result.json":
        return report.read_result(path.parent)
    try:
        return read_json(path)
    except UserError:
        return None


def _stamp(place: Path) -> dict | None:
    try:
        return read_json(place / STAMP)
    except UserError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def measure(claim: Mapping, results: Mapping[str, Mapping]) -> dict[str, float]:
    """Measure name -> value from the result records of one seed. Raises `UserError` for a metric that is not there."""
    values = {}
    for name, spec in claim["measures"].items():
        metrics = results[spec["run"]]["metrics"]
        if spec["metric"] not in metrics:
            raise UserError(
                f"measures.{name}: run '{spec['run']}' has no metric '{spec['metric']}'. "
                f"{nearest(spec['metric'], metrics)}Metrics: {', '.join(metrics) or 'none'}."
            )
        value = metrics[spec["metric"]]["value"]
        if value is None:
            raise UserError(f"measures.{name}: '{spec['metric']}' of run '{spec['run']}' is not a finite number.")
        values[name] = float(value)
    return values


def summary(values: Mapping[int, Mapping[str, float]]) -> dict[str, dict]:
    """Measure -> {mean, spread, per_seed}; spread is the sample standard deviation, None for one seed."""
    names = next(iter(values.values()))
    table = {}
    for name in names:
        column = [values[seed][name] for seed in values]
        spread = statistics.stdev(column) if len(column) > 1 else None
        table[name] = {
            "mean": statistics.fmean(column),
            "spread": spread,
            "per_seed": {str(seed): values[seed][name] for seed in values},
        }
    return table


def judge(claim: Mapping, values: Mapping[int, Mapping[str, float]]) -> list[dict]:
    """Each relation with `ratio` (left / right of the means), `per_seed` and `held`: in every seed and on the means."""
    means = {name: row["mean"] for name, row in summary(values).items()}
    verdicts = []
    for relation in claim["relations"]:

        def holds(row, relation=relation) -> bool:
            return OPERATORS[relation["op"]](row[relation["left"]], relation["factor"] * row[relation["right"]])

        per_seed = {str(seed): holds(values[seed]) for seed in values}
        right = means[relation["right"]]
        verdicts.append(
            {
                **relation,
                "ratio": means[relation["left"]] / right if right else None,
                "per_seed": per_seed,
                "on_means": holds(means),
                "held": holds(means) and all(per_seed.values()),
            }
        )
    return verdicts


def make_record(claim: Mapping, results: Mapping[int, Mapping[str, Mapping]], code: str) -> dict:
    """The record for results.json from seed -> run -> result."""
    values = {seed: measure(claim, runs) for seed, runs in results.items()}
    flat = [result for runs in results.values() for result in runs.values()]
    table = summary(values)
    for name, spec in claim["measures"].items():
        record = results[next(iter(results))][spec["run"]]["metrics"][spec["metric"]].get("record")
        table[name] |= {"run": spec["run"], "metric": spec["metric"], "says": spec.get("says", name), "record": record}
    verdicts = judge(claim, values)
    commit, dirty = report.source_state()
    return {
        "claim": claim["claim"],
        "source": claim["source"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "dirty": dirty or any(result.get("dirty") for result in flat),
        "code": code,
        "seeds": list(results),
        "hardware": "; ".join(dict.fromkeys(str(result.get("hardware", "unknown")) for result in flat)),
        "versions": flat[0].get("versions", {}),
        "wall_time_s": round(sum(result.get("wall_time_s") or 0.0 for result in flat), 1),
        "runs": {
            name: {
                **{key: run[key] for key in ("experiment", "overrides", "benchmark", "options") if key in run},
                "steps": results[next(iter(results))][name].get("step"),
            }
            for name, run in claim["runs"].items()
        },
        "measures": table,
        "relations": verdicts,
        "held": all(verdict["held"] for verdict in verdicts),
    }


def append_record(path: Path, slug: str, record: Mapping) -> None:
    """Adds a record to results.json atomically; the earlier ones stay as they are."""
    stored = read_json(path) if path.is_file() else {"slug": slug, "records": []}
    write_json(path, {**stored, "records": [*stored["records"], record]})


def show_record(record: Mapping) -> None:
    """Prints the measures with mean and spread, then each relation with its verdict."""
    rows = []
    for name, row in record["measures"].items():
        spread = "" if row["spread"] is None else f" ± {report.show(row['spread'])}"
        rows.append(
            {
                "measure": name,
                "what": row["says"],
                "mean": f"{report.show(row['mean'])}{spread}",
                **{f"seed {seed}": value for seed, value in row["per_seed"].items()},
            }
        )
    report.print_table(record["claim"], rows)
    report.print_table(
        "Relations",
        [
            {
                "claim": relation["says"],
                "asked": f"{relation['left']} {relation['op']} {report.show(relation['factor'])} x {relation['right']}",
                "ratio of means": relation["ratio"],
                "seeds": f"{sum(relation['per_seed'].values())}/{len(relation['per_seed'])}",
                "held": "held" if relation["held"] else "FAILED",
            }
            for relation in record["relations"]
        ],
    )


def claim_once(
    slug: str,
    *,
    seeds: Sequence[int] | None,
    fresh: bool,
    record: bool,
    root: Path = ROOT,
    run: Callable[[Sequence[str], str], int] = execute,
) -> dict:
    """Make, measure, print and (with `record`) store one claim; returns its record."""
    claim = load_claim(slug, root / "conf")
    outputs = Path(os.environ.get("ONESTEP_OUTPUTS", "outputs")) / "claims" / slug
    code = code_hash(root)
    started = time.perf_counter()
    results = {
        seed: make_runs(claim, seed, outputs / f"seed{seed}", code=code, fresh=fresh, run=run)
        for seed in seeds or claim["seeds"]
    }
    made = make_record(claim, results, code)
    show_record(made)
    print(f"took {time.perf_counter() - started:.0f} s now; the runs took {made['wall_time_s']:.0f} s in all")
    if record:
        path = root / "projects" / slug / "results.json"
        append_record(path, slug, made)
        print(f"recorded in {os.path.relpath(path)}; render the tables with: python -m tools.zoo")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 with --strict and a failed relation, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tools.claim", description=__doc__.partition("\n")[0])
    parser.add_argument("slug", nargs="?", help="a file of conf/claim, without .yaml")
    parser.add_argument("--all", action="store_true", help="every declared claim")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the declared ones")
    parser.add_argument("--fresh", action="store_true", help="make every run anew")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a relation does not hold")
    options = parser.parse_args(arguments)
    try:
        slugs = claim_slugs() if options.all else [options.slug]
        if slugs == [None]:
            raise UserError(f"Name a claim, or give --all. Claims: {', '.join(claim_slugs()) or 'none'} (conf/claim).")
        made = [
            claim_once(slug, seeds=options.seeds, fresh=options.fresh, record=not options.no_record) for slug in slugs
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(options.strict and not all(record["held"] for record in made))


if __name__ == "__main__":
    sys.exit(main())
