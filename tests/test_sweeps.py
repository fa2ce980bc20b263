"""Sweeps of the real entry, with each launcher and sweeper, end in one table and one plot; loggers by one word.

The launchers with a toy program, and failing jobs: tests/common/runtime/test_sweep.py.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
QUICK = (
    "+experiment=edm_tiny", "evaluate=none", "callbacks.pictures=null", "callbacks.progress=null", "speed.threads=1",
    "project.net.model.width=16", "trainer.max_steps=3",
)  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "ONESTEP_OUTPUTS": str(folder / "outputs"), "ONESTEP_CACHE": str(folder / "cache"),
    }  # fmt: skip


@pytest.fixture
def run(tmp_path, forked_command):
    """run(*words, fresh=False) -> (stdout, stderr) of the command, in a fork or in an interpreter of its own."""

    def go(*words: str, fresh: bool = False) -> tuple[str, str]:
        words = (*QUICK, *words)
        if fresh:
            done = subprocess.run(
                [sys.executable, "-m", "projects.run", *words], cwd=tmp_path, capture_output=True, text=True,
                env={**os.environ, **environment(tmp_path)}, timeout=240,
            )  # fmt: skip
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            child = forked_command(words, tmp_path, **environment(tmp_path))
            child.join(240)
            code, out, err = child.exitcode, *((tmp_path / f"{n}.txt").read_text() for n in ("stdout", "stderr"))
        assert code == 0, out + err
        return out, err

    return go


@pytest.mark.slow
@pytest.mark.parametrize(("words", "fresh"), [
    pytest.param(("project.optimizer.lr=1e-3,1e-4",), False, id="basic"),
    pytest.param(("hydra/launcher=parallel", "project.optimizer.lr=1e-3,1e-4"), True, id="joblib"),
    pytest.param(("hydra/launcher=submit_local", "project.optimizer.lr=1e-3,1e-4"), False, id="submitit"),
    pytest.param(("hydra/sweeper=search", "hydra.sweeper.n_trials=2",
                  "project.optimizer.lr=tag(log,interval(1e-4,1e-2))"), False, id="optuna"),
])  # fmt: skip
def test_two_runs_one_table_one_plot(words, fresh, run, tmp_path):
    out, _ = run(*words, "-m", fresh=fresh)
    (table,) = tmp_path.rglob("table.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "3"]
    rates = [float(row["project.optimizer.lr"]) for row in rows]
    losses = [float(row["objective"]) for row in rows]
    assert len(set(rates)) == 2 and all(loss > 0 for loss in losses)
    assert "error" not in rows[0], "the column is there only when a job failed"
    assert (table.parent / "table.png").read_bytes()[:4] == b"\x89PNG" and (table.parent / "table.md").is_file()
    assert out.count("Sweep of 2 jobs") == 1 and str(table.parent / "table.png") in out
    for number in ("0", "1"):
        assert (table.parent / number / "checkpoints/step-00000003.ckpt").is_file(), "each job has its own run folder"
        assert (table.parent / number / "result.json").is_file()


@pytest.mark.slow
def test_tensorboard_and_wandb_offline_in_a_real_run(run, tmp_path):
    _, err = run("logger=many", f"run.dir={tmp_path}/run", "trainer.log_every_n_steps=1")
    events = list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
    assert sum(p.stat().st_size for p in events) > 100
    (logged,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert logged.stat().st_size > 500
    assert b"train/loss" in b"".join(p.read_bytes() for p in events)
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_killed(run, tmp_path):
    """The same command again: the finished job is left as it is, the other one trained."""
    words = ("project.optimizer.lr=1e-3,1e-4", "-m")
    run(*words)
    (folder,) = (tmp_path / "outputs/multirun/edm_tiny").iterdir()
    finished = (folder / "0/result.json").read_bytes()
    (folder / "1/result.json").unlink()
    out, _ = run(*words)
    assert "[1 of 2] lr=0.001\nfinished: edm_tiny has trained 3 of 3 steps" in out
    assert "[2 of 2] lr=0.0001\ncontinuing step-00000003.ckpt" in out
    assert (folder / "0/result.json").read_bytes() == finished and (folder / "1/result.json").is_file()
    assert [path.name for path in (tmp_path / "outputs/multirun/edm_tiny").iterdir()] == [folder.name]
