"""Encoding images: what is written, and that stopping, sharing and damage change nothing about it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.images.folder import ImageFiles
from common.data.images.module import to_unit_range
from common.data.latents.cache import open_shard, read_index
from common.data.latents.module import LatentDataModule, LatentFolder
from common.errors import UserError
from tools import encode_latents

# A stand-in for the autoencoder; lies outside the repository because processes of their own import it too.
STAND_IN = """
import os
import torch
from torch.nn.functional import avg_pool2d

class Encoder:
    calls = 0

    def __init__(self, path, dtype):
        self.path = path

    def check(self):
        pass

    def identity(self):
        return f"stand-in-{self.path}"

    def encode(self, images):
        Encoder.calls += 1
        if Encoder.calls == int(os.environ.get("STOP_AT_CALL", -1)):
            if os.environ["STOP_HOW"] == "kill":
                os._exit(9)
            raise KeyboardInterrupt
        mean = avg_pool2d(images, 8)
        left = images[..., : images.shape[3] // 2].mean(dim=(1, 2, 3)).view(-1, 1, 1, 1).expand_as(mean[:, :1])
        mean = torch.cat([mean, left], dim=1)
        if self.path == "broken":
            mean = mean / 0
        return mean, mean.abs() / 10 + 0.05
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The folder with the stand-in; its count of calls starts anew."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "stand_in_encoder.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "stand_in_encoder", raising=False)
    for name in ("RANK", "WORLD_SIZE", "STOP_AT_CALL"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """13 pictures of several sizes in three classes."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for number in range(13):
        place = folder / f"class_{'abc'[number % 3]}"
        place.mkdir(parents=True, exist_ok=True)
        size = [(16, 16), (40, 21), (19, 33), (64, 64)][number % 4]
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(place / f"{number:02d}.png")
    return folder


def words(pictures, out, *more: str) -> list[str]:
    return [
        str(pictures), str(out), "--size", "16", "--vae", "tiny", "--encoder", "stand_in_encoder.Encoder",
        "--batch-size", "2", "--shard-size", "3", "--workers", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def encode(pictures, out, *more: str) -> int:
    return encode_latents.main(words(pictures, out, *more))


def process(stand_in, repo, pictures, out, *more: str, **environment) -> subprocess.Popen:
    paths = os.pathsep.join([str(stand_in), str(repo)])
    return subprocess.Popen(
        [sys.executable, "-m", "tools.encode_latents", *words(pictures, out, *more)], cwd=repo,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def content(folder) -> dict[str, bytes]:
    """Name -> bytes; of the records what does not name the folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            record.pop("command")
            found[path.name] = json.dumps(record, sort_keys=True).encode()
        else:
            found[path.name] = path.read_bytes()
    return found


def test_every_image_and_its_mirror_image_with_its_class(stand_in, pictures, tmp_path, capsys):
    out = tmp_path / "latents"
    assert encode(pictures, out) == 0
    shown = capsys.readouterr().out
    assert "0 of 5 shards are there, 5 to encode" in shown and "13 images in 5 shards, complete" in shown
    assert "shard 4 written, 5 of 5: 13 images" in shown
    index = read_index(out, verify=True)
    assert (index["count"], index["channels"], index["resolution"]) == (13, 4, 2)
    assert index["classes"] == ["class_a", "class_b", "class_c"] and index["num_classes"] == 3
    assert [shard["count"] for shard in index["shards"]] == [3, 3, 3, 3, 1]
    files = ImageFiles(path=pictures, resolution=16, channels=3, num_classes=3, fit="adm")
    assert index["source"] == files.fingerprint()
    from stand_in_encoder import Encoder

    encoder = Encoder("tiny", "float32")
    for number, shard in enumerate(index["shards"]):
        arrays, _ = open_shard(out / shard["file"])
        rows = np.arange(3 * number, min(3 * number + 3, 13))
        images, labels = files.take(rows)
        assert np.array_equal(arrays["label"], labels.numpy())
        for view, image in enumerate((to_unit_range(images), to_unit_range(images).flip(3))):
            expected = torch.cat(encoder.encode(image), dim=1)
            torch.testing.assert_close(torch.from_numpy(arrays["moments"][:, view].copy()), expected)
    assert not np.allclose(arrays["moments"][:, 0], arrays["moments"][:, 1])


def test_the_reader_takes_what_is_written(stand_in, pictures, tmp_path):
    assert encode(pictures, tmp_path / "latents", "--store", "float16", "--workers", "2") == 0
    data = LatentDataModule(
        source=LatentFolder(path=str(tmp_path / "latents"), resolution=2, num_classes=3), batch_size=26, xflip=True
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (26, 4, 2, 2) and sorted(batch["label"].tolist())[:10] == [0] * 10
    assert open_shard(tmp_path / "latents" / "shard-00000.safetensors")[0]["moments"].dtype == np.float16


def test_stopped_and_killed_runs_go_on_to_the_same_files(stand_in, repo, pictures, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "latents"
    assert encode(pictures, whole) == 0
    # two batches of two views a shard: calls 1-4 are shard 0, the 7th lies within shard 1
    killed = process(stand_in, repo, pictures, out, STOP_AT_CALL="7", STOP_HOW="kill")
    killed.communicate(timeout=100)
    assert killed.returncode == 9
    assert {path.name for path in out.glob("*.safetensors")} == {"shard-00000.safetensors"}
    kept = (out / "shard-00000.safetensors").stat()
    monkeypatch.setenv("STOP_HOW", "interrupt")
    monkeypatch.setenv("STOP_AT_CALL", str(sys.modules["stand_in_encoder"].Encoder.calls + 5))
    assert encode(pictures, out) == 130
    assert "Stopped. The finished shards are kept" in capsys.readouterr().err
    assert len(list(out.glob("*.safetensors"))) == 2 and not (out / "index.json").exists()
    monkeypatch.delenv("STOP_AT_CALL")
    assert encode(pictures, out) == 0
    assert "2 of 5 shards are there, 3 to encode" in capsys.readouterr().out
    assert content(out) == content(whole)
    again = (out / "shard-00000.safetensors").stat()
    assert (again.st_mtime_ns, again.st_ino) == (kept.st_mtime_ns, kept.st_ino), "a finished shard is not written again"


def test_two_processes_at_once_write_what_one_does(stand_in, repo, pictures, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "latents"
    assert encode(pictures, whole) == 0
    both = [process(stand_in, repo, pictures, out, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    shown = [one.communicate(timeout=100)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], shown
    assert "0 of 3 shards are there" in shown[0] and "0 of 2 shards are there" in shown[1]
    assert content(out) == content(whole)


def test_a_process_alone_leaves_the_others_shards_and_no_index(stand_in, pictures, tmp_path, capsys):
    assert encode(pictures, tmp_path / "latents", "--rank", "1", "--world", "2") == 0
    names = sorted(path.name for path in (tmp_path / "latents").glob("*.safetensors"))
    assert names == ["shard-00001.safetensors", "shard-00003.safetensors"]
    assert "the last one to finish writes index.json" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of 5 shards are there"):
        read_index(tmp_path / "latents")


@pytest.mark.parametrize("damage", ["changed", "missing", "without its checksum"])
def test_only_a_damaged_shard_is_encoded_again(stand_in, pictures, tmp_path, capsys, damage):
    out = tmp_path / "latents"
    assert encode(pictures, out) == 0
    before, times = content(out), {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    path = out / "shard-00002.safetensors"
    if damage == "changed":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    else:
        path.with_name(path.name + ".sha256").unlink()
    capsys.readouterr()
    assert encode(pictures, out) == 0
    shown = capsys.readouterr().out
    assert "4 of 5 shards are there, 1 to encode" in shown
    assert ("shard-00002.safetensors differs from its checksum" in shown) == (damage != "missing")
    assert content(out) == before
    changed = {p.name for p in out.glob("*.safetensors") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"shard-00002.safetensors"}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_named_and_may_be_skipped(stand_in, pictures, tmp_path, capsys, workers):
    bad = pictures / "class_b" / "04.png"
    bad.write_bytes(bad.read_bytes()[:60])
    out = tmp_path / "latents"
    assert encode(pictures, out, "--workers", workers) == 2
    assert "class_b/04.png, cannot be read" in (error := capsys.readouterr().err) and "--skip-bad" in error
    assert encode(pictures, out, "--skip-bad", "--workers", workers) == 0
    assert "skipped: class_b/04.png" in (shown := capsys.readouterr().out) and "1 skipped, complete" in shown
    index = read_index(out)
    assert index["count"] == 12 and [name for shard in index["shards"] for name in shard["skipped"]] == [
        "class_b/04.png"
    ]
    labels = np.concatenate([open_shard(out / shard["file"])[0]["label"] for shard in index["shards"]])
    assert np.bincount(labels).tolist() == [5, 3, 4]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--size", "20"], "--size must be a multiple of 8 (pixels per latent), got 20"),
        (["--shard-size", "0"], "--shard-size must be a whole number >= 1, got 0"),
        (["--rank", "2", "--world", "2"], "--rank must be a whole number >= 0 and <= 1, got 2"),
        (["--workers", "-1"], "--workers must be a whole number >= 0"),
        (["--encoder", "stand_in_encoder.Nothing"], "--encoder stand_in_encoder.Nothing cannot be imported"),
        (["--vae", "broken"], "non-finite numbers from"),
        (["--encoder", "common.weights.vae.SdVae", "--vae", "nowhere"], "nowhere does not exist|diffusers"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--fit", "exact"], "Give --fit center to crop and resize, or change --size"),
    ],
)
def test_errors_are_one_sentence(stand_in, pictures, tmp_path, capsys, more, sentence):
    assert encode(pictures, tmp_path / "latents", *more) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in sentence.split("|")) and error.startswith("error: ") and error.count("\n") == 1


def test_other_settings_and_other_pictures_are_refused(stand_in, pictures, tmp_path, capsys):
    out = tmp_path / "latents"
    assert encode(pictures, out) == 0
    for more, word in (
        (["--no-mirror"], "mirrored was True, is False"),
        (["--vae", "x"], "autoencoder was stand-in-tiny"),
    ):
        assert encode(pictures, out, *more) == 2
        assert word in capsys.readouterr().err
    (pictures / "class_a" / "00.png").unlink()
    assert encode(pictures, out) == 2
    assert "images was 13, is 12" in capsys.readouterr().err


def test_pictures_without_classes(stand_in, pictures, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(pictures / "loose.png")
    assert encode(pictures, tmp_path / "latents") == 2
    assert "give --no-labels" in capsys.readouterr().err
    assert encode(pictures, tmp_path / "latents", "--no-labels", "--no-mirror") == 0
    index = read_index(tmp_path / "latents")
    assert (index["num_classes"], index["classes"], index["count"]) == (0, None, 14)
    assert open_shard(tmp_path / "latents" / "shard-00000.safetensors")[0]["moments"].shape == (3, 1, 8, 2, 2)
    assert encode(tmp_path / "nowhere", tmp_path / "latents") == 2
    assert "is neither a folder nor a zip of pictures" in capsys.readouterr().err


def test_the_real_autoencoder(pictures, tmp_path):
    """A tiny random one of diffusers, end to end: moments of the cache against the network's own."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    out = tmp_path / "latents"
    more = ["--encoder", "common.weights.vae.SdVae", "--vae", str(tmp_path / "vae")]
    assert encode(pictures, out, *more) == 0
    images, _ = ImageFiles(path=pictures, resolution=16, channels=3, num_classes=3, fit="adm").take(np.arange(3))
    with torch.no_grad():
        gaussian = model.encode(to_unit_range(images)).latent_dist
    moments = torch.from_numpy(open_shard(out / "shard-00000.safetensors")[0]["moments"][:, 0].copy())
    torch.testing.assert_close(moments, torch.cat([gaussian.mean, gaussian.std], dim=1), rtol=1e-4, atol=1e-5)
    assert read_index(out)["autoencoder"].startswith("vae-")
