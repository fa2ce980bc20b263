"""The data module: batches, exact restart through Lightning's own checkpoints, and errors from workers."""

import json
import os
import subprocess
import sys
from itertools import chain, islice

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from PIL import Image

from common.data.images.cifar import Cifar10
from common.data.images.digits import Digits, digits_split
from common.data.images.folder import ImageFiles, ImageFolder
from common.data.images.module import ImageDataModule, to_unit_range
from common.errors import UserError


def module(**kwargs):
    return ImageDataModule(**{"source": Digits(), "batch_size": 8, **kwargs})


class Recorder(pl.LightningModule):
    """Trains one number and writes down what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        assert batch["image"].dtype == torch.float32
        self.seen.append((batch["position"].tolist(), batch["label"].tolist(), batch["image"].sum().item()))
        return (self.weight - batch["image"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated += batch["position"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Writes one checkpoint in the named hook after `step` optimiser steps."""

    def __init__(self, step, hook, path):
        self.step, self.hook, self.path = step, hook, path

    def _save(self, hook, trainer):
        if hook == self.hook and trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *_):
        self._save("on_train_batch_end", trainer)

    def on_validation_end(self, trainer, *_):
        self._save("on_validation_end", trainer)


def fit(steps, data, ckpt=None, callbacks=(), **kwargs):
    recorder = Recorder()
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "logger": False, "num_sanity_val_steps": 0,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "limit_val_batches": 0, "callbacks": list(callbacks), **kwargs,
        }
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return recorder


def test_batch_is_the_contracts():
    data = module(batch_size=16)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint8
    batch = data.on_after_batch_transfer(batch, 0)
    assert batch["image"].dtype == torch.float32 and batch["image"].shape == (16, 1, 8, 8)
    assert batch["image"].min() == -1 and batch["image"].max() == 1
    assert batch["label"].dtype == batch["position"].dtype == torch.int64
    assert batch["position"].tolist() == list(range(16))
    assert (data.num_classes, data.channels, data.resolution, data.name) == (10, 1, 8, "digits")


@settings(deadline=None, max_examples=20)
@given(value=st.integers(0, 255))
def test_range_closed_form(value):
    x = to_unit_range(torch.tensor([value], dtype=torch.uint8))
    assert x.item() == pytest.approx(value / 127.5 - 1, abs=1e-7)
    assert ((x + 1) * 127.5).round().item() == value


def test_images_and_labels_belong_together():
    train_x, train_y, _, _ = digits_split()
    rows = {image.tobytes(): label for image, label in zip(train_x, train_y)}
    for batch in islice(module(batch_size=100).train_dataloader(), 3):
        assert [rows[image.numpy().tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_xflip_doubles_the_epoch_with_mirror_images():
    train_x = digits_split()[0]
    batches = list(islice(module(batch_size=1400, xflip=True).train_dataloader(), 2))
    seen = sorted(image.numpy().tobytes() for batch in batches for image in batch["image"])
    expected = sorted(image.tobytes() for image in [*train_x, *train_x[..., ::-1]])
    assert seen == expected
    stored = next(iter(module(batch_size=2800, xflip=True, shuffle=False).train_dataloader()))["image"]
    assert torch.equal(stored[1400:], stored[:1400].flip(3))


def test_reference_images_are_the_split_in_order():
    data = module(xflip=True)
    images = list(data.reference_images("test", 100))
    assert [len(part) for part in images] == [100, 100, 100, 97]
    np.testing.assert_array_equal(torch.cat(images).numpy(), digits_split()[2])
    assert data.fingerprint("test") == module().fingerprint("test") != data.fingerprint("train")
    with pytest.raises(UserError, match="no split 'valid'"):
        next(data.reference_images("valid", 10))


def test_evaluation_loader_sees_the_split_once():
    data = module(eval_batch_size=100)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert len(loader) == 4
        assert [p for batch in loader for p in batch["position"].tolist()] == list(range(397))
    assert module(val_split=None).val_dataloader() == []
    with pytest.raises(UserError, match="no split 'vla'"):
        module(val_split="vla").val_dataloader()


def test_making_loaders_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    next(iter(module().train_dataloader()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("workers", [0, 2])
def test_thirteen_and_seven_steps_are_twenty(tmp_path, workers, hook):
    # batch 176 crosses the end of an epoch at step 8; validation runs in between
    kwargs = dict(batch_size=176, num_workers=workers)
    loop = dict(limit_val_batches=2, val_check_interval=13, check_val_every_n_epoch=None)
    path = str(tmp_path / "mid.ckpt")
    straight = fit(20, module(**kwargs), callbacks=[SaveAt(13, hook, path)], **loop)
    resumed = fit(20, module(**kwargs), ckpt=path, **loop)
    assert [position for step in straight.seen for position in step[0]] == list(range(20 * 176))
    assert len(straight.validated) > 0
    assert resumed.seen == straight.seen[13:]
    assert torch.equal(resumed.weight, straight.weight)


def test_restart_between_accumulated_steps_and_with_another_split_of_the_batch(tmp_path):
    path = str(tmp_path / "mid.ckpt")
    straight = fit(6, module(), callbacks=[SaveAt(4, "on_train_batch_end", path)])
    flat = [position for step in straight.seen for position in step[0]]
    pieces = fit(6, module(), accumulate_grad_batches=4)
    assert [len(step[0]) for step in pieces.seen] == [2] * 24
    assert [position for step in pieces.seen for position in step[0]] == flat
    resumed = fit(6, module(), ckpt=path, accumulate_grad_batches=2)  # four times 8 images, then eight times 4
    assert [position for step in resumed.seen for position in step[0]][:16] == flat[32:]


def test_a_second_restart_counts_on(tmp_path):
    paths = [str(tmp_path / f"{n}.ckpt") for n in range(2)]
    straight = fit(9, module(), callbacks=[SaveAt(3, "on_train_batch_end", paths[0])])
    fit(9, module(), ckpt=paths[0], callbacks=[SaveAt(5, "on_train_batch_end", paths[1])])
    assert fit(9, module(), ckpt=paths[1]).seen == straight.seen[5:]


def test_epochs_of_a_limited_loader_do_not_start_over(tmp_path):
    recorder = fit(7, module(), limit_train_batches=3)
    assert [position for step in recorder.seen for position in step[0]] == list(range(56))


def test_overfitting_repeats_the_same_batches():
    recorder = fit(6, module(), overfit_batches=2)
    assert recorder.seen[0] != recorder.seen[1]
    assert recorder.seen[:2] == recorder.seen[2:4] == recorder.seen[4:]


def test_a_changed_seed_is_said_at_restart(tmp_path):
    path = str(tmp_path / "mid.ckpt")
    fit(3, module(), callbacks=[SaveAt(2, "on_train_batch_end", path)])
    with pytest.warns(UserWarning, match="order of the images changes .* seed was 0, is 1"):
        fit(3, module(seed=1), ckpt=path)


def test_start_samples_moves_the_beginning():
    data = module()
    data.start_samples = 1397
    assert next(iter(data.train_dataloader()))["position"].tolist() == list(range(1397, 1405))
    assert data.samples_seen() == 1397


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_one_sentence_even_from_a_worker(tmp_path, workers):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in ("a", "b", "c"):
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:100])
    source = ImageFolder(path=str(tmp_path), resolution=8)
    data = ImageDataModule(source=source, batch_size=3, num_workers=workers)
    with pytest.raises(UserError) as caught:
        fit(2, data)
    assert str(tmp_path / "b.png") in str(caught.value)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    data.teardown("fit")


def test_bad_numbers_are_refused():
    with pytest.raises(UserError, match=r"data\.batch_size must be a whole number >= 1, got 0"):
        module(batch_size=0)
    with pytest.raises(UserError, match=r"data\.eval_batch_size must be a whole number >= 1, got -1"):
        module(eval_batch_size=-1)
    with pytest.raises(UserError, match=r"data\.num_workers must be a whole number >= 0"):
        module(num_workers=-1)
    with pytest.raises(UserError, match=r"multiple of 3 \(processes x trainer\.accumulate_grad_batches\), got 8"):
        fit(1, module(), accumulate_grad_batches=3)


def test_missing_data_stops_the_fit(tmp_path):
    data = ImageDataModule(source=ImageFolder(path=str(tmp_path / "gone"), resolution=8))
    for call in (data.check, lambda: fit(1, data)):
        with pytest.raises(UserError, match="does not exist"):
            call()


TWO_PROCESSES = """
import json, sys
import lightning.pytorch as pl, torch
from common.data.images.cifar import Cifar10
from common.data.images.digits import Digits
from common.data.images.module import ImageDataModule

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.validated = torch.nn.Parameter(torch.zeros(())), [], []
    def training_step(self, batch, batch_idx):
        self.seen.append([batch["position"].tolist(), batch["label"].tolist()])
        return (self.weight - batch["image"].mean()) ** 2
    def on_train_batch_end(self, *_):
        if self.global_step == 3:
            self.trainer.save_checkpoint(f"{folder}/{name}.ckpt")
    def validation_step(self, batch, batch_idx):
        self.validated += batch["position"].tolist()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_end(self):
        with open(f"{folder}/{name}-{self.global_rank}.json", "w") as file:
            json.dump([self.seen, self.validated, self.weight.item()], file)

folder = sys.argv[1]
for name, devices, ckpt in (("one", 1, None), ("two", 2, None), ("one-two", 2, "one"), ("two-one", 1, "two")):
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_steps=5, max_epochs=-1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )
    data = ImageDataModule(source=Digits(), batch_size=12)
    trainer.fit(Recorder(), datamodule=data, ckpt_path=ckpt and f"{folder}/{ckpt}.ckpt", weights_only=bool(ckpt))
"""


def test_two_processes_share_one_stream_and_hand_over_to_one(tmp_path, repo):
    # in a process of its own: forking one that runs tests is asking for trouble
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)], cwd=repo, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def joint(name, processes):
        parts = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(processes)]
        seen = [[list(chain(*columns)) for columns in zip(*step)] for step in zip(*(part[0] for part in parts))]
        assert sorted(p for part in parts for p in part[1]) == list(range(397))  # nobody validates an image twice
        return seen, parts[0][2]

    one, weight = joint("one", 1)
    two, weight_of_two = joint("two", 2)
    assert two == one and weight_of_two == pytest.approx(weight, abs=1e-7)
    assert joint("one-two", 2)[0] == joint("two-one", 1)[0] == one[3:]


def test_eval_batches_walk_a_split_once_in_order():
    data = module(eval_batch_size=200)
    batches = list(data.eval_batches("test"))
    assert [len(batch["label"]) for batch in batches] == [200, 197]
    assert torch.cat([batch["position"] for batch in batches]).tolist() == list(range(397))
    pixels, labels = data.images("test").take(np.arange(397))
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), pixels)
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), labels)
    assert torch.equal(data.on_after_batch_transfer(batches[0], 0)["image"], to_unit_range(pixels[:200]))
    with pytest.raises(UserError, match=r"digits has no split 'tset'\. Closest: test"):
        data.eval_batches("tset")


def test_class_names_come_from_the_source():
    assert module().classes is None
    assert Cifar10.classes[3] == "cat" and len(Cifar10.classes) == Cifar10.num_classes
    assert module(source=Cifar10(root="nowhere")).classes == Cifar10.classes


def test_workers_decode_and_resize(tmp_path, monkeypatch):
    """Pictures of ImageNet's kind are read, cut and resized outside the training process, and travel as bytes."""
    (tmp_path / "a").mkdir()
    for number in range(4):
        Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(tmp_path / "a" / f"{number}.png")
    main, read = os.getpid(), ImageFiles.read

    def elsewhere(self, index):
        assert os.getpid() != main, "decoded in the training process"
        return read(self, index)

    monkeypatch.setattr(ImageFiles, "read", elsewhere)
    source = ImageFolder(path=str(tmp_path), resolution=16, num_classes=1, fit="adm")
    data = ImageDataModule(source=source, batch_size=4, num_workers=1, xflip=True)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 16, 16)
    data.teardown("fit")
