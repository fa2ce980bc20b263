"""Renders what the tree knows into README.md and the cards: `python -m tools.zoo [--check]`.

Between `<!-- zoo:<name> -->` and `<!-- /zoo -->` stand, written by this tool alone:
    papers        one line per project, from the first line of projects/<slug>/__init__.py
    experiments   one line per conf/experiment/*.yaml, from its header comment: what, command, cost
    results       the newest record of projects/<slug>/results.json, and the `published:` numbers of the experiments
In projects/<slug>/README.md the tables hold that project only. --check changes nothing and exits with 1 when a table is
out of date.
"""

import argparse
import ast
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from common.errors import UserError, nearest
from common.files import read_json, write_text
from common.runtime.verbs.report import markdown_table, show

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- zoo:(\w+) -->\n?)(.*?)(<!-- /zoo -->)", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# What the tree knows


def projects(root: Path = ROOT) -> dict[str, str]:
    """slug -> first line of the project's docstring, such as "ECT: title (venue), arXiv 0000.00000."."""
    found = {}
    for path in sorted((root / "projects").glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.parent.name] = docstring.partition("\n")[0].strip()
    return found


def experiments(root: Path = ROOT) -> list[dict]:
    """`slug`, `name`, `what`, `command`, `cost` and `published` of each experiment file, by name."""
    found = []
    slugs = sorted(projects(root), key=len, reverse=True)
    for path in sorted((root / "conf/experiment").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        header = []
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            if not line.startswith("# @package"):
                header.append(line.lstrip("# ").rstrip())
        command = next((line for line in header if line.startswith("python -m ")), None)
        after = header[header.index(command) + 1 :] if command else []
        content = yaml.safe_load(text) or {}
        found.append(
            {
                "slug": next((slug for slug in slugs if path.stem == slug or path.stem.startswith(f"{slug}_")), None),
                "name": path.stem,
                "what": header[0] if header else "",
                "command": command,
                "cost": " ".join(after),
                "published": content.get("published") or [],
            }
        )
    return found


def newest_record(root: Path, slug: str) -> dict | None:
    """The last record of projects/<slug>/results.json, or None."""
    path = root / "projects" / slug / "results.json"
    records = read_json(path)["records"] if path.is_file() else []
    return records[-1] if records else None


# ---------------------------------------------------------------------------------------------------------------------
# The tables; `only` is the slug of a card, None for the README


def papers_table(root: Path, only: str | None) -> str:
    rows = []
    for slug, title in projects(root).items():
        if only in (None, slug):
            card = root / "projects" / slug / "README.md"
            record = newest_record(root, slug)
            rows.append(
                {
                    "project": f"[{slug}](projects/{slug}/README.md)"
                    if card.is_file() and only is None
                    else f"`{slug}`",
                    "paper": title,
                    "experiments": sum(experiment["slug"] == slug for experiment in experiments(root)),
                    "claim": _verdict(record) if record else "-",
                }
            )
    return markdown_table(rows)


def _verdict(record: Mapping) -> str:
    held = sum(relation["held"] for relation in record["relations"])
    return f"{held} of {len(record['relations'])} relations held"


def experiments_table(root: Path, only: str | None) -> str:
    return markdown_table(
        [
            {"experiment": f"`{experiment['name']}`", "what": experiment["what"], "cost": experiment["cost"] or "-"}
            for experiment in experiments(root)
            if only in (None, experiment["slug"])
        ]
    )


def results_table(root: Path, only: str | None) -> str:
    parts = []
    for slug in projects(root):
        record = newest_record(root, slug) if only in (None, slug) else None
        if record:
            parts.append(_measured(slug, record))
    published = [
        {
            "experiment": f"`{experiment['name']}`",
            "metric": entry["metric"],
            "published": entry["value"],
            "source": entry["source"],
        }
        for experiment in experiments(root)
        if only in (None, experiment["slug"])
        for entry in experiment["published"]
    ]
    if published:
        parts.append(
            "Published numbers (the papers', not ours); `task=test` prints ours beside them:\n\n"
            + markdown_table(published)
        )
    return "\n".join(parts) or "(nothing recorded)\n"


def _measured(slug: str, record: Mapping) -> str:
    seeds = ", ".join(map(str, record["seeds"]))
    rows = []
    for name, row in record["measures"].items():
        spread = "" if row["spread"] is None else f" ± {show(row['spread'])}"
        kind = row.get("record") or {}
        rows.append(
            {
                "run": f"`{row['run']}`",
                "measured": row.get("says", name),
                "metric": kind.get("name", row["metric"]),
                "images": kind.get("samples"),
                "mean ± sd over seeds": f"{show(row['mean'])}{spread}",
            }
        )
    relations = [
        {
            "the claim": relation["says"],
            "asked": f"{relation['left']} {relation['op']} {show(relation['factor'])} x {relation['right']}",
            "ratio of means": relation["ratio"],
            "seeds": f"{sum(relation['per_seed'].values())} of {len(relation['per_seed'])}",
            "held": "held" if relation["held"] else "**failed**",
        }
        for relation in record["relations"]
    ]
    commit = record["commit"][:10] + (" with local changes" if record["dirty"] else "")
    return (
        f"Measured here, claim `{slug}`: {record['claim']} ({record['source']})\n\n{markdown_table(rows)}\n"
        f"{markdown_table(relations)}\n"
        f"Seeds {seeds}; {record['wall_time_s'] / 60:.0f} minutes of runs on {record['hardware']}; "
        f"commit {commit}, {record['date']}. Again: `make claim-{slug}`.\n"
    )


TABLES = {"papers": papers_table, "experiments": experiments_table, "results": results_table}


# ---------------------------------------------------------------------------------------------------------------------
# The files


def pages(root: Path = ROOT) -> list[tuple[Path, str | None]]:
    """(file, slug or None) of every page that may hold tables."""
    cards = [(path, path.parent.name) for path in sorted((root / "projects").glob("*/README.md"))]
    return [(root / "README.md", None)] * (root / "README.md").is_file() + cards


def rendered(path: Path, only: str | None, root: Path = ROOT) -> str:
    """The page with its tables made anew. Raises `UserError` for a table this tool does not know or an open marker."""
    text = path.read_text(encoding="utf-8")
    if len(re.findall(r"<!-- zoo:", text)) != len(BLOCK.findall(text)):
        raise UserError(f"{path.relative_to(root)} has a <!-- zoo:... --> marker without <!-- /zoo -->. Close it.")

    def make(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise UserError(
                f"{path.relative_to(root)}: zoo:{name} is no table. {nearest(name, TABLES)}Tables: {', '.join(TABLES)}."
            )
        return f"<!-- zoo:{name} -->\n{TABLES[name](root, only)}{match[4]}"

    return BLOCK.sub(make, text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0, 1 with --check and an outdated table, 2 for a bad marker."""
    parser = argparse.ArgumentParser(prog="python -m tools.zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a table is out of date")
    options = parser.parse_args(arguments)
    try:
        stale = [
            (path, text)
            for path, only in pages(root)
            if (text := rendered(path, only, root)) != path.read_text(encoding="utf-8")
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for path, text in stale:
        name = path.relative_to(root)
        if options.check:
            print(f"{name} is out of date. Render it with: python -m tools.zoo", file=sys.stderr)
        else:
            write_text(path, text)
            print(f"rendered {name}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
