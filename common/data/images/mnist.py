"""MNIST and Fashion-MNIST from their original idx.gz files."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from common import limits
from common.data.source import ImageArray, check_split, find_folder
from common.errors import UserError

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", 60_000),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", 10_000),
}
# The md5 sums torchvision checks.
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
HELD_OUT_OF_TEST = 2_000
SPLIT_WORDS = ("official", "test8000")


class Mnist:
    """MNIST (LeCun 1998): grey 28x28, 10 classes, splits train (60,000) and test (10,000).

    root        folder that holds `mnist/` or torchvision's `MNIST/raw/` with the four .gz files
    resolution  28 as it is, or 32: two black pixels on every side, for networks that halve the width often
    """

    name = "mnist"
    num_classes = 10
    channels = 1
    splits = ("train", "test")

    def __init__(self, *, root: str, resolution: int = 28):
        self.root = root
        self.resolution = _check_resolution(resolution)

    def check(self) -> None:
        for split in self.splits:
            self._folder(split)

    def load(self, split: str) -> ImageArray:
        check_split(split, self.splits, self.name)
        images, labels = read_split(self._folder(split), split, MNIST_MD5)
        return ImageArray(pad_to(images, self.resolution), labels)

    def _folder(self, split: str) -> Path:
        fix = "Set data.root to the folder that holds mnist/, or let torchvision.datasets.MNIST download it there."
        return find_folder(self.root, ["mnist", "MNIST/raw"], FILES[split][0], "MNIST", fix)


class FashionMnist:
    """Fashion-MNIST (arXiv 1708.07747): grey 28x28, 10 classes.

    root        folder that holds `fashion_mnist/` or torchvision's `FashionMNIST/raw/` with the .gz files
    resolution  28, or 32 with a black border
    split       "official": train (60,000) and test (10,000). "test8000": the 10,000 test images alone, the first 8,000
                as train and the last 2,000 as test; needs only the two t10k files, and its numbers compare with no
                published ones
    """

    num_classes = 10
    channels = 1
    splits = ("train", "test")

    def __init__(self, *, root: str, resolution: int = 28, split: str = "official"):
        limits.choice("data.source.split", split, SPLIT_WORDS)
        self.root = root
        self.resolution = _check_resolution(resolution)
        self.split = split
        self.name = "fashion_mnist" if split == "official" else "fashion_mnist_test8000"

    def check(self) -> None:
        for split in self.splits:
            self._folder(split)

    def load(self, split: str) -> ImageArray:
        check_split(split, self.splits, self.name)
        folder = self._folder(split)
        if self.split == "official":
            images, labels = read_split(folder, split, FASHION_MD5)
        else:
            images, labels = read_split(folder, "test", FASHION_MD5)
            border = len(images) - HELD_OUT_OF_TEST
            rows = slice(None, border) if split == "train" else slice(border, None)
            images, labels = images[rows], labels[rows]
        return ImageArray(pad_to(images, self.resolution), labels)

    def _folder(self, split: str) -> Path:
        fix = (
            "Set data.root to the folder that holds fashion_mnist/, or let torchvision.datasets.FashionMNIST download "
            "it there; with the two t10k files alone, set data.source.split=test8000."
        )
        part = split if self.split == "official" else "test"
        folders = ["fashion_mnist", "FashionMNIST/raw"]
        return find_folder(self.root, folders, FILES[part][0], "Fashion-MNIST", fix)


def read_split(folder: Path, split: str, md5: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N,). Raises UserError naming a missing or damaged file."""
    image_file, label_file, count = FILES[split]
    images = read_idx(folder / image_file, md5[image_file], (count, 28, 28))
    labels = read_idx(folder / label_file, md5[label_file], (count,))
    return images[:, None], labels.astype(np.int64)


def read_idx(path: Path, md5: str, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of `shape` in a gzipped idx file: bytes 0 0 8 ndim, big-endian uint32 sizes, then the values.

    Raises UserError naming `path` when it is missing, its md5 is another, or its header does not announce `shape`.
    """
    fix = f"Put an intact copy of {path.name} into {path.parent}."
    if not path.is_file():
        raise UserError(f"{path} does not exist. {fix}")
    packed = path.read_bytes()
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{path} is damaged: its md5 is not {md5}. {fix}")
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}. {fix}") from error
    header = bytes([0, 0, 8, len(shape)]) + np.asarray(shape, dtype=">u4").tobytes()
    if not data.startswith(header) or len(data) - len(header) != int(np.prod(shape)):
        raise UserError(f"{path} is damaged: it does not hold an array of shape {shape}. {fix}")
    return np.frombuffer(data, dtype=np.uint8, offset=len(header)).reshape(shape).copy()


def pad_to(images: np.ndarray, resolution: int) -> np.ndarray:
    """Images (N, 1, R, R) centred in black (N, 1, resolution, resolution)."""
    border = (resolution - images.shape[-1]) // 2
    return images if border == 0 else np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)))


def _check_resolution(resolution: int) -> int:
    return limits.choice("data.source.resolution", resolution, (28, 32))
