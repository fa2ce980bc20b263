"""One page of pictures, curves and claims: `python -m tools.gallery [--outputs outputs] [--out outputs/gallery]`.

Writes <out>/index.html, a single file that opens from disk without a network: per paper the pictures of its card, the
relations of its newest record with their verdicts, and of every run found below the outputs its newest picture and its
loss. A text field and two lists filter the papers. Nothing is measured here: numbers come from the results.json of the
projects and from the metrics.csv of the runs.
"""

import argparse
import base64
import html
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.errors import UserError
from common.files import write_text
from common.runtime.training.figures import COLOURS, LOG_SPAN, read_curves
from common.runtime.verbs import report
from tools import zoo

ROOT = Path(__file__).resolve().parent.parent
PICTURES = (".png", ".gif", ".jpg", ".webp")
CURVES = ("loss.png", "fd.png", "solver.png")  # pictures of curves, shown only where there is nothing else
LARGEST = 2**20  # bytes of a picture that is put into the page
POINTS = 300  # of a drawn curve
RUNS = 12  # newest runs per paper


# ---------------------------------------------------------------------------------------------------------------------
# Contents of the page


@dataclass(frozen=True)
class Run:
    """A run folder: its experiment, its newest picture and its losses."""

    folder: Path
    experiment: str
    picture: Path | None
    curves: Mapping[str, tuple[list[int], list[float]]]
    result: Mapping | None


def find_runs(outputs: Path) -> list[Run]:
    """Every folder below `outputs` with a metrics.csv and a known experiment, newest first."""
    runs = []
    for metrics in sorted(outputs.rglob("metrics.csv"), key=lambda path: -path.stat().st_mtime):
        folder = metrics.parent
        experiment = experiment_of(folder)
        if experiment:
            curves = {key: curve for key, curve in read_curves(metrics).items() if is_loss(key)}
            runs.append(Run(folder, experiment, newest_picture(folder), curves, report.read_result(folder)))
    return runs


def experiment_of(folder: Path) -> str | None:
    """The experiment a run folder was made of: from its overrides, else from its result, else None."""
    path = folder / "overrides.yaml"
    overrides = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    for text in overrides if isinstance(overrides, list) else []:
        if str(text).startswith("+experiment="):
            return str(text).partition("=")[2]
    return (report.read_result(folder) or {}).get("experiment")


def newest_picture(folder: Path) -> Path | None:
    """The newest picture in pictures/ and samples/; one of curves only when there is no other."""
    found = [
        path
        for part in ("pictures", "samples", "sample")
        for path in (folder / part).rglob("*")
        if path.suffix in PICTURES and path.stat().st_size <= LARGEST
    ]
    return max(found, key=lambda path: (path.name not in CURVES, path.stat().st_mtime), default=None)


def is_loss(key: str) -> bool:
    return key in ("train/loss", "val/loss", "test/loss")


def idea(card: str) -> str:
    """The first paragraph below the card's heading "Idea"."""
    return card.partition("\n## Idea\n")[2].strip().partition("\n\n")[0]


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def picture(path: Path, title: str = "") -> str:
    """The picture itself, inside the page."""
    kind = {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:])
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    return (
        f'<figure><img loading="lazy" alt="{html.escape(title or path.stem)}" '
        f'src="data:image/{kind};base64,{data}">{caption}</figure>'
    )


def curve(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], width: int = 300, height: int = 150) -> str:
    """Lines over steps as SVG, logarithmic where positive values span more than `LOG_SPAN` decades; "" for no point."""
    values = [value for _, ys in curves.values() for value in ys]
    steps = [step for xs, _ in curves.values() for step in xs]
    if not values:
        return ""
    log = min(values) > 0 and math.log10(max(values) / min(values)) > LOG_SPAN
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    first, last = min(steps), max(steps)
    left, top, right, bottom = 44, 8, width - 8, height - 20
    at_x = lambda step: left + (right - left) * (step - first) / ((last - first) or 1)
    at_y = lambda value: bottom - (bottom - top) * (scale(value) - low) / ((high - low) or 1)
    parts = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="frame"/>']
    for value in (min(values), max(values)):
        parts.append(
            f'<text x="{left - 4}" y="{at_y(value) + 4:.0f}" text-anchor="end">{report.show(float(value))}</text>'
        )
    parts.append(f'<text x="{left}" y="{height - 5}">{first}</text>')
    parts.append(f'<text x="{right}" y="{height - 5}" text-anchor="end">step {last}</text>')
    for number, (name, (xs, ys)) in enumerate(curves.items()):
        every = max(1, len(xs) // POINTS)
        kept = [(x, y) for i, (x, y) in enumerate(zip(xs, ys)) if i % every == 0 or i == len(xs) - 1]
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in kept)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" stroke="{colour}"/>')
        parts.append(
            f'<text x="{right - 4}" y="{top + 12 + 12 * number}" text-anchor="end" fill="{colour}">{name}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def relations(root: Path, slug: str, record: Mapping) -> str:
    """The claim and a row per relation: verdict, relation, ratio of means, seeds."""
    words = zoo.claim_words(root, slug)
    rows = []
    for relation in record["relations"]:
        held = "held" if relation["held"] else "failed"
        seeds = f"{sum(relation['per_seed'].values())} of {len(relation['per_seed'])}"
        asked = f"{relation['left']} {relation['op']} {report.show(relation['factor'])} x {relation['right']}"
        cells = (zoo.sentence_of(words, relation), asked, report.show(relation["ratio"]), seeds)
        rows.append(
            f'<tr class="{held}"><td><b>{held}</b></td>'
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f"<p>{html.escape(words.get('claim', record['claim']))}. {html.escape(record['date'])}, "
        f"{html.escape(str(record['hardware']))}, commit {html.escape(str(record['commit'])[:10])}.</p>"
        "<table><tr><th></th><th>relation</th><th>asked</th><th>ratio of means</th><th>seeds</th></tr>"
        f"{''.join(rows)}</table>"
    )


def run_figure(run: Run) -> str:
    """A run's picture, losses and whether it finished."""
    done = f"step {run.result.get('step')}" if run.result else "not finished"
    shown = picture(run.picture) if run.picture and run.picture.name not in CURVES else ""
    title = f"{run.experiment}, {run.folder.name} ({done})"
    return f"<div class='run'><h4>{html.escape(title)}</h4>{shown}{curve(run.curves)}</div>"


def section(root: Path, paper: zoo.Paper, runs: Sequence[Run]) -> str:
    """Everything about one paper."""
    folder = root / "projects" / paper.slug
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    record = zoo.newest_record(root, paper.slug)
    what, ours, baseline = zoo.headline(root, paper.slug, record)
    state = "none" if record is None else "held" if record["held"] else "failed"
    verdict = f"{zoo.verdict(record)} relations held" if record else "nothing measured"
    pictures = [picture(path, path.stem) for path in sorted(folder.iterdir()) if path.suffix in PICTURES]
    number = (
        f"<p class='number'>{html.escape(what)}: <b>{html.escape(ours)}</b>, {html.escape(baseline)}</p>"
        if what
        else ""
    )
    shown = "".join(run_figure(run) for run in runs[:RUNS])
    hidden = f"<p>{len(runs) - RUNS} older runs are not shown.</p>" if len(runs) > RUNS else ""
    return (
        f'<section data-family="{html.escape(paper.family)}" data-state="{state}">'
        f"<h2>{html.escape(paper.short)} <small>{html.escape(paper.title)}, {html.escape(paper.venue)}, "
        f"arXiv {paper.arxiv}</small><span class='verdict {state}'>{verdict}</span></h2>"
        f"<p>{html.escape(idea(card))}</p>{number}<div class='pictures'>{''.join(pictures)}</div>"
        + (f"<details open><summary>Claim</summary>{relations(root, paper.slug, record)}</details>" if record else "")
        + (
            f"<details open><summary>Runs found</summary><div class='runs'>{shown}</div>{hidden}</details>"
            if runs
            else ""
        )
        + "</section>"
    )


STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5a6673; --line: #d5dbe2; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1100px; margin: 0 auto; padding: 1rem; }
header { position: sticky; top: 0; z-index: 1; background: #fff; padding: .5rem 0; }
h1 { font-size: 1.3rem; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
h2 small { font-weight: normal; color: var(--soft); }
h4 { font-size: .8rem; margin: 0; }
input, select { font: inherit; padding: .2rem .5rem; border: 1px solid var(--line); border-radius: 4px; }
section { border: 1px solid var(--line); border-radius: 6px; padding: 1rem; margin: 1rem 0; }
.verdict { float: right; font-size: .85rem; padding: 0 .6rem; border-radius: 999px; background: #e8ebef; }
.verdict.held { background: #d9efdf; }
.verdict.failed { background: #fbe6d4; }
tr.held b { color: #2c7a45; }
tr.failed b { color: #b0500e; }
.number { border-left: 3px solid #2b5c8a; padding-left: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
td, th { border-top: 1px solid var(--line); padding: .2rem .4rem; text-align: left; vertical-align: top; }
.pictures, .runs { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; }
img { max-width: 100%; max-height: 360px; border: 1px solid var(--line); }
figcaption { font-size: .75rem; color: var(--soft); }
details { margin-top: .7rem; }
.run { width: 320px; }
svg { width: 300px; height: 150px; }
svg text { font: 10px system-ui, sans-serif; }
polyline { fill: none; stroke-width: 1.2; }
.frame { fill: none; stroke: var(--line); }
"""
SCRIPT = """
const [text, family, state] = ['text', 'family', 'state'].map(name => document.getElementById(name));
function filter() {
  let shown = 0;
  for (const one of document.querySelectorAll('section')) {
    const fits = one.textContent.toLowerCase().includes(text.value.toLowerCase())
      && (!family.value || one.dataset.family === family.value)
      && (!state.value || one.dataset.state === state.value);
    one.hidden = !fits;
    shown += fits;
  }
  document.getElementById('count').textContent = shown + ' shown';
}
const asked = new URLSearchParams(location.search);
for (const field of [text, family, state]) {
  field.value = asked.get(field.id) || '';
  field.addEventListener('input', filter);
}
filter();
"""


def page(root: Path, outputs: Path) -> str:
    """The whole page."""
    papers = zoo.projects(root)
    slugs = {experiment["name"]: experiment["slug"] for experiment in zoo.experiments(root)}
    runs = find_runs(outputs) if outputs.is_dir() else []
    families = zoo.families(papers.values())
    ordered = [paper for family in families for paper in papers.values() if paper.family == family]
    sections = [
        section(root, paper, [run for run in runs if slugs.get(run.experiment) == paper.slug]) for paper in ordered
    ]
    states = (("held", "every relation held"), ("failed", "some relation failed"), ("none", "nothing measured"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Gallery</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<header><h1>{len(papers)} papers, {len(runs)} runs found</h1>"
        '<input id="text" placeholder="filter by any word"> '
        f'<select id="family"><option value="">all families</option>{_options((f, f) for f in families)}</select> '
        f'<select id="state"><option value="">every verdict</option>{_options(states)}</select> '
        '<span id="count"></span>'
        f"</header>{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    )


def _options(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<option value="{html.escape(value)}">{html.escape(text)}</option>' for value, text in pairs)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input."""
    default = os.environ.get("ONESTEP_OUTPUTS", "outputs")
    parser = argparse.ArgumentParser(prog="python -m tools.gallery", description=__doc__.partition("\n")[0])
    parser.add_argument("--outputs", default=default, help="folder that is searched for runs")
    parser.add_argument("--out", default=None, help="folder of the page; default: gallery inside --outputs")
    options = parser.parse_args(arguments)
    out = Path(options.out or Path(options.outputs) / "gallery") / "index.html"
    try:
        text = page(root, Path(options.outputs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_text(out, text)
    print(
        f"wrote {out} ({len(re.findall('<section', text))} papers, {len(text) / 2**20:.1f} MiB); open it in a browser"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
