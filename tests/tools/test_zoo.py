"""The tables in README.md, projects/README.md and the cards come from the tree, and stale ones are found."""

from pathlib import Path

import pytest

from common.files import write_json, write_text
from tools import zoo

ROOT = Path(__file__).parents[2]

RECORD = {
    "claim": "Tuning wins.",
    "source": "arXiv 1",
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
    "dirty": False,
    "seeds": [1, 2],
    "hardware": "box, 2 cores",
    "wall_time_s": 120.0,
    "runs": {"tuned": {"experiment": "edm_cpu"}, "cost": {"benchmark": "flow_memory"}},
    "measures": {
        "a": {
            "run": "tuned",
            "metric": "test/fd",
            "says": "tuned | one step",
            "mean": 5.5,
            "spread": 0.5,
            "record": {"name": "FD-digits", "samples": 4000},
        },
        "b": {"run": "old", "metric": "test/fd", "mean": 300.0, "spread": None, "record": None},
    },
    "relations": [
        {
            "says": "50 x better",
            "left": "b",
            "op": ">=",
            "factor": 50,
            "right": "a",
            "ratio": 54.5,
            "per_seed": {"1": True, "2": False},
            "held": False,
        }
    ],
    "held": False,
}


CARD = (
    "# EDM\n\n## Idea\n\n<!-- zoo:headline -->\n<!-- /zoo -->\n<!-- zoo:results -->\n<!-- /zoo -->\n"
    "<!-- zoo:experiments -->\n<!-- /zoo -->\n\n## Not covered\n\n- Any GPU.\n- Large\n  sets.\n\n## End\n"
)


@pytest.fixture
def root(tmp_path) -> Path:
    write_text(tmp_path / "projects/__init__.py", "")
    write_text(
        tmp_path / "projects/ect/__init__.py",
        '"""ECT: tuning: a story (ICLR 2025), arXiv 2406.14548.\n\nFamily: Few steps.\n"""\n',
    )
    write_text(tmp_path / "projects/edm/__init__.py", '"""EDM: design space (NeurIPS 2022), arXiv 2206.00364."""\n')
    write_text(
        tmp_path / "conf/experiment/ect_toy.yaml",
        "# @package _global_\n# ECT on toys: FD 3\n# python -m projects.run +experiment=ect_toy\n# One minute.\n"
        "a: 1  # not this\npublished: [{metric: test/fid, value: 3.86, source: README}]\n",
    )
    write_text(tmp_path / "conf/experiment/edm_toy.yaml", "# @package _global_\n# The teacher\na: 1\n")
    write_text(
        tmp_path / "conf/experiment/edm_cpu.yaml",
        "# @package _global_\n# Small\ndefaults: [{override /trainer: cpu}]\n",
    )
    write_text(tmp_path / "conf/experiment/edm_cpu_too.yaml", "# @package _global_\n# Small\ndefaults: [edm_cpu]\n")
    write_text(
        tmp_path / "conf/claim/ect.yaml",
        "claim: Tuning wins in plain words.\nsource: arXiv 1\n"
        "headline: {says: FD, name: ECT, measure: a, against: old, baseline: b}\n"
        "measures: {a: {run: tuned, metric: test/fd, says: 'tuned | one step'}}\n"
        "relations: [{left: b, op: '>=', factor: 50, right: a, says: 50 x better in plain words}]\n",
    )
    write_json(tmp_path / "projects/ect/results.json", {"slug": "ect", "records": [{"old": 1}, RECORD]})
    write_text(tmp_path / "README.md", "Title\n\n<!-- zoo:papers -->old<!-- /zoo -->\n\nkept\n\nend\n")
    write_text(tmp_path / "projects/README.md", "<!-- zoo:publications -->\n<!-- /zoo -->\n")
    write_text(tmp_path / "projects/ect/README.md", CARD.replace("EDM", "ECT"))
    write_text(tmp_path / "projects/edm/README.md", CARD)
    return tmp_path


def test_readme_holds_one_line_per_paper_by_family(root, capsys):
    assert zoo.main([], root) == 0
    assert "rendered README.md" in capsys.readouterr().out
    text = (root / "README.md").read_text()
    assert text.startswith("Title\n\n<!-- zoo:papers -->\n**Few steps**\n") and text.endswith("\nkept\n\nend\n")
    assert (
        "| [ECT](projects/ect/README.md): tuning: a story, ICLR 2025 | FD: ECT 5.5 ± 0.5 | old 300 | 0 of 1 |" in text
    )
    assert text.index("**Few steps**") < text.index("**Other**") < text.index("[EDM]")
    assert "| [EDM](projects/edm/README.md): design space, NeurIPS 2022 | - | - | - |" in text


def test_a_card_holds_its_own_project_in_the_words_of_the_claim(root):
    zoo.main([], root)
    card = (root / "projects/ect/README.md").read_text()
    assert "Measured here: FD: **ECT 5.5 ± 0.5**, old 300 (mean" in card and "0 of 1 relations" in card
    assert "| `ect_toy` | ECT on toys: FD 3 | One minute. |" in card and "edm_toy" not in card
    assert "claim `ect`: Tuning wins in plain words. (arXiv 1)" in card
    assert "| `tuned` | tuned \\| one step | FD-digits | 4000 | 5.5 ± 0.5 |" in card
    assert "| 50 x better in plain words | b >= 50 x a | 54.5 | 1 of 2 | **failed** |" in card
    assert "| `ect_toy` | test/fid | 3.86 | README |" in card and "commit 0123456789, 2026-01-02" in card
    other = (root / "projects/edm/README.md").read_text()
    assert "(nothing recorded)" in other and "Nothing was measured yet." in other and "ect_toy" not in other


def test_words_of_a_record_stay_where_the_claim_has_none(root):
    write_text(root / "conf/claim/ect.yaml", "claim: Other.\nsource: arXiv 1\nmeasures: {}\nrelations: []\n")
    zoo.main([], root)
    card = (root / "projects/ect/README.md").read_text()
    assert "| 50 x better | b >= 50 x a |" in card and "| `old` | b | test/fd |" in card and "FD: **ECT" not in card


def test_the_publication_list_says_what_was_measured_and_what_not(root):
    zoo.main([], root)
    text = (root / "projects/README.md").read_text()
    assert "### [ECT](ect/README.md): tuning: a story" in text and "https://arxiv.org/abs/2406.14548" in text
    assert "- **Measured here**: Tuning wins in plain words.: 0 of 1 relations held. Runs: `edm_cpu`." in text
    assert "- **Fake-run only**: `ect_toy`.\n- **Not covered**:\n  - Any GPU.\n  - Large\n    sets.\n" in text
    assert "- **Measured here**: nothing yet." in text
    assert "- **Small, outside the claim**: `edm_cpu`, `edm_cpu_too`.\n- **Fake-run only**: `edm_toy`." in text


def test_check_finds_stale_tables_and_changes_nothing(root, capsys):
    before = (root / "README.md").read_text()
    assert zoo.main(["--check"], root) == 1
    assert "README.md is out of date" in capsys.readouterr().err and (root / "README.md").read_text() == before
    assert zoo.main([], root) == 0 and zoo.main(["--check"], root) == 0
    write_json(root / "projects/ect/results.json", {"slug": "ect", "records": [{**RECORD, "dirty": True}]})
    assert zoo.main(["--check"], root) == 1


@pytest.mark.parametrize(
    ("page", "block", "message"),
    [
        ("README.md", "<!-- zoo:paper -->\n<!-- /zoo -->", "zoo:paper is no table of this page. Closest: papers."),
        ("README.md", "<!-- zoo:results -->\n<!-- /zoo -->", "zoo:results is no table of this page."),
        ("projects/ect/README.md", "<!-- zoo:papers -->\n<!-- /zoo -->", "zoo:papers is no table of this page."),
        ("README.md", "<!-- zoo:papers -->\n", "marker without <!-- /zoo -->"),
    ],
)
def test_bad_markers_are_named(root, page, block, message, capsys):
    write_text(root / page, block)
    assert zoo.main([], root) == 2
    assert message in capsys.readouterr().err


def test_a_docstring_of_another_form_is_named(root, capsys):
    write_text(root / "projects/edm/__init__.py", '"""EDM."""\n')
    assert zoo.main([], root) == 2
    assert "projects/edm/__init__.py must begin with a docstring like 'ECT: Title" in capsys.readouterr().err


def test_the_tables_of_this_repository_are_up_to_date(capsys):
    assert zoo.main(["--check"], ROOT) == 0, capsys.readouterr().err


def test_every_project_and_experiment_says_what_it_is():
    for paper in zoo.projects(ROOT).values():
        assert paper.family != zoo.OTHER, f"projects/{paper.slug}/__init__.py names no family"
        assert zoo.not_covered(ROOT, paper.slug), f"projects/{paper.slug}/README.md does not say what is not covered"
    for experiment in zoo.experiments(ROOT):
        assert experiment["slug"], f"{experiment['name']} belongs to no project"
        assert experiment["what"], f"{experiment['name']}: the first comment line says what it is"
        assert experiment["command"] == f"python -m projects.run +experiment={experiment['name']}", experiment["name"]
