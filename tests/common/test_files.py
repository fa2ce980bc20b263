import errno
import hashlib
import json
import math
import os

import pytest

from common import files
from common.errors import UserError


def test_atomic_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "one")
    files.write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_failure_inside_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="boom"), files.atomic(path) as tmp:
        assert tmp.parent == path.parent and tmp.suffix == path.suffix
        tmp.write_bytes(b"half")
        raise RuntimeError("boom")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["write", "fsync", "text"])
def test_full_disk_names_the_path_and_keeps_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    if where == "fsync":

        def fail(handle):
            raise full

        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"a\.bin: the disk is full") as caught, files.atomic(path) as tmp:
        tmp.write_bytes(b"new")
        if where == "write":
            raise full
        if where == "text":  # torch.save: RuntimeError with the cause in the text only
            raise RuntimeError("write failed: No space left on device (os error 28)")
    assert "intact" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_full_device_is_reported(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")

    def writer(tmp):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(UserError, match="disk is full"):
        files.atomic_write(tmp_path / "a", writer)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="Choose another output folder"):
        files.write_text(tmp_path / "run" / "a.txt", "x")


def test_trouble_with_another_file_is_not_blamed_on_this_one(tmp_path):
    other = tmp_path / "there" / "other.txt"
    with pytest.raises(PermissionError), files.atomic(tmp_path / "here" / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", str(other))


def test_checksums(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"hello")
    assert files.sha256_file(path) == hashlib.sha256(b"hello").hexdigest()
    assert files.verify_checksum(path) is None
    assert files.write_checksum(path) == files.sha256_file(path)
    assert files.verify_checksum(path) is True
    path.write_bytes(b"hellp")
    assert files.verify_checksum(path) is False
    files.checksum_path(path).write_text("")
    assert files.verify_checksum(path) is False


def test_infinities_are_words_in_json_and_numbers_again(tmp_path):
    """Python's own `Infinity` is no JSON: other readers refuse the whole file."""
    tree = {"s_max": math.inf, "low": [-math.inf, 1.5, (2, math.inf)], "word": "Inf", "n": None}
    files.write_json(tmp_path / "a.json", tree)

    def refuse(word):
        raise AssertionError(word)

    stored = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert stored["s_max"] == "Infinity" and stored["low"] == ["-Infinity", 1.5, [2, "Infinity"]]
    assert files.with_numbers(stored) == {
        "s_max": math.inf,
        "low": [-math.inf, 1.5, [2, math.inf]],
        "word": "Inf",
        "n": None,
    }
    files.write_json(tmp_path / "a.json", math.nan)
    assert math.isnan(files.with_numbers(files.read_json(tmp_path / "a.json")))


def test_json_round_trip_and_bad_json(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"σ": [1, 2.5, None]})
    assert files.read_json(path) == {"σ": [1, 2.5, None]}
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    assert files.read_json(path) == {"σ": [1, 2.5, None]}
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not readable"):
        files.read_json(path)
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "none.json")


def test_a_git_lfs_pointer_is_called_so_by_every_reader_of_weights(tmp_path):
    from common.metrics.features import Inception
    from common.metrics.reference import StatisticsFile
    from common.weights.flax import read_flax
    from common.weights.load import load_tensors
    from common.weights.pickle import read_snapshot

    readers = {
        "a.safetensors": load_tensors, "a.pth": load_tensors, "a.pkl": read_snapshot, "a.msgpack": read_flax,
        "b.pth": lambda path: Inception(weights=path), "a.npz": lambda path: StatisticsFile(path=path),
    }  # fmt: skip
    for name, reader in readers.items():
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
        with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer.*git lfs pull --include=\"{name}\""):
            reader(tmp_path / name)
