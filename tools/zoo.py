"""Renders the generated tables of README.md, projects/README.md and the cards: `python -m tools.zoo [--check]`.

This tool alone writes what is between `<!-- zoo:<name> -->` and `<!-- /zoo -->`:
    papers        README.md: one line per paper and family, its headline beside the baseline, the verdict of its claim
    publications  projects/README.md: per paper what was measured, what was only fake-run, what is not covered
    headline      a card: the measured result in one sentence
    experiments   a card: one line per conf/experiment/*.yaml, from its header comment: what, cost
    results       a card: the newest record of projects/<slug>/results.json and the papers' published numbers
Numbers come from the record; descriptions come from conf/claim/<slug>.yaml, so that rewording needs no new run.
--check changes nothing and exits with 1 when a table is out of date.
"""

import argparse
import ast
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.errors import UserError, nearest
from common.files import read_json, write_text
from common.runtime.verbs.report import markdown_table, show

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- zoo:(\w+) -->\n?)(.*?)(<!-- /zoo -->)", re.DOTALL)
TITLE = re.compile(r"(?P<short>[^:]+): (?P<title>.+) \((?P<venue>[^()]+)\), arXiv (?P<arxiv>\d{4}\.\d{4,5})\.")
OTHER = "Other"  # the family of a paper that names none
NOT_COVERED = "## Not covered"  # the section of a card that projects/README.md repeats


# ---------------------------------------------------------------------------------------------------------------------
# Contents of the repository


@dataclass(frozen=True)
class Paper:
    """A project, as the docstring of its `__init__.py` introduces it."""

    slug: str
    short: str  # the name people use, such as ECT
    title: str
    venue: str
    arxiv: str
    family: str


def projects(root: Path = ROOT) -> dict[str, Paper]:
    """slug -> paper, from docstrings such as "ECT: title (ICLR 2025), arXiv 2406.14548." and "Family: diffusion.".

    Raises `UserError` for a first line of another form.
    """
    found = {}
    for path in sorted((root / "projects").glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        match = TITLE.fullmatch(docstring.partition("\n")[0].strip())
        if match is None:
            raise UserError(
                f"{path.relative_to(root)} must begin with a docstring like 'ECT: Title (Venue 2025), arXiv "
                f"2406.14548.', got {docstring.partition(chr(10))[0]!r}."
            )
        family = re.search(r"^Family: (.+)\.$", docstring, re.MULTILINE)
        found[path.parent.name] = Paper(path.parent.name, **match.groupdict(), family=family[1] if family else OTHER)
    return found


def experiments(root: Path = ROOT) -> list[dict]:
    """`slug`, `name`, `what`, `command`, `cost`, `published` and `small` of each experiment file, by name.

    small  whether it trains on a CPU by default, by itself or by the experiment it starts from
    """
    found = []
    bases: dict[str, list] = {}
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
        bases[path.stem] = content.get("defaults") or []
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
    for experiment in found:
        experiment["small"] = _on_cpu(experiment["name"], bases)
    return found


def _on_cpu(name: str, bases: Mapping[str, list]) -> bool:
    """Whether the last choice of trainer along the defaults of an experiment is the CPU."""
    small = False
    for entry in bases.get(name, []):
        if isinstance(entry, str) and (base := entry.rpartition("/")[2]) in bases:
            small = _on_cpu(base, bases)
        elif isinstance(entry, dict) and "override /trainer" in entry:
            small = entry["override /trainer"] == "cpu"
    return small


def newest_record(root: Path, slug: str) -> dict | None:
    """The last record of projects/<slug>/results.json, or None."""
    path = root / "projects" / slug / "results.json"
    records = read_json(path)["records"] if path.is_file() else []
    return records[-1] if records else None


def claim_words(root: Path, slug: str) -> dict:
    """The declaration in conf/claim/<slug>.yaml, {} when there is none."""
    path = root / "conf/claim" / f"{slug}.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def not_covered(root: Path, slug: str) -> str:
    """The text of the card's section "Not covered", without its heading."""
    path = root / "projects" / slug / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    _, found, rest = text.partition(f"\n{NOT_COVERED}\n")
    return re.split(r"^## ", rest, flags=re.MULTILINE)[0].strip() if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# The tables; `only` is the slug of a card, None for a page about all papers


def papers_table(root: Path, only: str | None) -> str:
    """A table per family: paper, headline beside its baseline, verdict."""
    found = projects(root)
    parts = []
    for family in families(found.values()):
        rows = []
        for paper in (paper for paper in found.values() if paper.family == family):
            record = newest_record(root, paper.slug)
            what, ours, baseline = headline(root, paper.slug, record)
            rows.append(
                {
                    "paper": f"[{paper.short}](projects/{paper.slug}/README.md): {paper.title}, {paper.venue}",
                    "measured here": f"{what}: {ours}" if what else "-",
                    "beside": baseline or "-",
                    "claim": verdict(record) if record else "-",
                }
            )
        parts.append(f"**{family}**\n\n{markdown_table(rows)}")
    return "\n".join(parts)


def families(papers) -> list[str]:
    """Families by the slug of their first paper; papers without a family come last."""
    return sorted(dict.fromkeys(paper.family for paper in papers), key=lambda family: family == OTHER)


def headline(root: Path, slug: str, record: Mapping | None) -> tuple[str, str, str]:
    """("FD-digits in one step", "ECT 8.29 ± 0.7", "random weights 33.1 ± 0.46"); empty without a record of it."""
    chosen = claim_words(root, slug).get("headline")
    measures = record["measures"] if record else {}
    if not chosen or chosen["measure"] not in measures or chosen["baseline"] not in measures:
        return "", "", ""
    ours = f"{chosen['name']} {_number(measures[chosen['measure']])}"
    return chosen["says"], ours, f"{chosen['against']} {_number(measures[chosen['baseline']])}"


def _number(row: Mapping) -> str:
    return f"{row['mean']:.3g}" + ("" if row["spread"] is None else f" ± {row['spread']:.2g}")


def verdict(record: Mapping) -> str:
    """Such as "7 of 7": how many relations of the claim held."""
    return f"{sum(relation['held'] for relation in record['relations'])} of {len(record['relations'])}"


def headline_sentence(root: Path, only: str | None) -> str:
    record = newest_record(root, only)
    if record is None:
        return "Nothing was measured yet.\n"
    what, ours, baseline = headline(root, only, record)
    measured = f"{what}: **{ours}**, {baseline} (mean ± standard deviation over seeds). " if what else ""
    return f"Measured here: {measured}{verdict(record)} relations of the [claim](#published-and-ours) held.\n"


def publications_list(root: Path, only: str | None) -> str:
    """Per paper: what was measured, what was only fake-run, what is not covered."""
    known = experiments(root)
    parts = []
    found = projects(root)
    for family in families(found.values()):
        parts.append(f"## {family}\n")
        for paper in (paper for paper in found.values() if paper.family == family):
            record = newest_record(root, paper.slug)
            trained = {run.get("experiment") for run in record["runs"].values()} if record else set()
            rest = [one for one in known if one["slug"] == paper.slug and one["name"] not in trained]
            runs = [one["name"] for one in known if one["name"] in trained]
            parts.append(f"### [{paper.short}]({paper.slug}/README.md): {paper.title}\n\n{paper.venue}, "
                         f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})\n")  # fmt: skip
            if record:
                words = claim_words(root, paper.slug).get("claim", record["claim"])
                measured = f"{words}: {verdict(record)} relations held. Runs: {_names(runs) or 'none'}."
            else:
                measured = "nothing yet."
            fake = _names(one["name"] for one in rest if not one["small"]) or "none"
            small = _names(one["name"] for one in rest if one["small"])
            parts.append(
                f"- **Measured here**: {measured}\n"
                + (f"- **Small, outside the claim**: {small}.\n" if small else "")
                + f"- **Fake-run only**: {fake}.\n- **Not covered**:"
                + f"{_indented(not_covered(root, paper.slug)) or ' nothing is written down.'}\n"
            )
    return "\n".join(parts)


def _names(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _indented(text: str) -> str:
    return "".join(f"\n  {line}" for line in text.splitlines())


def experiments_table(root: Path, only: str | None) -> str:
    return markdown_table(
        [
            {"experiment": f"`{experiment['name']}`", "what": experiment["what"], "cost": experiment["cost"] or "-"}
            for experiment in experiments(root)
            if experiment["slug"] == only
        ]
    )


def results_table(root: Path, only: str | None) -> str:
    record = newest_record(root, only)
    parts = [_measured(root, only, record)] if record else []
    published = [
        {
            "experiment": f"`{experiment['name']}`",
            "metric": entry["metric"],
            "published": entry["value"],
            "source": entry["source"],
        }
        for experiment in experiments(root)
        if experiment["slug"] == only
        for entry in experiment["published"]
    ]
    if published:
        parts.append(
            "Published numbers (the papers', not ours); `task=test` prints ours beside them:\n\n"
            + markdown_table(published)
        )
    return "\n".join(parts) or "(nothing recorded)\n"


def _measured(root: Path, slug: str, record: Mapping) -> str:
    words = claim_words(root, slug)
    seeds = ", ".join(map(str, record["seeds"]))
    rows = []
    for name, row in record["measures"].items():
        spread = "" if row["spread"] is None else f" ± {show(row['spread'])}"
        kind = row.get("record") or {}
        rows.append(
            {
                "run": f"`{row['run']}`",
                "measured": words.get("measures", {}).get(name, {}).get("says") or row.get("says", name),
                "metric": kind.get("name", row["metric"]),
                "images": kind.get("samples"),
                "mean ± sd over seeds": f"{show(row['mean'])}{spread}",
            }
        )
    relations = [
        {
            "the claim": sentence_of(words, relation),
            "asked": f"{relation['left']} {relation['op']} {show(relation['factor'])} x {relation['right']}",
            "ratio of means": relation["ratio"],
            "seeds": f"{sum(relation['per_seed'].values())} of {len(relation['per_seed'])}",
            "held": "held" if relation["held"] else "**failed**",
        }
        for relation in record["relations"]
    ]
    claim, source = (words.get(key, record[key]) for key in ("claim", "source"))
    commit = record["commit"][:10] + (" with local changes" if record["dirty"] else "")
    return (
        f"Measured here, claim `{slug}`: {claim} ({source})\n\n{markdown_table(rows)}\n"
        f"{markdown_table(relations)}\n"
        f"Seeds {seeds}; {record['wall_time_s'] / 60:.0f} minutes of runs on {record['hardware']}; "
        f"commit {commit}, {record['date']}. Again: `make claim-{slug}`.\n"
    )


def sentence_of(words: Mapping, relation: Mapping) -> str:
    """The sentence of a recorded relation: as conf/claim has it today, else as it was recorded."""
    for declared in words.get("relations", []):
        if _relation(declared) == _relation(relation) and declared.get("says"):
            return declared["says"]
    return relation["says"]


def _relation(relation: Mapping) -> tuple:
    return relation["left"], relation["op"], float(relation.get("factor", 1)), relation["right"]


OF_ALL = {"papers": papers_table, "publications": publications_list}
OF_ONE = {"headline": headline_sentence, "experiments": experiments_table, "results": results_table}


# ---------------------------------------------------------------------------------------------------------------------
# The files


def pages(root: Path = ROOT) -> list[tuple[Path, str | None]]:
    """(file, slug or None) of every page that may hold tables."""
    cards = [(path, path.parent.name) for path in sorted((root / "projects").glob("*/README.md"))]
    return [(path, None) for path in (root / "README.md", root / "projects/README.md") if path.is_file()] + cards


def rendered(path: Path, only: str | None, root: Path = ROOT) -> str:
    """The page with its tables made anew. Raises `UserError` for a table this page cannot hold or an open marker."""
    text = path.read_text(encoding="utf-8")
    if len(re.findall(r"<!-- zoo:", text)) != len(BLOCK.findall(text)):
        raise UserError(f"{path.relative_to(root)} has a <!-- zoo:... --> marker without <!-- /zoo -->. Close it.")
    tables = OF_ALL if only is None else OF_ONE

    def make(match: re.Match) -> str:
        name = match[2]
        if name not in tables:
            raise UserError(
                f"{path.relative_to(root)}: zoo:{name} is no table of this page. {nearest(name, tables)}"
                f"Tables: {', '.join(tables)}."
            )
        return f"<!-- zoo:{name} -->\n{tables[name](root, only)}{match[4]}"

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
