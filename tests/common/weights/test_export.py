import errno
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.weights import export as exporting
from common.weights.build import build
from common.weights.export import export, load

NET = {
    "_target_": "common.diffusion.precond.ECMPrecond",
    "sigma_min": 0.003,
    "model": {
        "_target_": "common.nets.unet.SongUNet",
        "img_resolution": 8,
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 32,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.2,
    },
}
TWO_STEPS = {"_target_": "common.diffusion.sample.Multistep", "mids": [0.8]}
META = {"experiment": "ect_tiny", "step": 20, "average": "ema", "commit": "abc", "published": {"fid": 3.6}}


def with_labels(count):
    return {**NET, "model": {**NET["model"], "label_dim": count}}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(3)
    return export(tmp_path / "export", build(NET), NET, meta=META, sampler=TWO_STEPS)


def test_three_lines_in_a_fresh_python(folder, repo):
    code = (
        "import sys\n"
        "from common.weights.export import load\n"
        f"model = load({str(folder)!r})\n"
        "images = model.sample(2, seed=0)\n"
        "assert images.shape == (2, 1, 8, 8) and images.isfinite().all()\n"
        "assert 'hydra' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repo)


def test_round_trip(folder):
    torch.manual_seed(3)
    net = build(NET).eval()
    state = torch.get_rng_state()
    model = load(folder)
    assert torch.equal(torch.get_rng_state(), state), "loading must not touch the user's random stream"
    assert model.meta == META and model.config["network"] == NET
    assert not model.net.training and not any(p.requires_grad for p in model.net.parameters())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.net(x, 2.0), net(x, 2.0))
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "model.safetensors.sha256", "config.json.sha256",
    }  # fmt: skip


def test_image_i_does_not_depend_on_the_batch(folder):
    model = load(folder)
    images = model.sample(70, seed=5, batch_size=70)
    assert torch.allclose(model.sample(70, seed=5, batch_size=3), images, atol=1e-5)
    assert torch.allclose(model.sample(3, seed=5, first=65), images[65:68], atol=1e-5)
    assert not torch.allclose(model.sample(3, seed=6), images[:3], atol=1e-2)


def test_labels(tmp_path):
    net = build(with_labels(3))
    for value in net.parameters():
        value.data = torch.randn(value.shape) * 0.2
    model = load(export(tmp_path / "e", net, with_labels(3), meta={}, sampler=TWO_STEPS))
    same = model.sample(4, labels=1)
    assert torch.allclose(same, model.sample(4, labels=[1, 1, 1, 1], batch_size=3), atol=1e-4)
    mixed = model.sample(4, labels=torch.tensor([1, 0, 1, 2]))
    assert torch.allclose(mixed[0], same[0], atol=1e-4) and not torch.allclose(mixed[1], same[1], atol=1e-4)
    assert torch.allclose(model.sample(4), model.sample(4, batch_size=1), atol=1e-4)
    for wrong in ([0, 1], [0, 1, 2, 3], -1):
        with pytest.raises(UserError, match="labels must be 4 class indices from 0 to 2"):
            model.sample(4, labels=wrong)


def test_bad_requests(folder, tmp_path):
    model = load(folder)
    for field, options in (("n", dict(n=0)), ("batch_size", dict(n=1, batch_size=0)), ("n", dict(n=2.5))):
        with pytest.raises(UserError, match=f"{field} must be a whole number >= 1"):
            model.sample(**options)
    with pytest.raises(UserError, match="unconditional"):
        model.sample(1, labels=0)
    bare = load(export(tmp_path / "bare", model.net, NET, meta={}))
    with pytest.raises(UserError, match="without a sampler"):
        bare.sample(1)
    assert bare.sample(1, sampler=build(TWO_STEPS)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damage_is_named(folder, name):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(folder)
    path.write_bytes(data[:-7] + b"1234567")
    with pytest.raises(UserError, match=rf"{name} is damaged or was changed".replace(".", r"\.")):
        load(folder)
    path.unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(folder)


def test_weights_of_another_network(folder, tmp_path):
    with pytest.raises(UserError, match=r"does not fit its configuration: 2 tensors differ, first model\.map_label"):
        export(tmp_path / "x", build(NET), with_labels(3), meta={})
    assert not (tmp_path / "x").exists()
    config = json.loads((folder / "config.json").read_text())
    config["network"] = with_labels(3)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "config.json.sha256").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not fit its configuration"):
        load(folder)


@pytest.mark.parametrize("target", ["os.system", "common.files.write_text", "torch.hub.load", "torch.load"])
def test_a_foreign_configuration_cannot_call_what_it_likes(folder, target):
    config = json.loads((folder / "config.json").read_text())
    config["sampler"] = {"_target_": target, "_args_": ["x", "y"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "config.json.sha256").unlink()
    with pytest.raises(UserError, match="not allowed"):
        load(folder)


def test_an_interrupted_export_does_not_look_finished(folder, monkeypatch):
    monkeypatch.setattr(exporting, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(folder, build(NET), NET, meta=META)
    with pytest.raises(UserError, match="no finished export"):
        load(folder)


def test_full_disk_leaves_the_old_export(folder, monkeypatch):
    import safetensors.torch

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"model\.safetensors: the disk is full"):
        export(folder, build(NET), NET, meta={})
    assert load(folder).meta == META


def test_only_plain_data(tmp_path):
    with pytest.raises(UserError, match=r"meta\.when is a object, not plain data"):
        export(tmp_path / "x", build(NET), NET, meta={"when": object()})
    assert not (tmp_path / "x").exists()


def test_shared_and_strided_tensors(tmp_path):
    layer = nn.Linear(4, 4)
    tree = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 4}
    layer.weight.data = torch.arange(16.0).reshape(4, 4).t()
    weight = load(export(tmp_path / "e", layer, tree, meta={})).net.weight
    assert torch.equal(weight, layer.weight)
