"""Sweeps end in one table and one plot, with each launcher and sweeper, also when a job fails."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.files import write_json, write_text
from common.runtime.cli import sweep

ROOT = Path(__file__).parents[4]

APP = """
import sys
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from common.runtime.verbs.report import write_result

@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg):
    if cfg.x == 13:
        raise ValueError("thirteen is not allowed\\nsecond line")
    value = (cfg.x - 2.0) ** 2 + 0.5
    write_result(HydraConfig.get().runtime.output_dir, experiment="toy", task="fit",
                 overrides=list(HydraConfig.get().overrides.task), seed=0, step=10, wall_time_s=1.5,
                 metrics={"test/fd": value}, objective=value)
    return value

main()
"""
CONFIG = """
defaults: [_self_]
x: 1
name: a
hydra:
  sweep: {dir: swept, subdir: '${hydra.job.num}'}
  callbacks: {sweep_table: {_target_: common.runtime.cli.sweep.SweepTable}}
"""


@pytest.fixture
def app(tmp_path) -> Path:
    write_text(tmp_path / "app.py", APP)
    write_text(tmp_path / "conf/config.yaml", CONFIG)
    for path in sorted((ROOT / "conf/hydra").glob("*/*.yaml")):  # the launchers and sweepers we ship
        write_text(tmp_path / "conf/hydra" / path.parent.name / path.name, path.read_text())
    return tmp_path


def run(app: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "app.py", "-m", *arguments], cwd=app, env=env, capture_output=True, text=True, timeout=120
    )


def rows_of(app: Path) -> list[dict]:
    with open(app / "swept/table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("launcher", ["basic", "parallel", "submit_local"])
def test_every_launcher_ends_in_one_table_and_one_plot(app, launcher):
    done = run(app, "x=1,4", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    assert [(row["x"], row["objective"], row["test/fd"]) for row in rows_of(app)] == [
        ("1", "1.5", "1.5"),
        ("4", "4.5", "4.5"),
    ]
    assert (app / "swept/table.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 1 | 4 | 4.5 |" in (app / "swept/table.md").read_text()
    assert done.stdout.count("Sweep of 2 jobs") == 1
    assert str(app / "swept/table.csv") in done.stdout


def test_optuna_minimises_the_objective_and_lists_its_trials(app):
    done = run(app, "hydra/sweeper=search", "hydra.sweeper.n_trials=3", "x=interval(0.0,4.0)")
    assert done.returncode == 0, done.stderr
    rows = rows_of(app)
    assert len(rows) == 3 and all(float(r["objective"]) == pytest.approx((float(r["x"]) - 2) ** 2 + 0.5) for r in rows)


def test_a_failed_job_keeps_its_row_with_the_error(app):
    done = run(app, "x=1,13")
    assert done.returncode != 0
    good, bad = rows_of(app)
    assert good["objective"] == "1.5" and good["error"] == ""
    assert bad["objective"] == "" and bad["error"] == "ValueError: thirteen is not allowed"
    assert "Sweep of 2 jobs, 1 failed" in done.stdout
    assert "job 1 failed: ValueError: thirteen is not allowed" in done.stdout


def job(folder: Path, number: int, overrides: list[str], value: float | None) -> None:
    write_text(folder / str(number) / ".hydra/overrides.yaml", "".join(f"- {text}\n" for text in overrides))
    if value is not None:
        write_json(
            folder / str(number) / "result.json",
            {
                "objective": None,
                "metrics": {"test/fd": {"value": value, "record": None}},
                "step": 5,
                "wall_time_s": 2.0,
            },
        )


def test_jobs_are_read_in_order_and_the_swept_keys_found(tmp_path):
    for number in range(11):
        job(tmp_path, number, ["+experiment=toy", f"project.q={number}", "seed=1"], float(number))
    job(tmp_path, 11, ["+experiment=toy", "project.q=99", "seed=1"], None)
    jobs = sweep.read_jobs(tmp_path)
    assert [j["job"] for j in jobs] == [str(n) for n in range(12)]
    assert sweep.swept_keys(jobs) == ["project.q"]
    rows = sweep.table_rows(jobs)
    assert rows[10]["test/fd"] == 10.0 and rows[10]["error"] is None and "objective" not in rows[10]
    assert rows[11]["test/fd"] is None and "stopped before it finished" in rows[11]["error"]
    assert sweep.read_jobs(tmp_path, since=4e9) == []


def test_published_numbers_stand_beside_the_jobs_that_have_all_their_overrides(tmp_path):
    """Numbers are compared as numbers; a list's commas part no overrides; the number is never the sweep's metric."""
    published = {"a.p=1.0, a.q=0": 61.06, "a.p=0": 7.0, "a.times=[t,r]": 5.0, "a.whole=true": 4.0}
    for number, words in enumerate((["a.p=1", "a.q=0.0"], ["a.p=0.0", "a.q=3"], ["a.p=1", "a.q=1"],
                                    ["a.p=2", "a.times=[t,r]"], ["a.p=2", "a.whole=True"])):  # fmt: skip
        job(tmp_path, number, words, float(number))
    rows = sweep.table_rows(sweep.read_jobs(tmp_path), published)
    assert [row["published"] for row in rows] == [61.06, 7.0, None, 5.0, 4.0]
    assert sweep._metric_name(rows) == "test/fd"
    assert "published" not in sweep.table_rows(sweep.read_jobs(tmp_path))[0]


def test_the_terminal_shows_the_last_word_of_a_key_where_that_is_enough():
    keys = {"a.b.q": 1, "distribution@a.base": "uniform", "c.steps": 2, "d.steps": 3, "test/fd": 1.5}
    (shown,) = sweep._shown([{"job": "0", **keys}])
    assert shown == {"job": "0", "q": 1, "distribution": "uniform", "c.steps": 2, "d.steps": 3, "test/fd": 1.5}


@pytest.mark.parametrize(
    ("sweep_of", "axis"),
    [
        ([["a.q=1", "seed=1"], ["a.q=1", "seed=2"], ["a.q=100", "seed=1"], ["a.q=100", "seed=2"]], "a.q"),
        ([["net=small"], ["net=large"]], "net"),
        ([["net=small", "q=1"], ["net=small", "q=2"], ["net=large", "q=1"], ["net=large", "q=2"]], "q"),
        ([["seed=1"], ["seed=2"]], "seed"),
        ([[], []], None),
    ],
)
def test_the_plot_chooses_its_axis(tmp_path, sweep_of, axis):
    for number, overrides in enumerate(sweep_of):
        job(tmp_path, number, overrides, 10.0**number)
    jobs = sweep.read_jobs(tmp_path)
    rows, keys = sweep.table_rows(jobs), sweep.swept_keys(jobs)
    assert sweep._axis(rows, keys) == axis
    assert sweep.plot(rows, keys, tmp_path / "table.png") and (tmp_path / "table.png").stat().st_size > 5000


def test_the_objective_goes_by_the_name_of_its_metric():
    assert sweep._metric_name([{"a/loss": 2.0, "b/fd": 1.0, "objective": 1.0}]) == "b/fd"
    assert sweep._metric_name([{"a/loss": 2.0, "objective": 1.0}]) == "objective"
    assert sweep._metric_name([{"job": "0", "a/loss": 2.0}]) == "a/loss"


def test_no_number_no_plot(tmp_path):
    job(tmp_path, 0, ["x=1"], None)
    jobs = sweep.read_jobs(tmp_path)
    assert not sweep.plot(sweep.table_rows(jobs), [], tmp_path / "table.png")


def swept(*task: str, params: dict | None = None, number: int = 0, folder=".", **sweeper):
    return OmegaConf.create({"hydra": {
        "overrides": {"task": list(task)}, "sweeper": {"params": params, **sweeper}, "job": {"num": number},
        "sweep": {"dir": str(folder)},
    }})  # fmt: skip


@pytest.mark.parametrize(("config", "jobs", "keys"), [
    (swept("+experiment=e", "a.lr=1e-3,1e-4", "seed=0,1,2"), 6, ["a.lr", "seed"]),
    (swept("+experiment=e", "x=choice(1,2,3)", "y=range(0,4)"), 12, ["x", "y"]),
    (swept("+sweep=s", params={"net@a.net": "one,two", "fixed": "1"}), 2, ["net@a.net"]),
    (swept("+experiment=glob(*_tiny)"), None, ["experiment"]),
    (swept("x=interval(0,1)", n_trials=5), 5, ["x"]),
])  # fmt: skip
def test_jobs_are_counted_before_they_run(config, jobs, keys):
    assert sweep.planned_jobs(config) == {"jobs": jobs, "swept": keys}


def test_a_job_is_headed_by_what_sets_it_apart(tmp_path):
    config = swept("+experiment=e", "a.lr=0.01", "seed=2", number=2, folder=tmp_path)
    assert sweep.job_heading(config) == "[3]"
    write_json(tmp_path / sweep.PLAN, {"jobs": 8, "swept": ["a.lr", "seed"]})
    assert sweep.job_heading(config) == "[3 of 8] lr=0.01, seed=2"


def test_the_smallest_objective_is_marked():
    rows = [{"job": str(n), "objective": value} for n, value in enumerate((2.0, 0.5, None, 1.0))]
    assert [row["best"] for row in sweep._shown(rows)] == ["", "*", "", ""]
    assert "best" not in sweep._shown(rows[:1])[0], "of one job none is the best"
