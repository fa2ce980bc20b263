"""The tables in README and cards come from the tree, and stale ones are found."""

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


@pytest.fixture
def root(tmp_path) -> Path:
    write_text(tmp_path / "projects/__init__.py", "")
    write_text(tmp_path / "projects/ect/__init__.py", '"""ECT: tuning (ICLR 2025), arXiv 2406.14548.\n\nMore.\n"""\n')
    write_text(tmp_path / "projects/edm/__init__.py", '"""EDM: design space (NeurIPS 2022), arXiv 2206.00364."""\n')
    write_text(
        tmp_path / "conf/experiment/ect_toy.yaml",
        "# @package _global_\n# ECT on toys: FD 3\n# python -m projects.run +experiment=ect_toy\n# One minute.\n"
        "a: 1  # not this\npublished: [{metric: test/fid, value: 3.86, source: README}]\n",
    )
    write_text(tmp_path / "conf/experiment/edm_toy.yaml", "# @package _global_\n# The teacher\na: 1\n")
    write_json(tmp_path / "projects/ect/results.json", {"slug": "ect", "records": [{"old": 1}, RECORD]})
    write_text(
        tmp_path / "README.md",
        "Title\n\n<!-- zoo:papers -->old<!-- /zoo -->\n\nkept\n\n"
        "<!-- zoo:experiments -->\n<!-- /zoo -->\n"
        "<!-- zoo:results -->\n<!-- /zoo -->\nend\n",
    )
    write_text(
        tmp_path / "projects/edm/README.md",
        "# EDM\n<!-- zoo:results -->\n<!-- /zoo -->\n<!-- zoo:experiments -->\n<!-- /zoo -->\n",
    )
    return tmp_path


def test_readme_holds_papers_experiments_and_the_newest_record(root, capsys):
    assert zoo.main([], root) == 0
    assert "rendered README.md" in capsys.readouterr().out
    text = (root / "README.md").read_text()
    assert text.startswith("Title\n\n<!-- zoo:papers -->\n") and "\nkept\n" in text and text.endswith("end\n")
    assert "| `ect` | ECT: tuning (ICLR 2025), arXiv 2406.14548. | 1 | 0 of 1 relations held |" in text
    assert "| [edm](projects/edm/README.md) | EDM: design space (NeurIPS 2022), arXiv 2206.00364. | 1 | - |" in text
    assert "| `ect_toy` | ECT on toys: FD 3 | One minute. |" in text
    assert "| `tuned` | tuned \\| one step | FD-digits | 4000 | 5.5 ± 0.5 |" in text
    assert "| 50 x better | b >= 50 x a | 54.5 | 1 of 2 | **failed** |" in text
    assert "| `ect_toy` | test/fid | 3.86 | README |" in text and "commit 0123456789, 2026-01-02" in text


def test_a_card_holds_its_own_project_only(root):
    zoo.main([], root)
    card = (root / "projects/edm/README.md").read_text()
    assert "(nothing recorded)" in card and "edm_toy" in card and "ect_toy" not in card


def test_check_finds_stale_tables_and_changes_nothing(root, capsys):
    before = (root / "README.md").read_text()
    assert zoo.main(["--check"], root) == 1
    assert "README.md is out of date" in capsys.readouterr().err and (root / "README.md").read_text() == before
    assert zoo.main([], root) == 0 and zoo.main(["--check"], root) == 0
    write_json(root / "projects/ect/results.json", {"slug": "ect", "records": [{**RECORD, "dirty": True}]})
    assert zoo.main(["--check"], root) == 1


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("<!-- zoo:result -->\n<!-- /zoo -->", "zoo:result is no table. Closest: results."),
        ("<!-- zoo:results -->\n", "marker without <!-- /zoo -->"),
    ],
)
def test_bad_markers_are_named(root, block, message, capsys):
    write_text(root / "README.md", block)
    assert zoo.main([], root) == 2
    assert message in capsys.readouterr().err


def test_the_tables_of_this_repository_are_up_to_date(capsys):
    assert zoo.main(["--check"], ROOT) == 0, capsys.readouterr().err


def test_every_project_and_experiment_says_what_it_is():
    assert all(title for title in zoo.projects(ROOT).values())
    for experiment in zoo.experiments(ROOT):
        assert experiment["slug"], f"{experiment['name']} belongs to no project"
        assert experiment["what"], f"{experiment['name']}: the first comment line says what it is"
        assert experiment["command"] == f"python -m projects.run +experiment={experiment['name']}", experiment["name"]
