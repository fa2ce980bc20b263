"""Exact restart: a run that was stopped, killed or damaged ends with the same bits as one that was left alone."""

import csv
import errno
import gc
import multiprocessing
import os
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from common.errors import UserError
from common.runtime.cli.launch import quiet, register_resolvers
from common.runtime.training import checkpoint
from common.runtime.training.guard import Interrupted
from common.runtime.verbs import fit

REPO = Path(__file__).resolve().parent.parent
MLP = (
    "project.net.model.width=16", "project.net.model.depth=1", "speed.threads=1", "plan.parameters=null",
    "data.batch_size=128", "ema.profiles.ema.decay=0.999", "project.optimizer.lr=3e-4",
)  # fmt: skip
AVERAGES = (
    "+ema.profiles.half={_target_: common.diffusion.ema.HalfLife, images: 400, ramp: 0.5}",
    "+ema.profiles.power={_target_: common.diffusion.ema.PowerFunction, std: 0.1}",
)
EDM = (
    "+experiment=edm_tiny", *MLP, "project.net.model.dropout=0.2", "project.net.model.augment_dim=9",
    "+project.augment._target_=common.data.images.augment.EdmAugment", "schedule@project.schedule=ramp",
    "evaluate.samplers.heun.steps=2",
)  # fmt: skip
ECT = (
    "+experiment=ect_tiny", *MLP, "init.file=null", "needs=null", "table=[]", "project.net.model.dropout=0.2",
    "project.loss.q=2", "project.stages=8", "project.steps_per_stage=4", "schedule@project.schedule=constant",
)  # fmt: skip
RECIPES = {"edm": EDM, "ect": ECT}
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
    assert [row["step"] for row in rows(straight)] == [str(n) for n in range(21)], "0: the initial weights"
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


# 1,400 digits: at batch 128 step 11 crosses the end of the first pass over the data; at batch 64 all is within it
@pytest.mark.parametrize("overrides", [
    pytest.param((), id="across_the_epoch_end"),
    pytest.param(("data.batch_size=64",), id="mid_epoch"),
    pytest.param(("trainer.accumulate_grad_batches=2",), id="accumulated"),
    pytest.param(("data.num_workers=2", "data.batch_size=100"), id="two_workers"),
])  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_13_and_7_steps_are_20_steps_bit_for_bit(recipe, overrides, straight, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # else workers idle 5 s before they go
    folder = tmp_path / "run"
    whole = straight(recipe, *overrides)
    with leaving(13, signal.SIGTERM), pytest.raises(Interrupted):
        fit.fit_task(composed(folder, recipe, "trainer.max_steps=20", *overrides))
    assert newest(folder)["global_step"] == 13
    fit.fit_task(composed(folder, recipe, "trainer.max_steps=20", *overrides))
    assert_same_run(whole, folder)
    gc.collect()  # ends the workers of the interrupted half here, at the short interval


def test_a_stop_at_the_last_step_leaves_only_the_ending_to_do(straight, tmp_path):
    folder = tmp_path / "run"
    whole = straight("ect", *OFTEN)
    with leaving(20, signal.SIGINT), pytest.raises(Interrupted) as stop:
        fit.fit_task(composed(folder, "ect", *KILLED))
    assert stop.value.exit_code == 130 and not (folder / "result.json").exists()
    fit.fit_task(composed(folder, "ect", *KILLED))
    assert_same_run(whole, folder)
    assert (folder / "result.json").is_file()
    assert (whole / "export/model.safetensors").read_bytes() == (folder / "export/model.safetensors").read_bytes()


@pytest.mark.parametrize("overrides", [(), ("trainer.accumulate_grad_batches=2",)], ids=["plain", "accumulated"])
def test_a_finished_run_goes_on_when_it_is_given_more_steps(overrides, straight, tmp_path):
    folder = tmp_path / "run"
    for steps in (13, 20):
        fit.fit_task(composed(folder, "edm", f"trainer.max_steps={steps}", *overrides))
    one, two = newest(straight("edm", *overrides)), newest(folder)
    for part in ("state_dict", "averages", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(one[part], two[part], part)
    assert [r["train/loss"] for r in rows(straight("edm", *overrides))] == [r["train/loss"] for r in rows(folder)]


def test_the_stage_and_the_schedule_follow_the_step(straight):
    logged = [float(row["train/stage"]) for row in rows(straight("ect", *OFTEN))[1:]]
    assert logged == [float(step // 4) for step in range(20)]
    schedule = newest(straight("edm", "data.batch_size=64"))["lr_schedulers"][0]
    assert schedule["last_epoch"] == 20


# kill -9 --------------------------------------------------------------------------------------------------------------

OFTEN = ("callbacks.checkpoints.every_n_steps=5",)
KILLED = ("trainer.max_steps=20", *OFTEN)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            die()


def in_child(work) -> int:
    """Exit status of a forked child that runs `work()`; -9 when it was killed."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def fit_and_die(folder: Path, recipe: str, before) -> None:
    """Fits in a child that `before()` has told how to die, until it is dead."""

    def work():
        before()
        fit.fit_task(composed(folder, recipe, *KILLED))

    assert in_child(work) == -signal.SIGKILL


def watch_with(callback: Callback) -> None:
    """Adds a callback to every run of this process; for forked children, since nothing takes it back."""
    build = fit.build_trainer

    def build_watched(run):
        trainer, averages = build(run)
        trainer.callbacks.append(callback)
        return trainer, averages

    fit.build_trainer = build_watched


def kill_before_step(step: int):
    return lambda: watch_with(Kill(step))


@pytest.mark.parametrize("step", [3, 5, 12, 19])
def test_kill_9_between_two_steps_and_the_same_command_again(step, straight, tmp_path):
    folder = tmp_path / "run"
    fit_and_die(folder, "ect", kill_before_step(step))
    found = [int(p.stem[5:]) for p in checkpoint.list_checkpoints(folder / "checkpoints")]
    assert found == {3: [], 5: [5], 12: [10, 5], 19: [15, 10]}[step]
    fit.fit_task(composed(folder, "ect", *KILLED))
    assert_same_run(straight("ect", *OFTEN), folder)


def half_of_the_data():
    save = torch.save

    def half(content, file):
        if content["global_step"] < 10:
            return save(content, file)
        save(content, file)
        file.flush()
        file.truncate(file.tell() // 2)
        die()

    torch.save = half


def before_the_file_moves_into_place(suffix: str):
    def before():
        replace = os.replace

        def stop(source, target):
            if Path(target).name == f"step-00000010.ckpt{suffix}":
                die()
            replace(source, target)

        os.replace = stop

    return before


def after_the_file_moved():
    checkpoint.SafeCheckpointIO.remove_checkpoint = lambda self, path: die()


@pytest.mark.parametrize("how", [
    pytest.param(half_of_the_data, id="half_of_the_data"),
    pytest.param(before_the_file_moves_into_place(".sha256"), id="before_the_checksum"),
    pytest.param(before_the_file_moves_into_place(""), id="before_the_rename"),
    pytest.param(after_the_file_moved, id="before_old_ones_go"),
])  # fmt: skip
def test_kill_9_during_a_checkpoint_write(how, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    fit_and_die(folder, "ect", how)
    complete = checkpoint.latest_complete(folder / "checkpoints", say=pytest.fail)
    assert complete.name == ("step-00000015.ckpt" if how is after_the_file_moved else "step-00000005.ckpt")
    fit.fit_task(composed(folder, "ect", *KILLED))
    assert f"continuing {complete.name}" in capsys.readouterr().out
    assert_same_run(straight("ect", *OFTEN), folder)
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert left == [f"step-{n:08d}.ckpt{s}" for n in (15, 20) for s in ("", ".sha256")], "nothing half-written stays"


# Damaged files --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, straight, tmp_path, capsys):
    folder = tmp_path / "run"
    with leaving(11, RuntimeError("pulled plug")), pytest.raises(RuntimeError):
        fit.fit_task(composed(folder, "ect", *KILLED))
    bad = folder / "checkpoints/step-00000010.ckpt"
    damage(bad)
    fit.fit_task(composed(folder, "ect", *KILLED))
    out = capsys.readouterr().out
    assert f"Checkpoint {bad} cannot be used: it is cut short or altered" in out
    assert "continuing step-00000005.ckpt" in out
    assert (folder / "earlier-1/checkpoints/step-00000010.ckpt").is_file()
    assert_same_run(straight("ect", *OFTEN), folder)


def test_a_checkpoint_without_its_checksum_is_read_as_it_is(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    with leaving(11, RuntimeError("pulled plug")), pytest.raises(RuntimeError):
        fit.fit_task(composed(folder, "ect", *KILLED))
    checkpoint.checksum_path(folder / "checkpoints/step-00000010.ckpt").unlink()
    fit.fit_task(composed(folder, "ect", *KILLED))
    out = capsys.readouterr().out
    assert "step-00000010.ckpt has no checksum beside it" in out and "continuing step-00000010.ckpt" in out
    assert_same_run(straight("ect", *OFTEN), folder)


def test_checkpoints_of_which_none_can_be_used_are_not_started_over(tmp_path):
    """Nor deleted: the run that started at 0 instead used to remove every new checkpoint as the older one."""
    folder = tmp_path / "run"
    fit.fit_task(composed(folder, "edm", "trainer.max_steps=4"))
    (bad,) = checkpoint.list_checkpoints(folder / "checkpoints")
    truncate(bad)
    with pytest.raises(UserError, match=r"none that can be used.*resume=never"):
        fit.fit_task(composed(folder, "edm", "trainer.max_steps=4"))
    fit.fit_task(composed(folder, "edm", "trainer.max_steps=2", "resume=never"))
    assert [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")] == ["step-00000002.ckpt"]
    assert (folder / "earlier-1/checkpoints" / bad.name).is_file()


def test_going_on_from_an_older_checkpoint_leaves_the_other_branch(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ("trainer.max_steps=12", "callbacks.checkpoints.every_n_steps=4", "callbacks.checkpoints.keep=3")
    fit.fit_task(composed(folder, "edm", *words))
    weights = (folder / "export/model.safetensors").read_bytes()
    old = folder / "checkpoints/step-00000004.ckpt"
    with leaving(10, signal.SIGTERM), pytest.raises(Interrupted):
        fit.fit_task(composed(folder, "edm", *words, f"resume={old}"))
    names = [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")]
    assert names == [f"step-{n:08d}.ckpt" for n in (10, 8, 4)], "12 is of the abandoned branch"
    assert [p.name for p in checkpoint.list_checkpoints(folder / "earlier-1/checkpoints")] == [
        "step-00000012.ckpt", "step-00000008.ckpt"]  # fmt: skip
    assert not list((folder / "pictures").glob("step-00000012*")) and len(rows(folder)) == 11
    fit.fit_task(composed(folder, "edm", *words))
    assert "continuing step-00000010.ckpt" in capsys.readouterr().out
    assert (folder / "export/model.safetensors").read_bytes() == weights, "the same steps again"


def test_a_finished_run_trains_and_measures_nothing_again(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    first = fit.fit_task(composed(folder, "edm", "trainer.max_steps=2"))
    kept = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    monkeypatch.setattr(fit, "train", lambda *_: pytest.fail("nothing is left to do"))
    assert fit.fit_task(composed(folder, "edm", "trainer.max_steps=2")) == pytest.approx(first)
    assert "finished: resume has trained 2 of 2 steps" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == kept


def test_data_may_move_but_not_change(tmp_path, capsys):
    from PIL import Image

    def pictures(place: Path, shade: int) -> Path:
        for number in range(8):
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade + number).resize((8 + shade, 8)).save(place / f"{number}.png")
        return place

    def words(root: Path, steps: int) -> tuple:
        return (
            f"trainer.max_steps={steps}", "data=folder", f"data.root={root}", "data.source.resolution=8",
            "data.source.channels=1", "data.num_workers=0", "data.batch_size=4", "evaluate.at_start=false",
        )  # fmt: skip

    folder, one = tmp_path / "run", pictures(tmp_path / "one", 0)
    fit.fit_task(composed(folder, "edm", *words(one, 2)))
    moved = one.rename(tmp_path / "moved")
    fit.fit_task(composed(folder, "edm", *words(moved, 3)))
    assert "continuing step-00000002.ckpt" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run on other data"):
        fit.fit_task(composed(folder, "edm", *words(pictures(tmp_path / "two", 9), 4)))


def test_every_checkpoint_is_plain_data(straight):
    for recipe in RECIPES:
        paths = checkpoint.list_checkpoints(straight(recipe) / "checkpoints")
        assert paths
        for path in paths:
            assert torch.load(path, weights_only=True)["global_step"] == int(path.stem[5:])


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch, straight):
    folder = tmp_path / "run"
    save = torch.save

    def full(content, file):
        if content["global_step"] >= 10:
            file.write(b"half")
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                raise RuntimeError("unexpected pos 576 vs 534") from None  # torch's words for it
        return save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"Cannot write .*step-00000010.ckpt: the disk is full. Free some") as error:
        fit.fit_task(composed(folder, "ect", *KILLED))
    assert "\n" not in str(error.value)
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert left == ["step-00000005.ckpt", "step-00000005.ckpt.sha256"]
    monkeypatch.undo()
    fit.fit_task(composed(folder, "ect", *KILLED))
    assert_same_run(straight("ect", *OFTEN), folder)


def test_torch_reports_a_failed_write_as_the_oserror_it_is(tmp_path):
    """A real write that fails midway: the file-size limit stands in for the end of the disk."""
    writer, path = checkpoint.SafeCheckpointIO(), tmp_path / "step-00000001.ckpt"
    writer.save_checkpoint({"x": torch.zeros(10)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError) as error:
            writer.save_checkpoint({"x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == before and checkpoint.verify_checksum(path)
    assert len(list(tmp_path.iterdir())) == 2


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("override", "named"), [
    ("data.batch_size=64", "data.batch_size was 128, is 64"),
    ("project.net.model.width=32", "project.net.model.width was 16, is 32"),
    ("seed=1", "seed was 0, is 1"),
    ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches was 1, is 2"),
    ("ema.profiles.ema.decay=0.5", "ema.profiles.ema.decay was 0.999, is 0.5"),
    ("project.optimizer.lr=0.1", "project.optimizer.lr was 0.0003, is 0.1"),
])  # fmt: skip
def test_a_folder_of_another_run_is_refused_by_the_key(override, named, straight):
    folder = straight("ect", *OFTEN)
    kept = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    with pytest.raises(UserError) as error:
        fit.fit_task(composed(folder, "ect", "trainer.max_steps=20", override))
    assert named in str(error.value) and "resume=never" in str(error.value) and "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == kept, "nothing may change"


def test_starting_over_keeps_the_whole_old_run_aside(tmp_path, capsys):
    folder = tmp_path / "run"
    fit.fit_task(composed(folder, "ect", "trainer.max_steps=4"))
    (folder / "notes.txt").write_text("the user's own")
    old = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}
    fit.fit_task(composed(folder, "ect", "trainer.max_steps=3", "resume=never"))
    old.pop(Path("notes.txt"))
    assert {path: (folder / "earlier-1" / path).read_bytes() for path in old} == old
    out = capsys.readouterr().out
    assert "training: resume to step 3" in out and "step-00000004.png" not in out.rpartition("training:")[2]
    assert len(rows(folder)) == 4 and (folder / "notes.txt").is_file()


def test_the_console_text_of_a_run_is_kept(tmp_path, capsys):
    folder = tmp_path / "run"
    with leaving(1, signal.SIGTERM), pytest.raises(Interrupted):
        fit.fit_task(composed(folder, "edm", "trainer.max_steps=2"))
    fit.fit_task(composed(folder, "edm", "trainer.max_steps=2"))
    text = (folder / "run.log").read_text()
    for part in ("training: resume to step 2", "error: SIGTERM received", "continuing step-00000001.ckpt", "weights:"):
        assert part in text
    assert [line for line in capsys.readouterr().out.splitlines() if line not in text] == []


# The command itself ---------------------------------------------------------------------------------------------------


STEPS = 60
WORDS = (
    "+experiment=ect_tiny", *MLP, "init.file=null", "needs=null", "table=[]", f"trainer.max_steps={STEPS}",
    "data.batch_size=8", "callbacks.checkpoints.every_n_steps=20", "evaluate=none", "callbacks.pictures=null",
    "project.net.model.dropout=0.2", "data.num_workers=2",
)  # fmt: skip


class WaitForSignal(Callback):
    """Waits once, at step 45, until the file `sent` is there."""

    def __init__(self, sent: Path):
        self.sent = sent

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 45:
            self.sent.with_name("waiting").touch()
            while not self.sent.exists():
                time.sleep(0.002)


def wait_until(there: Path, child) -> None:
    deadline = time.monotonic() + 60
    while not there.exists():
        assert child.is_alive() and time.monotonic() < deadline, f"{there} never came"
        time.sleep(0.005)


@pytest.mark.parametrize(("signum", "code"), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL),
])  # fmt: skip
def test_signals_to_the_command(signum, code, tmp_path, forked_command):
    folder, sent = tmp_path / "run", tmp_path / "sent"
    words = (*WORDS, f"run.dir={folder}", f"paths.outputs={tmp_path}")
    child = forked_command(words, tmp_path, lambda: watch_with(WaitForSignal(sent)))
    wait_until(tmp_path / "waiting", child)
    os.kill(child.pid, signum)
    sent.touch()
    child.join(60)
    err = (tmp_path / "stderr.txt").read_text()
    assert child.exitcode == code, err
    last = checkpoint.latest_complete(folder / "checkpoints")
    if signum != signal.SIGKILL:
        assert last.name == "step-00000046.ckpt", "the step under way is finished"
        assert err == (
            f"error: {signal.Signals(signum).name} received: stopped after step 46. Checkpoint: {last}. The same "
            f"command continues from there.\n"
        )
        return
    assert last.name == "step-00000040.ckpt"
    again = forked_command(words, tmp_path)
    again.join(60)
    assert again.exitcode == 0, (tmp_path / "stderr.txt").read_text()
    assert "continuing step-00000040.ckpt" in (tmp_path / "stdout.txt").read_text()
    register_resolvers()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        fit.fit_task(compose("config", [
            *WORDS, "data.num_workers=0", "run.experiment=ect_tiny", "run.name=x", f"run.dir={tmp_path}/straight",
        ]))  # fmt: skip
    for part in ("state_dict", "averages", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(newest(tmp_path / "straight")[part], newest(folder)[part], part)
    assert rows(tmp_path / "straight") == rows(folder)
