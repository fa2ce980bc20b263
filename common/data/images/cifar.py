"""CIFAR-10 from either of two layouts on disk, bit-exact and verified.

The compact layout holds, per batch of 10,000 images, a zip of 100 lossless WebP mosaics; the other is the folder
`cifar-10-batches-py` of Python pickles that torchvision and the authors use. Both give the same pixels.
"""

import codecs
import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from common.archives import open_npz, open_zip
from common.data.source import UNREADABLE, ImageArray, check_split, differs_from_sums, find_folder, sha256
from common.errors import UserError
from common.files import atomic

BATCH_SIZE = 10_000
TRAIN_BATCHES = (1, 2, 3, 4, 5)
COMPACT, PYTHON = "compact", "python"

# sha256 of each batch's (10000, 3, 32, 32) uint8 pixels and (10000,) uint8 labels, C order. They identify the content,
# so a python batch that was pickled again (other file names inside, hence another md5 than torchvision's) still passes.
PIXELS = {
    "data_batch_1": "a50e8b48728e1667d682a807155c375279d5ae321fb12242c02e3104a6bc8b21",
    "data_batch_2": "0b825e5592c3b72ea18d6ec2ff5f5b19d33e41a75f5039054a9bb87be3cf69a0",
    "data_batch_3": "c6ee1dd4601a69ec085d8ebf53ee6441775491a6839a0a9ae8fa198e88a3a429",
    "data_batch_4": "1f6b6c799cff375a9f8fae2fac909d51ee09f38a6a60eebb9e8fec6f47ddc48f",
    "data_batch_5": "58e3bbf713e28357476a351d3a05d056372f94c681d04ca9d62a076fdf2a643b",
    "test_batch": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
}
LABELS = {
    "data_batch_1": "d829dbdf32167c9d7b3687cee66d92d80d46c441308b5aca0d11e8b69e27dac9",
    "data_batch_2": "5d18f7371ed35ea9ade77952fe958b0660a45cd6c8b8a8970030f21612cfd7e3",
    "data_batch_3": "32cf77b0ee2e790b1c4384d2d82e42dc1571b87e67f6da8f444b2725b2973f65",
    "data_batch_4": "d2815e3f8f656272864920fc0edde56b04ec9cf81bf397c0dd3069f4aea51aeb",
    "data_batch_5": "2ddf3ab27d5d04409c94ce7b56849c243129c10de1058ae0bfe14c77e934800c",
    "test_batch": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}


class Cifar10:
    """CIFAR-10 (Krizhevsky 2009): colour 32x32, 10 classes, splits train (50,000) and test (10,000).

    root       folder that holds `cifar10/` (compact) or `cifar-10-batches-py/`, or is one of them; compact wins
    batches    which of the five training batches make up the train split, e.g. [1] for a small run
    cache_dir  folder for decoded pixels (30 MB a batch; saves the ~0.5 s decode, still verified), None keeps none

    Every batch read is compared with the known checksum of its pixels and labels; in the compact layout the zip is
    first compared with SHA256SUMS beside it.
    """

    name = "cifar10"
    num_classes = 10
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    channels = 3
    resolution = 32
    splits = ("train", "test")

    def __init__(self, *, root: str, batches: list[int] | None = None, cache_dir: str | None = None):
        chosen = TRAIN_BATCHES if batches is None else tuple(batches)
        if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(TRAIN_BATCHES):
            raise UserError(
                f"data.source.batches must list some of 1, 2, 3, 4, 5, each once, got {list(chosen)}. "
                "Set data.source.batches=[1] for a small run or null for all five."
            )
        self.root = root
        self.batches = chosen
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None

    def locate(self) -> tuple[str, Path]:
        """`(layout, folder)`, layout "compact" or "python". Raises UserError when neither is below root."""
        base = Path(self.root).expanduser()
        for layout, candidates, probe in (
            (COMPACT, ("cifar10", ""), "labels.npz"),
            (PYTHON, ("cifar-10-batches-py", ""), "batches.meta"),
        ):
            for candidate in candidates:
                if (base / candidate / probe).is_file():
                    return layout, base / candidate
        fix = (
            "Set data.root to the folder that holds one of them, or download cifar-10-python.tar.gz from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there."
        )
        find_folder(self.root, ["cifar10", "cifar-10-batches-py"], "batches.meta", "CIFAR-10", fix)
        folder = base / "cifar10"
        raise UserError(f"CIFAR-10 in {folder} lacks labels.npz. {_again(folder / 'labels.npz')}")

    def check(self) -> None:
        layout, folder = self.locate()
        suffix = ".zip" if layout == COMPACT else ""
        for batch in [*self._names("train"), *self._names("test")]:
            if not (folder / (batch + suffix)).is_file():
                raise UserError(f"CIFAR-10 in {folder} lacks {batch + suffix}. {_again(folder / (batch + suffix))}")

    def load(self, split: str) -> ImageArray:
        """The split as in-memory arrays; about 0.5 s per batch of 10,000."""
        check_split(split, self.splits, self.name)
        self.check()
        layout, folder = self.locate()
        names = self._names(split)
        images = np.empty((len(names) * BATCH_SIZE, 3, 32, 32), dtype=np.uint8)
        labels = np.empty(len(images), dtype=np.int64)
        for slot, batch in enumerate(names):
            rows = slice(slot * BATCH_SIZE, (slot + 1) * BATCH_SIZE)
            if layout == COMPACT:
                images[rows] = self._cached(batch, folder / f"{batch}.zip", read_mosaics)
                labels[rows] = read_compact_labels(folder / "labels.npz", batch)
            else:
                images[rows], labels[rows] = read_python_batch(folder / batch, batch)
        return ImageArray(images, labels)

    def _names(self, split: str) -> list[str]:
        return ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in self.batches]

    def _cached(self, batch: str, path: Path, read) -> np.ndarray:
        if self.cache_dir is None:
            return read(path, batch)
        cached = self.cache_dir / f"cifar10-{batch}-{PIXELS[batch][:16]}.npy"
        try:
            pixels = np.load(cached, allow_pickle=False)
            if sha256(pixels) == PIXELS[batch]:
                return pixels
        except UNREADABLE:  # absent or damaged: a cache may be, so decode again
            pass
        pixels = read(path, batch)
        with atomic(cached) as tmp:
            np.save(tmp, pixels)
        return pixels


def read_mosaics(path: Path, batch: str) -> np.ndarray:
    """Pixels uint8 (10000, 3, 32, 32) of one compact batch: 100 WebP mosaics of 10 x 10 images, row by row.

    Raises UserError naming `path` when it differs from SHA256SUMS beside it, cannot be decoded, or decodes to other
    pixels than CIFAR-10's.
    """
    _check_sums(path)
    pixels = np.empty((100, 10, 10, 3, 32, 32), dtype=np.uint8)
    try:
        with open_zip(path) as archive:
            for member in range(100):
                with Image.open(io.BytesIO(archive.read(f"{member:03d}.webp"))) as picture:
                    mosaic = np.asarray(picture.convert("RGB")).reshape(10, 32, 10, 32, 3)
                pixels[member] = mosaic.transpose(0, 2, 4, 1, 3)
    except UNREADABLE as error:
        raise _damaged(path, f"it cannot be decoded ({error})") from error
    pixels = pixels.reshape(BATCH_SIZE, 3, 32, 32)
    if sha256(pixels) != PIXELS[batch]:
        raise _damaged(path, "its pixels are not those of CIFAR-10")
    return pixels


def read_compact_labels(path: Path, batch: str) -> np.ndarray:
    """Labels (10000,) int64 of one batch from `labels.npz`. Raises UserError naming `path` when they are not known."""
    _check_sums(path)
    try:
        with open_npz(path) as arrays:
            labels = arrays["test" if batch == "test_batch" else "train"]
    except UNREADABLE as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    first = 0 if batch == "test_batch" else (int(batch[-1]) - 1) * BATCH_SIZE
    return _check_labels(labels[first : first + BATCH_SIZE], path, batch)


def read_python_batch(path: Path, batch: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (10000, 3, 32, 32) and labels (10000,) int64 of one pickled batch.

    The unpickler makes nothing but numpy arrays, so a hostile file cannot run code. Raises UserError naming `path`
    when the file cannot be read or does not hold the batch.
    """
    try:
        with open(path, "rb") as file:
            record = _ArrayUnpickler(file, encoding="latin1").load()
        pixels, labels = np.asarray(record["data"], dtype=np.uint8), np.asarray(record["labels"])
    except Exception as error:  # damaged pickles raise nearly anything
        raise _damaged(path, f"it cannot be read ({type(error).__name__}: {error})") from error
    if sha256(pixels) != PIXELS[batch]:
        raise _damaged(path, "its pixels are not those of CIFAR-10")
    return pixels.reshape(BATCH_SIZE, 3, 32, 32), _check_labels(labels, path, batch)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the handful of names a pickled array of numbers needs, and no other."""

    _numpy = {  # noqa: RUF012  (never changed)
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in self._numpy:
            return self._numpy[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a CIFAR-10 batch has no use for")


def _check_labels(labels: np.ndarray, path: Path, batch: str) -> np.ndarray:
    if sha256(labels.astype(np.uint8)) != LABELS[batch]:
        raise _damaged(path, f"its labels of {batch} are not those of CIFAR-10")
    return labels.astype(np.int64)


def _check_sums(path: Path) -> None:
    """Compares `path` with its line in SHA256SUMS, where the folder has that file."""
    if differs_from_sums(path):
        raise _damaged(path, f"its sha256 is not the one in {path.with_name('SHA256SUMS')}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"CIFAR-10 file {path} is damaged: {what}. {_again(path)}")


def _again(path: Path) -> str:
    return f"Put an intact copy of {path.name} into {path.parent}."
