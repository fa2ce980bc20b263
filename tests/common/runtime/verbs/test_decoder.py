"""A network in latents through the whole runtime: cache in, decoded images out, restart exact."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.latents import cache as latent_cache
from common.errors import UserError
from common.runtime.training.checkpoint import list_checkpoints
from common.runtime.verbs.assemble import build_decoder
from common.runtime.verbs.fit import fit_task
from common.runtime.verbs.plan import fake_training_step
from common.runtime.verbs.sample import sample_task
from common.weights.load import load_tensors

COUNT = 24


class StandIn:
    """An autoencoder of 8 x 8 pixels to a latent: its first three numbers are the colour."""

    missing = False

    def __init__(self, *, path: str, dtype: str):
        self.path = path

    def check(self):
        if StandIn.missing:
            raise UserError(f"The autoencoder {self.path} does not exist.")

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


@pytest.fixture
def run(tmp_path, composed, monkeypatch):
    """run(folder, *overrides) -> configuration of a MeanFlow MLP in latents 4 x 2 x 2 of 16-pixel images."""
    made_up = types.ModuleType("projects.made_up_latents")
    made_up.StandIn = StandIn
    StandIn.__module__ = made_up.__name__
    monkeypatch.setitem(sys.modules, made_up.__name__, made_up)
    monkeypatch.setattr(StandIn, "missing", False)
    generator = np.random.default_rng(0)
    pictures, cache = tmp_path / "pictures" / "a", tmp_path / "latents"
    pictures.mkdir(parents=True)
    moments = np.full((COUNT, 2, 8, 2, 2), 0.1, np.float32)
    for number in range(COUNT):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:02d}.png")
        moments[number, :, :3] = generator.uniform(-1, 1, (3, 1, 1))
    latent_cache.begin(cache, {
        "images": COUNT, "source": "0" * 16, "size": 16, "fit": "adm", "mirrored": True, "autoencoder": "stand-in",
        "arithmetic": "float32", "stored": "float32", "shard_size": 10, "num_classes": 0, "classes": None,
        "command": ["python", "-m", "tools.encode_latents", "pictures", "latents"],
    })  # fmt: skip
    for number in range(3):
        part = moments[10 * number : 10 * number + 10]
        latent_cache.write_shard(cache / latent_cache.shard_name(number), part, np.zeros(len(part)))
    latent_cache.finish(cache)

    def build(folder, *overrides: str):
        return composed(
            tmp_path / folder, "data=imagenet_latents256", f"data.source.path={cache}", "data.source.resolution=2",
            "data.source.num_classes=0", f"data.reference.path={pictures.parent}", "data.reference.resolution=16",
            "data.reference.num_classes=0", "data.num_workers=0", "data.batch_size=8",
            "project.net.model.in_channels=4", "project.net.model.out_channels=4",
            "project.net.model.img_resolution=2", "decoder=sd_vae",
            "decoder.vae._target_=projects.made_up_latents.StandIn", "decoder.batch_size=5", "trainer.max_steps=6",
            "evaluate.samples=30", "evaluate.batch_size=16", "evaluate.curve_samples=30", "evaluate.every_n_steps=null",
            "+evaluate.extractors.pixels={_target_: common.metrics.features.Pixels, channels: 3, resolution: 16}",
            "evaluate.samplers.two_steps=null", "evaluate.samplers.four_steps=null", *overrides,
            experiment="meanflow_tiny",
        )  # fmt: skip

    return build


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())["metrics"]


@pytest.mark.filterwarnings("ignore")
def test_training_measuring_and_showing_decoded_images(run, tmp_path, capsys):
    fit_task(run("whole"))
    measured = result(tmp_path / "whole")
    assert measured["test/fd_pixels_one_step"]["value"] > 0
    sample_task(run("whole", "task=sample", "sample.samples=7"))
    out = capsys.readouterr().out
    array = np.load(next(line[7:] for line in out.splitlines() if line.startswith("array: ")))["images"]
    assert array.shape == (7, 16, 16, 3) and (array[:, :8, :8] == array[:, :1, :1]).all(), "8 x 8 pixels to a latent"
    assert not any("decoder" in name for name in load_tensors(tmp_path / "whole" / "export"))

    fit_task(run("parts", "trainer.max_steps=2"))
    fit_task(run("parts"))
    whole, parts = (
        torch.load(list_checkpoints(tmp_path / name / "checkpoints")[0], weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert (
        result(tmp_path / "parts")["test/fd_pixels_one_step"]["value"] == measured["test/fd_pixels_one_step"]["value"]
    )


def test_refusals_before_any_work(run, composed, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"measured against pixels.*set data\.reference"):
        fit_task(run("a", "data.reference=null"))
    with pytest.raises(UserError, match=r"The latents are 4 x 2 x 2, but the network takes 4 x 4 x 4"):
        fit_task(run("b", "project.net.model.img_resolution=4"))
    monkeypatch.setattr(StandIn, "missing", True)
    with pytest.raises(UserError, match=r"autoencoder .* does not exist"):
        fit_task(run("c"))
    assert build_decoder(run("d"), needed=False) is not None
    assert build_decoder(composed(tmp_path / "e"), needed=True) is None


def test_planning_needs_no_autoencoder(run, monkeypatch):
    monkeypatch.setattr(StandIn, "missing", True)
    _, flops, _ = fake_training_step(run("plan"), images=2)
    assert flops > 0
