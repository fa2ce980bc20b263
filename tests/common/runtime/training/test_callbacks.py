"""Throughput, progress and pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.runtime.training import callbacks
from common.runtime.training.callbacks import Progress, SampleGrid, Throughput, write_grid
from common.runtime.training.context import RunContext
from common.runtime.verbs import fit


class Module:
    def __init__(self, flops: float | None = None):
        self.context = RunContext(samples_per_step=100, count_flops=None if flops is None else lambda: flops)
        self.logged = []

    def log_dict(self, values) -> None:
        self.logged.append(values)


class Trainer:
    is_global_zero, world_size, global_step, max_steps = True, 2, 0, 6

    def __init__(self, *callbacks):
        self.callbacks = list(callbacks)


def test_throughput_counts_images_over_the_clock(monkeypatch):
    """One step takes 2 s of a fake clock: 100 images a step are 50 images/s; 1 TFLOP a step on 2 devices of 1 TFLOP/s
    is a quarter of their peak."""
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])
    measure, trainer, module = Throughput(every_n_steps=2, peak_tflops=1.0), Trainer(), Module(flops=1e12)
    measure.on_train_start(trainer, module)
    for step in range(1, 6):
        clock[0] += 100.0 if step == 1 else 2.0  # warm-up does not count
        trainer.global_step = step
        measure.on_train_batch_end(trainer, module, None, None, 0)
    assert module.logged == [{"perf/images_per_s": 50.0, "perf/mfu": 0.25}] * 2


def test_without_a_known_peak_there_is_no_utilisation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measure, trainer, module = Throughput(every_n_steps=1), Trainer(), Module(flops=1e12)
    measure.on_train_start(trainer, module)
    for trainer.global_step in (1, 2):
        measure.on_train_batch_end(trainer, module, None, None, 0)
    assert [list(values) for values in module.logged] == [["perf/images_per_s"]]


def test_a_gpu_is_recognised_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    measure = Throughput()
    measure.on_train_start(Trainer(), Module())
    assert measure.peak_tflops == 312.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    return now


def test_progress_prints_lines_with_times_loss_speed_and_the_metric(capsys, clock):
    speed = Throughput()
    speed.images_per_s = 1234.5
    progress = Progress(every_n_steps=2, every_seconds=1e6)
    trainer = Trainer(speed, progress)
    progress.on_train_start(trainer, None)
    progress.latest = {"val/fd": 3.25}
    for trainer.global_step in range(1, 7):
        clock[0] += 700.0
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.5)}, None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "step       4/6  46:40 elapsed, 23:20 left  loss 0.5  1,234 images/s  val/fd 3.25" in lines[1]
    assert "6/6  1:10:00 elapsed, 0:00 left" in lines[-1]
    for options in ({"every_n_steps": 0}, {"every_seconds": 0.0}):
        with pytest.raises(UserError, match=rf"callbacks.progress.{next(iter(options))} must be >"):
            Progress(**options)


def test_slow_steps_give_lines_by_the_clock_and_micro_batches_none(capsys, clock):
    """9 s a step in three micro-batches: a line every 36 s, the first after four steps, although 200 are asked for."""
    progress, trainer = Progress(every_n_steps=200, every_seconds=30.0), Trainer()
    trainer.global_step, trainer.max_steps = (
        1000,
        1100,
    )  # continued: what remains is judged by the steps of this process
    progress.on_train_start(trainer, None)
    for step in range(1000, 1012):
        for micro in range(3):
            clock[0] += 3.0
            trainer.global_step = step + (micro == 2)
            progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.5)}, None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1004/1100", "1008/1100", "1012/1100"]
    assert "0:36 elapsed, 14:24 left" in lines[0]


def test_the_loss_of_an_accumulated_step_is_its_mean_printed_once(capsys):
    """Lightning's outputs are the losses divided by the number of micro-batches."""
    progress = Progress(every_n_steps=1)
    trainer = Trainer(progress)
    progress.on_train_start(trainer, None)
    for micro, loss in enumerate((1.0, 3.0, 5.0, 7.0)):
        trainer.global_step = (micro + 1) // 2
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss / 2)}, None, micro)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[1], *line[-2:]) for line in lines] == [("1/6", "loss", "2"), ("2/6", "loss", "6")]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(callbacks.sys.stdout, "isatty", lambda: True, raising=False)
    progress = Progress()
    trainer = Trainer(progress)
    progress.on_train_start(trainer, None)
    try:
        trainer.global_step = trainer.max_steps
        progress.on_train_batch_end(trainer, None, torch.tensor(0.5), None, 0)
        task = progress._bar.tasks[0]
        assert task.completed == 6 and "loss 0.5" in task.fields["values"]
    finally:
        progress.on_exception(trainer, None, RuntimeError())
    assert progress._bar is None


def test_pictures_every_n_steps_and_at_the_end(composed, tmp_path):
    fit.fit_task(composed(
        tmp_path / "run", "trainer.max_steps=5",
        "callbacks.pictures={_target_: common.runtime.training.callbacks.SampleGrid, folder: ${run.dir}/pictures,"
        "every_n_steps: 2, samples: 5}",
    ))  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "run/pictures").glob("step-*.png"))
    assert names == [f"step-{n:08d}.png" for n in (2, 4, 5)]


@pytest.mark.parametrize(("options", "field"), [({"every_n_steps": 0}, "every_n_steps"), ({"samples": 0}, "samples")])
def test_settings_out_of_range(options, field):
    with pytest.raises(UserError, match=rf"callbacks.pictures.{field} must be >= 1"):
        SampleGrid(folder="x", **options)


def test_tiles_stand_in_reading_order(tmp_path):
    """Five tiles of constant grey in two rows of three, enlarged to 48 pixels, with gaps of 2."""
    tones = torch.linspace(-1, 1, 5)
    path = write_grid(tmp_path / "grid.png", tones[:, None, None, None].expand(5, 1, 8, 8), columns=3)
    array = np.asarray(Image.open(path))
    assert array.shape == (2 * 50 + 2, 3 * 50 + 2)
    centres = array[25::50, 25::50].reshape(-1)
    assert centres[:5].tolist() == [0, 64, 128, 191, 255] and centres[5] == 128
    assert (array[:2] == 128).all() and (array[:, 50:52] == 128).all()
    colour = torch.zeros(2, 3, 40, 40)
    colour[1, 0] = 1.0
    array = np.asarray(Image.open(write_grid(tmp_path / "colour.png", colour)))
    assert array.shape[2] == 3 and array.shape[1] >= 40 and array[..., 0].max() == 255
