"""task=sample and task=export: pictures, arrays, and the same image again from three lines of Python."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.metrics.images import to_uint8
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.verbs.export import export_task
from common.runtime.verbs.sample import chosen_classes, input_files, sample_task, show_samples


@pytest.fixture
def made(trained, composed, tmp_path, capsys):
    """made(*overrides) -> folder of the samples of the trained run."""
    checkpoint = list_checkpoints(trained / "checkpoints")[0]

    def make(*words: str):
        sample_task(composed(tmp_path / "run", "task=sample", f"resume={checkpoint}", "sample.samples=7", *words))
        out = capsys.readouterr().out
        grid = next(line.removeprefix("grid: ") for line in out.splitlines() if line.startswith("grid: "))
        return type(tmp_path)(grid).parent

    return make


def pixels(folder) -> np.ndarray:
    return np.load(folder / "samples.npz")["images"]


def test_grid_single_images_and_array(made):
    folder = made("sampler@sample.sampler=heun", "sample.sampler.steps=3", "sample.batch_size=3")
    array = pixels(folder)
    assert array.shape == (7, 8, 8, 1) and array.dtype == np.uint8
    names = sorted(p.name for p in (folder / "images").iterdir())
    assert names == [f"{index:06d}.png" for index in range(7)]
    for index in range(7):
        assert np.array_equal(np.asarray(Image.open(folder / "images" / names[index])), array[index, ..., 0])
    grid = Image.open(folder / "grid.png")
    assert grid.mode == "L" and grid.width >= 3 * 32
    assert np.load(folder / "samples.npz")["labels"].tolist() == [-1] * 7
    facts = json.loads((folder / "samples.json").read_text())
    assert facts["samples"] == 7 and facts["weights"]["step"] == 12 and facts["sampler"]["steps"] == 3
    assert folder.name == "heun-nfe5-seed0"


def test_the_guidance_of_a_sampler_is_in_the_name_of_its_folder(monkeypatch, made):
    from common.diffusion.sample import Heun

    monkeypatch.setattr(Heun, "variant", "omega4-t0.4-0.6", raising=False)
    assert made("sampler@sample.sampler=heun", "sample.sampler.steps=2").name == "heun-nfe3-omega4-t0.4-0.6-seed0"


@pytest.mark.parametrize("sampler", ["heun", "one_step", "two_step", "euler"])
def test_image_i_is_the_same_whatever_the_batch(sampler, made):
    steps = ["sample.sampler.steps=4"] if sampler in ("heun", "euler") else []
    words = (f"sampler@sample.sampler={sampler}", *steps)
    whole = pixels(made(*words, "sample.batch_size=64"))
    for size in (1, 3):
        assert np.array_equal(pixels(made(*words, f"sample.batch_size={size}")), whole)
    more = pixels(made(*words, "sample.samples=9"))
    assert np.array_equal(more[:7], whole), "more images, the same first ones"
    assert not np.array_equal(pixels(made(*words, "sample.seed=1")), whole)
    assert len(np.unique(whole.reshape(7, -1), axis=0)) == 7


def test_stochastic_solvers_too(made):
    words = ("sampler@sample.sampler=heun", "sample.sampler.steps=5", "sample.sampler.churn=10")
    one, two = pixels(made(*words, "sample.batch_size=7")), pixels(made(*words, "sample.batch_size=2"))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, pixels(made(*words[:2])))


def test_the_export_gives_the_same_images_in_three_lines(made, trained, composed, tmp_path):
    words = ("sampler@sample.sampler=heun", "sample.sampler.steps=4")
    expected = pixels(made(*words))
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    export_task(composed(tmp_path / "out", "task=export", f"resume={checkpoint}", *words))

    from common.weights.export import load

    model = load(tmp_path / "out/export")
    images = to_uint8(model.sample(7, seed=0))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
    assert model.meta["step"] == 12 and model.meta["average"] == "ema"


def test_an_export_folder_can_be_sampled_by_init_file(trained, composed, tmp_path, capsys):
    sample_task(composed(tmp_path / "run", "task=sample", f"init.file={trained}/export", "sample.samples=2"))
    assert "2 images of" in capsys.readouterr().out


def test_classes_by_number_and_their_refusals():
    assert chosen_classes(None, torch.arange(3), 0) is None
    assert chosen_classes([4, 2], torch.tensor([3, 4, 5]), 10).tolist() == [2, 4, 2]
    with pytest.raises(UserError, match=r"unconditional. Set sample.classes=null"):
        chosen_classes([1], torch.arange(3), 0)
    with pytest.raises(UserError, match=r"must lie in 0..9, got 10"):
        chosen_classes([1, 10], torch.arange(3), 10)


@pytest.mark.parametrize("word", ["sample.samples=0", "sample.samples=-3", "sample.batch_size=0"])
def test_counts_below_one_write_nothing(word, composed, tmp_path):
    with pytest.raises(UserError, match=r"sample\.\w+ must be >= 1"):
        sample_task(composed(tmp_path / "run", "task=sample", word))
    assert not (tmp_path / "run").exists()


def test_sampling_needs_no_metric(trained, composed, tmp_path):
    """The Inception weights are missing here; that concerns task=test alone."""
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    sample_task(composed(tmp_path / "run", "task=sample", f"resume={checkpoint}", "evaluate=fid", "sample.samples=1",
                         f"paths.weights={tmp_path}"))  # fmt: skip


def test_a_users_files_are_for_networks_that_read_them(trained, composed, tmp_path):
    checkpoint = list_checkpoints(trained / "checkpoints")[0]
    with pytest.raises(UserError, match=r"sample.input=here is given, but this network makes images from noise"):
        sample_task(composed(tmp_path / "run", "task=sample", f"resume={checkpoint}", "sample.input=here"))


@pytest.fixture
def reading(tmp_path):
    """reading(input) -> (what the module was asked, what the data were asked) of a network that reads files."""

    def run(given):
        module, data = torch.nn.Identity(), SimpleNamespace(calls=[])
        module.asked = []
        module.refresh = lambda: None
        module.show = lambda data, folder, **words: module.asked.append(("show", folder, words)) or [folder / "a.png"]
        module.show_files = lambda files, data, folder: module.asked.append(("files", files, folder)) or [folder]
        data.check = lambda: data.calls.append("check")
        data.setup = lambda stage: data.calls.append(stage)
        sample = SimpleNamespace(input=given, seed=3, samples=4)
        assembled = SimpleNamespace(cfg=SimpleNamespace(sample=sample), module=module, data=data, folder=tmp_path)
        show_samples(assembled, {"file": "f", "average": "raw", "step": 1})
        return module.asked, data.calls

    return run


def test_pictures_of_ones_own_need_no_data(reading, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    asked, calls = reading(str(tmp_path / "mine"))
    assert asked == [("files", tmp_path / "mine", tmp_path / "samples/mine")] and calls == []
    assert f"shown: {tmp_path / 'samples/mine'}" in capsys.readouterr().out
    asked, calls = reading(None)
    assert asked == [("show", tmp_path / "samples/seed3", {"samples": 4, "seed": 3})] and calls == ["check", "test"]
    with pytest.raises(UserError, match=r"sample.input=.*gone does not exist. Set it to a folder of pictures"):
        reading(str(tmp_path / "gone"))


def test_input_is_a_path_or_a_list_of_paths(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert input_files(None) is None and input_files(names[0]) == tmp_path / "a.png"
    assert input_files(names) == [tmp_path / "a.png", tmp_path / "b.png"]
    for given in ([*names, str(tmp_path / "gone.png")], str(tmp_path / "gone.png")):
        with pytest.raises(UserError, match=r"sample\.input=.*gone\.png does not exist"):
            input_files(given)
