"""CIFAR-10 bit for bit, from both layouts; damage and absence are named."""

import json
import lzma
import os
import pickle
import shutil

import numpy as np
import pytest

from common.data.images.cifar import LABELS, PIXELS, Cifar10, read_python_batch
from common.data.source import sha256
from common.errors import UserError


@pytest.fixture(scope="module")
def compact(data_folder):
    return data_folder("cifar10")


@pytest.fixture(scope="module")
def train(compact):
    return Cifar10(root=str(compact.parent), batches=[1]).load("train")


@pytest.fixture(scope="module")
def test(compact):
    return Cifar10(root=str(compact.parent)).load("test")


@pytest.fixture
def copy(compact, tmp_path):
    """A compact folder of links, of which a test replaces one file by a damaged copy."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for file in compact.iterdir():
        os.symlink(file, folder / file.name)
    return folder


def damage(path, at=1000):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def python_layout(compact, train, test, tmp_path_factory):
    """torchvision's folder, made from the compact one: the exact test_batch, and data_batch_1 pickled anew."""
    folder = tmp_path_factory.mktemp("python") / "cifar-10-batches-py"
    folder.mkdir()
    shutil.copy(compact / "batches.meta", folder)
    head, tail = (lzma.decompress((compact / f"test_batch.{part}.xz").read_bytes()) for part in ("head", "tail"))
    (folder / "test_batch").write_bytes(head + test.images.numpy().tobytes() + tail)
    record = {
        "batch_label": "training batch 1 of 5",
        "labels": train.labels.tolist(),
        "data": train.images.numpy().reshape(10_000, 3072),
    }
    (folder / "data_batch_1").write_bytes(pickle.dumps(record, protocol=2))
    return folder


def test_decoded_pixels_are_the_recorded_ones(compact, train, test):
    recorded = json.loads((compact / "pixel_sha256.json").read_text())
    assert sha256(train.images.numpy()) == recorded["data_batch_1"]
    assert sha256(test.images.numpy()) == recorded["test_batch"]
    assert sha256(test.labels.numpy().astype(np.uint8)) == recorded["labels_test_u8"]
    assert {name: digest for name, digest in recorded.items() if "batch" in name} == PIXELS
    assert LABELS["test_batch"] == recorded["labels_test_u8"]
    assert np.bincount(test.labels).tolist() == [1000] * 10


def test_torchvisions_layout_gives_the_same_images(python_layout, train, test):
    other = Cifar10(root=str(python_layout.parent), batches=[1])
    assert other.locate() == ("python", python_layout)
    other.check()
    for split, ours in (("train", train), ("test", test)):
        theirs = other.load(split)
        assert (theirs.images == ours.images).all() and (theirs.labels == ours.labels).all()
        assert theirs.fingerprint() == ours.fingerprint()


def test_rebuilt_test_batch_is_the_file_torchvision_knows(python_layout):
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    assert check_integrity(str(python_layout / "test_batch"), dict(CIFAR10.test_list)["test_batch"])


def test_root_may_be_the_folder_itself_and_splits_and_batches_are_checked(compact):
    assert Cifar10(root=str(compact)).locate() == ("compact", compact)
    with pytest.raises(UserError, match=r"no split 'tset'\. Closest: test"):
        Cifar10(root=str(compact)).load("tset")
    for batches in ([], [1, 1], [6]):
        with pytest.raises(UserError, match="must list some of 1, 2, 3, 4, 5"):
            Cifar10(root=str(compact), batches=batches)


def test_missing_root_says_what_to_do(tmp_path):
    with pytest.raises(UserError) as caught:
        Cifar10(root=str(tmp_path / "nowhere")).load("train")
    message = str(caught.value)
    assert str(tmp_path / "nowhere" / "cifar10") in message and "cifar-10-batches-py" in message
    assert "does not exist" in message and "Set data.root" in message and "\n" not in message


def test_a_missing_batch_is_named(copy):
    (copy / "data_batch_3.zip").unlink()
    Cifar10(root=str(copy.parent), batches=[1]).check()
    with pytest.raises(UserError, match=r"lacks data_batch_3\.zip"):
        Cifar10(root=str(copy.parent)).check()


@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("name", ["data_batch_1.zip", "labels.npz"])
def test_a_flipped_bit_is_found_and_the_file_named(copy, name, with_sums):
    damage(copy / name, at=400)
    if not with_sums:  # then the content itself must give the damage away
        (copy / "SHA256SUMS").unlink()
    with pytest.raises(UserError) as caught:
        Cifar10(root=str(copy.parent), batches=[1]).load("train")
    assert str(copy / name) in str(caught.value) and "is damaged" in str(caught.value)


def test_a_swapped_batch_is_found(copy):
    (copy / "test_batch.zip").unlink()
    os.symlink((copy / "data_batch_1.zip").resolve(), copy / "test_batch.zip")
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"test_batch\.zip is damaged: its pixels are not those of CIFAR-10"):
        Cifar10(root=str(copy.parent)).load("test")


def test_a_truncated_or_changed_python_batch_is_named(python_layout, tmp_path):
    whole = (python_layout / "test_batch").read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"short is damaged: it cannot be read"):
        read_python_batch(tmp_path / "short", "test_batch")
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    (tmp_path / "changed").write_bytes(changed)
    with pytest.raises(UserError, match=r"changed is damaged: its pixels"):
        read_python_batch(tmp_path / "changed", "test_batch")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    bait = tmp_path / "made by the pickle"
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Hostile(str(bait))}))
    with pytest.raises(UserError, match="it asks for"):
        read_python_batch(tmp_path / "data_batch_1", "data_batch_1")
    assert not bait.exists()


def test_cache_is_used_and_a_damaged_cache_is_not(compact, train, tmp_path, monkeypatch):
    source = Cifar10(root=str(compact), batches=[1], cache_dir=str(tmp_path / "cache"))
    assert (source.load("train").images == train.images).all()
    (cached,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("common.data.images.cifar.read_mosaics", None)  # decoding again would now fail
    assert (source.load("train").images == train.images).all()
    damage(cached)
    with pytest.raises(TypeError):
        source.load("train")
