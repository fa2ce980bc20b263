"""`common` holds what two papers share (rule R2): every module of it is used by two papers, or listed with its reason.

A paper uses what its folder imports and what its experiments name as `_target_`, and everything those import. The
runtime is used by every paper.
"""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
CONF = REPO / "conf"
spec = importlib.util.spec_from_file_location("import_rules", REPO / "tests" / "test_layers.py")
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)

FIXED = (
    "the design names it: DEQ solvers, Hamburger blocks, consistency and MeanFlow losses, flow and segmentation data"
)
TOOL = "tools convert the weights of several papers with it"
# Package or module of common -> why it stays although fewer than two papers of today use it.
LISTED = {
    "common.deq": FIXED,
    "common.ham": FIXED,
    "common.losses.consistency": FIXED,
    "common.data.flow": FIXED,
    "common.data.segmentation": FIXED,
    "common.torchdeq": "names of the torchdeq library for programs outside this repository",
    "common.weights": TOOL,
    "common.data.images.mnist": "data words mnist and fashion_mnist for every image experiment",
    "common.losses.adversarial": "PPOGAN is its second user",
    "common.losses.denoising": "the online model of SIM, FGM and Diff-Instruct* is trained by it",
    "common.optim.muon": "an optimizer word for every experiment",
    "common.tasks.segmentation": "MetaFormer backbones are its second user",
    "common.tasks.overlays": "MetaFormer backbones are its second user",
    "common.tasks.pictures": "MetaFormer backbones are its second user",
    "common.metrics.segmentation": "MetaFormer backbones are its second user",
}


@cache
def tree(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def targets(node) -> set[str]:
    if isinstance(node, dict):
        own = {node["_target_"]} if isinstance(node.get("_target_"), str) else set()
        return own.union(*(targets(value) for value in node.values()))
    return set().union(*(targets(value) for value in node)) if isinstance(node, list) else set()


def files_of(path: Path) -> set[Path]:
    """The YAML files a file's defaults lists may bring in, itself included."""
    seen, todo = set(), [path]
    while todo:
        here = todo.pop()
        if here in seen or not here.is_file():
            continue
        seen.add(here)
        for entry in tree(here).get("defaults", []):
            if isinstance(entry, str):
                todo.append(
                    (CONF / entry.lstrip("/") if entry.startswith("/") else here.parent / entry).with_suffix(".yaml")
                )
                continue
            for key, options in entry.items():
                group = key.removeprefix("override ").removeprefix("optional ").partition("@")[0]
                folder = CONF / group.lstrip("/") if group.startswith("/") else here.parent / group
                todo += [folder / f"{option}.yaml" for option in (options if isinstance(options, list) else [options])]
    return seen


def module_of(target: str, files) -> str | None:
    parts = target.split(".")
    return next((name for cut in range(len(parts), 1, -1) if (name := ".".join(parts[:cut])) in files), None)


def reach(roots, graph) -> set[str]:
    seen, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


@cache
def users() -> dict[str, set[str]]:
    """Module of common -> slugs of the papers that use it."""
    files = rules.modules("common", "projects")
    graph = rules.import_graph(files)
    papers = sorted(path.parent.name for path in (REPO / "projects").glob("*/__init__.py"))
    found = {name: set() for name in files if name.startswith("common.")}
    runtime = reach((name for name in files if name.startswith("common.runtime.")), graph)
    for slug in papers:
        yamls = set().union(*(files_of(path) for path in (CONF / "experiment").glob(f"{slug}_*.yaml")))
        named = set().union(*(targets(tree(path)) for path in yamls))
        roots = {name for name in files if name.startswith(f"projects.{slug}.")}
        roots |= {module for target in named if (module := module_of(target, files))}
        for name in reach(roots, graph) | runtime:
            if name in found:
                found[name].add(slug)
    return found


def listed(name: str) -> str | None:
    return next((entry for entry in LISTED if f"{name}.".startswith(f"{entry}.")), None)


def test_common_holds_what_two_papers_share():
    wrong = [
        f"{name} ({', '.join(slugs) or 'no paper'})"
        for name, slugs in users().items()
        if len(slugs) < 2 and not listed(name)
    ]
    assert not wrong, f"move to the paper's folder, or list with a reason: {'; '.join(wrong)}"


@pytest.mark.parametrize("entry", LISTED)
def test_what_is_listed_is_still_needed(entry):
    below = {name: slugs for name, slugs in users().items() if f"{name}.".startswith(f"{entry}.")}
    assert below, f"{entry} does not exist"
    assert any(len(slugs) < 2 for slugs in below.values()), f"{entry} has two users now: take it off the list"


def test_papers_reach_what_they_are_known_to_use():
    """The finder itself: an import, a target of an experiment, and a target two files away."""
    assert "ect" in users()["common.losses.consistency"]
    assert "hamburger" in users()["common.data.segmentation.camvid"]
    assert "torchdeq" in users()["common.deq.solvers"] and "ect" not in users()["common.ham.ham"]
