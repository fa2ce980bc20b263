"""MNIST and Fashion-MNIST from idx.gz; damage and absence are named."""

import gzip
import os

import numpy as np
import pytest

from common.data.images.mnist import FashionMnist, Mnist, pad_to, read_idx
from common.errors import UserError


@pytest.fixture(scope="module")
def root(data_folder):
    return str({data_folder(name).parent for name in ("mnist", "fashion_mnist")}.pop())


def test_mnist_is_what_torchvisions_reader_gives(root, tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    split = Mnist(root=root).load("test")
    for name, read, ours in (
        ("t10k-images-idx3-ubyte", read_image_file, split.images[:, 0]),
        ("t10k-labels-idx1-ubyte", read_label_file, split.labels),
    ):
        with gzip.open(os.path.join(root, "mnist", f"{name}.gz")) as packed:
            (tmp_path / name).write_bytes(packed.read())
        assert (read(str(tmp_path / name)) == ours).all()


def test_sizes_and_border(root):
    split = Mnist(root=root, resolution=32).load("train")
    assert tuple(split.images.shape) == (60_000, 1, 32, 32)
    assert split.images[:, :, :2].max() == 0 and split.images[:, :, :, -2:].max() == 0
    inner = np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(pad_to(inner, 4)[:, :, 1:3, 1:3], inner)


def test_fashion_splits(root):
    source = FashionMnist(root=root, split="test8000")
    source.check()
    train, test = source.load("train"), source.load("test")
    assert len(train) == 8000 and len(test) == 2000 and source.name == "fashion_mnist_test8000"
    assert train.fingerprint() != test.fingerprint()


def test_fashion_without_train_images_says_what_to_do(tmp_path):
    (tmp_path / "fashion_mnist").mkdir()
    (tmp_path / "fashion_mnist" / "t10k-images-idx3-ubyte.gz").touch()
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz.*data\.source\.split=test8000"):
        FashionMnist(root=str(tmp_path)).check()


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"not it"))
    with pytest.raises(UserError, match=r"x\.gz is damaged: its md5"):
        read_idx(path, "0" * 32, (3,))
    with pytest.raises(UserError, match=r"y\.gz does not exist"):
        read_idx(tmp_path / "y.gz", "0" * 32, (3,))


def test_header_must_announce_the_shape(tmp_path):
    import hashlib

    values = bytes([5, 6, 7])
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3]) + values))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    assert read_idx(path, md5, (3,)).tolist() == [5, 6, 7]
    with pytest.raises(UserError, match="does not hold an array of shape"):
        read_idx(path, md5, (4,))


def test_bad_options(tmp_path):
    with pytest.raises(UserError, match=r"data\.source\.resolution must be one of 28, 32, got 30"):
        Mnist(root=str(tmp_path), resolution=30)
    with pytest.raises(UserError, match=r"data\.source\.split must be one of official, test8000"):
        FashionMnist(root=str(tmp_path), split="half")
    with pytest.raises(UserError, match="MNIST not found"):
        Mnist(root=str(tmp_path)).check()
