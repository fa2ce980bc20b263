"""Two processes (gloo, CPU) train as one process with the joint batch does, and either continues the other's run."""

import csv
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.training import checkpoint
from common.runtime.training.guard import Interrupted
from common.runtime.verbs import fit

REPO = Path(__file__).resolve().parent.parent
SMALL = (
    "project.net.model.width=16", "project.net.model.depth=1", "speed.threads=1", "plan.parameters=null",
    "trainer.log_every_n_steps=1", "callbacks.progress=null", "callbacks.pictures=null", "needs=null", "table=[]",
    "init.file=null", "evaluate.samples=101", "evaluate.batch_size=8", "evaluate.every_n_steps=null",
    "evaluate.floor=false", "data.batch_size=128", "schedule@project.schedule=constant",
)  # fmt: skip
# plain gradient descent: Adam's first steps are the sign of the gradient, which turns rounding into whole steps
PLAIN = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1.0e-3}
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def composed(folder: Path, experiment: str, *overrides: str):
    register_resolvers()
    quiet()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose("config", [
            f"+experiment={experiment}", *SMALL, "evaluate.extractors.digits=null", "run.experiment=ddp", "run.name=x",
            f"run.dir={folder}", f"paths.outputs={folder.parent}", f"paths.cache={folder.parent}/cache", *overrides,
        ])  # fmt: skip
    OmegaConf.update(cfg, "project.optimizer", PLAIN, merge=False)
    return cfg


class KeepGradients(Callback):
    """Writes what the optimiser is about to use: the gradient averaged over the processes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        grads = {n: p.grad.clone() for n, p in pl_module.named_parameters()}
        torch.save(grads, self.folder / f"grad-{trainer.global_step}-rank{trainer.global_rank}.pt")


def train(folder: Path, experiment: str, *overrides: str, extra: Callback | None = None) -> None:
    build = fit.build_trainer

    def build_watched(run):
        trainer, averages = build(run)
        trainer.callbacks.append(KeepGradients(folder))
        trainer.callbacks[:0] = [extra] if extra else []
        return trainer, averages

    fit.build_trainer = build_watched
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fit.fit_task(composed(folder, experiment, *overrides))
    finally:
        fit.build_trainer = build


def train_on_two(folder: Path, experiment: str, *overrides: str, extra: Callback | None = None) -> None:
    """Two forked children with the environment variables a launcher such as torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(
            LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = rank  # read from the environment at import, which the fork inherited
        try:
            train(folder, experiment, *TWO, *overrides, extra=extra)
        except Interrupted as stop:
            sys.exit(stop.exit_code)

    children = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
    codes = [child.exitcode for child in children]
    assert codes == [0, 0], codes


def rows(folder: Path) -> list[dict]:
    """The rows of the optimiser steps; row 0 is of the initial weights."""
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"] != "0"]


def newest(folder: Path) -> dict:
    return torch.load(checkpoint.list_checkpoints(folder / "checkpoints")[0], weights_only=True)


def assert_close(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """(experiment, processes) -> folder of 6 steps, made once."""
    root = tmp_path_factory.mktemp("ddp")
    torch.set_num_threads(1)
    made = {}
    for experiment in ("edm_tiny", "ect_tiny"):
        made[experiment, 1] = root / f"{experiment}-1"
        train(made[experiment, 1], experiment, "trainer.max_steps=6")
        made[experiment, 2] = root / f"{experiment}-2"
        train_on_two(made[experiment, 2], experiment, "trainer.max_steps=6")
    return made


@pytest.mark.parametrize("experiment", ["edm_tiny", "ect_tiny"])
def test_gradients_weights_and_losses_are_those_of_the_joint_batch(experiment, runs):
    one, two = runs[experiment, 1], runs[experiment, 2]
    for step in range(6):
        load = lambda folder, rank, step=step: torch.load(folder / f"grad-{step}-rank{rank}.pt", weights_only=True)
        joint, averaged = load(one, 0), load(two, 0)
        assert all(torch.equal(averaged[n], load(two, 1)[n]) for n in averaged), "both ranks hold the same gradient"
        assert max(float(g.abs().max()) for g in joint.values()) > 1e-3
        assert_close(averaged, joint)
    assert_close(newest(two)["state_dict"], newest(one)["state_dict"])
    assert_close(newest(two)["averages"]["ema"], newest(one)["averages"]["ema"])
    logged = [[float(row["train/loss"]) for row in rows(folder)] for folder in (one, two)]
    assert len(logged[0]) == 6 and logged[1] == pytest.approx(logged[0], rel=1e-5)


@pytest.mark.parametrize("experiment", ["edm_tiny", "ect_tiny"])
def test_metrics_are_those_of_one_process(experiment, runs):
    one, two = (json.loads((runs[experiment, n] / "result.json").read_text())["metrics"] for n in (1, 2))
    assert one.keys() == two.keys() and one
    for name in one:
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-3)  # some pixel rounds the other way
        assert two[name]["record"]["samples"] == one[name]["record"]["samples"] == 101


def test_a_checkpoint_of_two_processes_continues_on_one(runs, tmp_path):
    train_on_two(tmp_path / "run", "ect_tiny", "trainer.max_steps=3")
    train(tmp_path / "run", "ect_tiny", "trainer.max_steps=6")
    assert_close(newest(tmp_path / "run")["state_dict"], newest(runs["ect_tiny", 1])["state_dict"])
    assert newest(tmp_path / "run")["global_step"] == 6


def test_a_checkpoint_of_one_process_continues_on_two(runs, tmp_path):
    train(tmp_path / "run", "ect_tiny", "trainer.max_steps=3")
    train_on_two(tmp_path / "run", "ect_tiny", "trainer.max_steps=6")
    assert_close(newest(tmp_path / "run")["state_dict"], newest(runs["ect_tiny", 1])["state_dict"])
    logged = [[float(row["train/loss"]) for row in rows(folder)] for folder in (tmp_path / "run", runs["ect_tiny", 1])]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


class SignalFirst(Callback):
    """SIGTERM to this process after step 3; given to the first process alone."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 0:
            signal.raise_signal(signal.SIGTERM)


def test_processes_agree_to_stop_when_one_is_told(tmp_path, runs):
    with pytest.raises(AssertionError, match="143, 143"):
        train_on_two(tmp_path / "run", "ect_tiny", "trainer.max_steps=6", extra=SignalFirst())
    assert newest(tmp_path / "run")["global_step"] == 3
    train_on_two(tmp_path / "run", "ect_tiny", "trainer.max_steps=6")
    for name, tensor in newest(tmp_path / "run")["state_dict"].items():
        assert torch.equal(tensor, newest(runs["ect_tiny", 2])["state_dict"][name]), "two processes resume exactly"


def test_the_documented_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "projects.run", "+experiment=ect_tiny", *SMALL, *TWO, "trainer.max_steps=3",
         f"run.dir={tmp_path}/run", f"paths.outputs={tmp_path}", f"paths.cache={tmp_path}/cache", "evaluate=none"],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path / "run")["global_step"] == 3 and len(rows(tmp_path / "run")) == 3
    assert done.stdout.count("run folder:") == 1, "one process speaks"
    assert (tmp_path / "run/export/model.safetensors").is_file()
