"""The format of encoded images: complete or named, equal files for equal content."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.data.latents import cache as latent_cache
from common.errors import UserError

FACTS = {
    "images": 7, "source": "ab" * 8, "size": 16, "fit": "adm", "mirrored": True, "autoencoder": "stand-in",
    "arithmetic": "float32", "stored": "float32", "shard_size": 3, "num_classes": 2, "classes": ["a", "b"],
    "command": ["python", "-m", "tools.encode_latents", "pictures", "elsewhere", "--size", "16"],
}  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    """A complete folder: 7 images in shards of 3, the second image of the second shard skipped."""
    folder = tmp_path / "train"
    latent_cache.begin(folder, FACTS)
    moments = np.random.default_rng(0).standard_normal((7, 2, 4, 2, 2)).astype(np.float32)
    for number, rows in enumerate(([0, 1, 2], [3, 5], [6])):
        skipped = ["a/4.png"] if number == 1 else []
        path = folder / latent_cache.shard_name(number)
        latent_cache.write_shard(path, moments[rows], np.array(rows) % 2, skipped)
    return folder


def test_index_is_written_when_all_shards_are_there(cache):
    (cache / "shard-00001.safetensors").rename(cache / "aside")
    assert latent_cache.finish(cache) is None and not (cache / "index.json").exists()
    with pytest.raises(UserError, match=r"is not finished: 2 of 3 shards are there.*tools\.encode_latents pictures"):
        latent_cache.read_index(cache)
    (cache / "aside").rename(cache / "shard-00001.safetensors")
    index = latent_cache.finish(cache)
    assert index == latent_cache.read_index(cache, verify=True)
    assert (index["count"], index["channels"], index["resolution"]) == (6, 2, 2)
    assert [shard["count"] for shard in index["shards"]] == [3, 2, 1]
    assert [shard["skipped"] for shard in index["shards"]] == [[], ["a/4.png"], []]
    assert index["classes"] == ["a", "b"] and index["autoencoder"] == "stand-in"


def test_a_shard_read_from_the_disk_is_what_safetensors_reads(cache):
    path = cache / "shard-00001.safetensors"
    arrays, skipped = latent_cache.open_shard(path)
    expected = load_file(path)
    assert skipped == ["a/4.png"] and set(arrays) == set(expected) == {"moments", "label"}
    for name, array in arrays.items():
        assert isinstance(array, np.memmap) and np.array_equal(array, expected[name])


def test_equal_content_is_an_equal_file(tmp_path):
    moments, label = np.ones((2, 1, 8, 3, 3), np.float16), np.arange(2)
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        latent_cache.write_shard(file, moments, label, ["x"])
    assert files[0].read_bytes() == files[1].read_bytes()
    (tmp_path / "any").write_text("")
    assert files[0].stat().st_mode == (tmp_path / "any").stat().st_mode, "others may read it where they may read files"


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_missing_or_damaged_shard_is_named_and_the_others_stay(cache, damage):
    latent_cache.finish(cache)
    path = cache / "shard-00001.safetensors"
    before = {file.name for file in cache.iterdir()}
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(data[:-5])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
        latent_cache.read_index(cache)  # of the right size: only the checksum tells
    sentence = (
        rf"shard-00001\.safetensors is (missing|damaged).*others are kept.*tools\.encode_latents pictures {cache}"
    )
    with pytest.raises(UserError, match=sentence):
        latent_cache.read_index(cache, verify=True)
    assert not latent_cache.is_finished(cache, 1) and latent_cache.is_finished(cache, 0)
    assert before - {file.name for file in cache.iterdir()} <= {path.name}


def test_other_settings_are_refused(cache):
    latent_cache.begin(cache, {**FACTS, "command": ["another", "machine"]})
    with pytest.raises(UserError, match=r"other settings: shard_size was 3, is 4\. Give another folder"):
        latent_cache.begin(cache, {**FACTS, "shard_size": 4})


def test_no_cache_and_rubbish(tmp_path, cache):
    with pytest.raises(UserError, match=r"holds no index\.json.*python -m tools\.encode_latents"):
        latent_cache.read_index(tmp_path)
    for rubbish in (b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"{}"):
        path = cache / "shard-00000.safetensors"
        path.write_bytes(rubbish)
        with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged"):
            latent_cache.open_shard(path)
    index = tmp_path / "train" / "index.json"
    index.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="has format 99, not 1"):
        latent_cache.read_index(cache)
