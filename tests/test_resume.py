"""Exact restart: a run that was stopped, killed or damaged ends with the same bits as one that was left alone."""

import csv
import errno
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from common.errors import UserError
from common.runtime import checkpoint, fit
from common.runtime.guard import Interrupted
from common.runtime.launch import open_sections, quiet, register_resolvers

REPO = Path(__file__).resolve().parent.parent
MLP = ("project.net.model.width=16", "project.net.model.depth=1", "speed.threads=1", "plan.parameters=null")
AVERAGES = (
    "+ema.profiles.half={_target_: common.diffusion.ema.HalfLife, images: 400, ramp: 0.5}",
    "+ema.profiles.power={_target_: common.diffusion.ema.PowerFunction, std: 0.1}",
)
EDM = (
    "+experiment=edm_tiny", *MLP, "project.net.model.dropout=0.2", "project.net.model.augment_dim=9",
    "+project.augment._target_=common.data.augment.EdmAugment", "schedule@project.schedule=ramp",
    "sampler.steps=3", "evaluate.samplers.heun.steps=2",
)  # fmt: skip
ECT = (
    "+experiment=ect_tiny", *MLP, "init.file=null", "needs=null", "table=[]", "project.net.model.dropout=0.2",
    "project.steps_per_stage=4",
)  # fmt: skip
RECIPES = {"edm": tuple(o for o in EDM if not o.startswith("sampler.")), "ect": ECT}
# A point of the curve and a picture between the checkpoints, so that neither may move a random stream.
WATCHED = (
    "evaluate.every_n_steps=3", "evaluate.curve_samples=8", "evaluate.samples=8", "evaluate.batch_size=8",
    "evaluate.floor=false", "evaluate.extractors.digits=null", "callbacks.pictures.every_n_steps=4",
    "callbacks.pictures.samples=2", "callbacks.progress=null", "trainer.log_every_n_steps=1",
)  # fmt: skip


def composed(folder: Path, recipe: str, *overrides: str):
    register_resolvers()
    quiet()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return compose("config", [
            *RECIPES[recipe], *AVERAGES, *WATCHED, "run.experiment=resume", "run.name=x", f"run.dir={folder}",
            f"paths.outputs={folder.parent}", f"paths.cache={folder.parent}/cache", *overrides,
        ])  # fmt: skip


class Leave(Callback):
    """Sends this process a signal, or raises, when `step` optimiser steps are done."""

    def __init__(self, step: int, how):
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            if isinstance(self.how, signal.Signals):
                signal.raise_signal(self.how)
            else:
                raise self.how


@contextmanager
def leaving(step: int, how):
    """Runs of `fit_task` inside the block are told to leave after `step`."""
    build = fit.build_trainer

    def build_leaving(run):
        trainer, averages = build(run)
        trainer.callbacks.insert(0, Leave(step, how))
        return trainer, averages

    fit.build_trainer = build_leaving
    try:
        yield
    finally:
        fit.build_trainer = build


def rows(folder: Path) -> list[dict]:
    """metrics.csv without the wall clock."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(file)]


def newest(folder: Path) -> dict:
    return torch.load(checkpoint.list_checkpoints(folder / "checkpoints")[0], weights_only=True)


def assert_equal(a, b, where="checkpoint") -> None:
    """Equal bit for bit, containers and all."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(straight: Path, other: Path) -> None:
    one, two = newest(straight), newest(other)
    assert one["global_step"] == 20 and len(one["averages"]) == 3 and one["optimizer_states"][0]["state"]
    assert_equal(one, two)
    assert rows(straight) == rows(other)
    assert len(rows(straight)) == 20
    pictures = [sorted(p.name for p in (f / "pictures").glob("step-*.png")) for f in (straight, other)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 5
    for name in pictures[0]:
        assert (straight / "pictures" / name).read_bytes() == (other / "pictures" / name).read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(recipe, overrides) -> folder of 20 uninterrupted steps; made once each."""
    made: dict = {}

    def run(recipe: str, *overrides: str) -> Path:
        if (recipe, overrides) not in made:
            folder = tmp_path_factory.mktemp("straight") / "run"
            torch.set_num_threads(1)
            fit.fit_task(composed(folder, recipe, "trainer.max_steps=20", *overrides))
            made[recipe, overrides] = folder
        return made[recipe, overrides]

    return run


# 1,400 digits: at batch 128 step 11 crosses the end of the first pass over the data, at batch 64 everything is within it
@pytest.mark.parametrize("overrides", [
    pytest.param(("data.num_workers=0",), id="across_the_epoch_end"),
    pytest.param(("data.num_workers=0", "data.batch_size=64"), id="mid_epoch"),
    pytest.param(("data.num_workers=0", "trainer.accumulate_grad_batches=2"), id="accumulated"),
    pytest.param(("data.num_workers=2", "data.batch_size=100"), id="two_workers"),
])  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_13_and_7_steps_are_20_steps_bit_for_bit(recipe, overrides, straight, tmp_path):
    folder = tmp_path / "run"
    whole = straight(recipe, *overrides)
    with leaving(13, signal.SIGTERM), pytest.raises(Interrupted):
        fit.fit_task(composed(folder, recipe, "trainer.max_steps=20", *overrides))
    assert newest(folder)["global_step"] == 13
    fit.fit_task(composed(folder, recipe, "trainer.max_steps=20", *overrides))
    assert_same_run(whole, folder)
