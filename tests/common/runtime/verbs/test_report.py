"""result.json, tables and curves: what is written can be read back, and odd input does not break a run's end."""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.runtime.training import figures
from common.runtime.verbs import report


@dataclass
class Measured:
    name: str
    value: float


def test_result_round_trip(tmp_path):
    path = report.write_result(
        tmp_path / "run",
        experiment="toy",
        task="fit",
        overrides=["+experiment=toy"],
        seed=3,
        step=20,
        wall_time_s=1.25,
        metrics={
            "test/fd": Measured("FD", 2.5),
            "test/loss": 0.5,
            "test/nan": float("nan"),
            "test/is": {"value": 3, "record": {"name": "IS"}},
        },
    )
    assert path == tmp_path / "run/result.json"
    result = report.read_result(tmp_path / "run")
    assert result["metrics"]["test/fd"] == {"value": 2.5, "record": {"name": "FD", "value": 2.5}}
    assert result["metrics"]["test/loss"] == {"value": 0.5, "record": None}
    assert result["metrics"]["test/nan"]["value"] is None and "NaN" not in path.read_text()
    assert result["metrics"]["test/is"]["record"] == {"name": "IS"}
    keys = {
        "experiment",
        "task",
        "overrides",
        "seed",
        "step",
        "commit",
        "dirty",
        "hardware",
        "versions",
        "wall_time_s",
        "objective",
        "metrics",
        "run_dir",
    }
    assert set(result) == keys and result["objective"] is None and not Path(result["run_dir"]).is_absolute()


def test_unfinished_and_broken_results_read_as_none(tmp_path):
    assert report.read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"metrics": {"a"')
    assert report.read_result(tmp_path) is None


def test_dirty_means_changed_code_not_changed_results(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "common").mkdir()
    (tmp_path / "projects").mkdir()
    (tmp_path / "common/a.py").write_text("a = 1\n")
    git("add", "."), git("commit", "-m", "a")
    commit, dirty = report.source_state(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "projects/results.json").write_text("{}")
    (tmp_path / "notes.md").write_text("x")
    git("add", ".")
    assert not report.source_state(tmp_path)[1]
    (tmp_path / "common/a.py").write_text("a = 2\n")
    assert report.source_state(tmp_path)[1]
    assert report.source_state(tmp_path / "nowhere") == ("unknown", False)


def test_environment_names_this_machine():
    found = report.environment()
    assert set(found) == {"commit", "dirty", "hardware", "versions"}
    assert "core" in found["hardware"] and found["versions"]["python"].startswith("3.")


def test_comparison_table_is_printed_and_written(tmp_path, capsys):
    rows = [
        {"label": "teacher | 1 step", "FD": 1234.5678, "steps": 100},
        {"label": "ECT", "FD": None, "wall_time_s": 3.5},
    ]
    paths = report.comparison_table(rows, tmp_path, title="End [bold]")
    assert [path.name for path in paths] == ["comparison.csv", "comparison.md"]
    with open(paths[0], newline="") as file:
        read = list(csv.DictReader(file))
    assert read[0]["FD"] == "1234.5678" and read[1]["steps"] == ""
    assert "| teacher \\| 1 step | 1235 | 100 | - |" in paths[1].read_text()
    printed = capsys.readouterr().out
    assert "End [bold]" in printed and "teacher | 1 step" in printed and "wall_time_s" in printed


def test_tables_do_not_fold_in_logs(tmp_path):
    with open(tmp_path / "log", "w") as file:
        report.print_table("t", [{f"column_{i}": "x" * 12 for i in range(9)}], console=Console(file=file, width=40))
    assert "column_8" in (tmp_path / "log").read_text()


def test_curves_are_read_from_sparse_and_resumed_files(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,epoch,train/loss,val/fd_digits_1step,val/word\n0,0,3.0,,x\n10,0,,50.0,\n10,0,2.0,,\n"
        "20,0,1.5,nan,\n10,0,2.5,,\n30,0,inf,5.0,\n,0,9.0,,\n40,0,1.0\n"
    )
    curves = figures.read_curves(path)
    assert curves == {
        "train/loss": ([0, 10, 20, 40], [3.0, 2.5, 1.5, 1.0]),
        "val/fd_digits_1step": ([10, 30], [50.0, 5.0]),
    }
    written = figures.plot_curves(path, tmp_path / "pictures")
    assert [p.name for p in written] == ["loss.png", "fd.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in written)


def test_running_mean_looks_back_only():
    assert figures.running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_curves_of_runs_without_them(tmp_path):
    assert figures.plot_curves(tmp_path / "none.csv", tmp_path) == []
    (tmp_path / "metrics.csv").write_text("step,perf/images_per_s\n1,2.0\n")
    assert figures.plot_curves(tmp_path / "metrics.csv", tmp_path) == []


def test_epoch_means_are_not_drawn_beside_the_steps(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss_step,train/loss_epoch,val/loss_epoch\n1,2.0,,\n2,1.0,1.5,3.0\n"
    )
    drawn = {}
    monkeypatch.setattr(figures, "plot_lines", lambda lines, path, **_: drawn.update(lines))
    figures.plot_curves(tmp_path / "metrics.csv", tmp_path)
    assert sorted(drawn) == ["train/loss_step", "val/loss_epoch"]


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([1.0, 100.0], True), ([1.0, 20.0], False), ([0.0, 100.0], False), ([-1.0, 100.0], False), ([], False)],
)
def test_wide_positive_ranges_get_a_logarithmic_axis(values, logarithmic):
    assert figures.wide(values) is logarithmic


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.none() | st.integers() | st.floats() | st.text(max_size=6)),
        max_size=4,
    )
)
def test_any_rows_make_a_table(rows):
    text = report.markdown_table(rows)
    assert text.endswith("\n") and len({line.replace("\\|", "").count("|") for line in text.splitlines()}) <= 1


def test_report_is_light_and_json_is_strict(tmp_path):
    code = "import sys, common.runtime.verbs.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4]
    )
    assert run.stdout.strip() == "[]"
    path = report.write_result(
        tmp_path,
        experiment="e",
        task="fit",
        overrides=[],
        seed=0,
        step=0,
        wall_time_s=0,
        metrics={"a": float("inf")},
        objective=float("nan"),
    )
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_distances_of_different_features_have_an_axis_each_and_the_end_is_explained(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text(
        "step,val/fd_digits_one_step,val/fd_digits_floor,test/fd_digits_one_step,val/fd_pixels_one_step,val/fd_plain\n"
        "1,300.0,,,0.5,\n2,200.0,20.0,190.0,0.4,1.0\n"
    )
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    figures.plot_curves(tmp_path / "metrics.csv", tmp_path)
    digits, pixels, plain = drawn[0].axes
    assert "digits" in digits.get_ylabel() and "pixels" in pixels.get_ylabel() and "plain" in plain.get_ylabel()
    assert [text.get_text() for text in digits.get_legend().get_texts()] == [
        "fd_digits_one_step",
        "fd_digits, real images against real images",
        "fd_digits_one_step, at the end, all samples",
    ]  # fmt: skip
    assert max(pixels.get_lines()[0].get_ydata()) == 0.5
