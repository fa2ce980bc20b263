"""Pictures with masks, read and checked pair by pair: every error is one sentence that names the file."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.archives import open_zip
from common.data.pictures import INTACT, picture_size, read_member, read_picture, read_values, reason_of
from common.data.segmentation.augment import IGNORE
from common.data.segmentation.palette import Palette
from common.data.source import UNREADABLE
from common.errors import UserError

FORBIDDEN = -1  # in a label table: no mask may hold this value
ARCHIVE_SEPARATOR = ":"


class SegmentationSource(Protocol):
    """Where a segmentation set lies and how it is read. Making one touches no file; `check` and `load` do."""

    name: str
    class_names: tuple[str, ...]
    palette: Palette
    splits: tuple[str, ...]

    def check(self) -> None:
        """Whether the files of every split are there, each picture with its mask. Raises UserError."""

    def load(self, split: str) -> "Pairs":
        """The pairs of the split; nothing is decoded yet. Raises UserError naming what is missing."""


def label_table(classes: Sequence[int] | dict[int, int], void: Sequence[int] = (IGNORE,)) -> np.ndarray:
    """int16 (256,): the class of every value a mask may hold, 255 for void ones, FORBIDDEN for all others.

    classes  values of classes 0, 1, ... in a mask, or value -> class
    """
    table = np.full(256, FORBIDDEN, dtype=np.int16)
    pairs = classes.items() if isinstance(classes, dict) else ((value, label) for label, value in enumerate(classes))
    for value, label in pairs:
        table[value] = label
    table[list(void)] = IGNORE
    return table


class Pairs:
    """The pictures and masks of one split.

    name     of the data set, for messages
    images   paths of the pictures, or member names when `archive` is given
    masks    the same of the masks, in the same order: PNGs of one channel, or SBD's .mat files
    table    see `label_table`
    archive  zip that holds both, None for files
    colours  (red, green, blue) that stand for the values 0, 1, ... of `table` in masks that are colour pictures; None:
             masks hold the values

    Raises UserError when there is no pair.
    """

    def __init__(
        self,
        *,
        name: str,
        images: list[str],
        masks: list[str],
        table: np.ndarray,
        archive: Path | None = None,
        colours: Sequence[tuple[int, int, int]] | None = None,
    ):
        if not images:
            raise UserError(f"{name} holds no pictures. Check data.root and the list of the split.")
        self.name, self.images, self.masks, self.table, self.archive = name, images, masks, table, archive
        self._codes = None if colours is None else np.array([_code(np.array(colour)) for colour in colours])
        self._zips: dict[int, zipfile.ZipFile] = {}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Picture uint8 (3, H, W) and mask uint8 (H, W), classes and 255. Raises UserError naming a file that cannot be
        read, a mask of another size than its picture, or one with a value that is no class."""
        place, mask = self.where(self.images[index]), self.mask(index)
        what = f"{self.name}: the picture {place}"
        image = np.array(read_picture(self._source(self.images[index], what), what=what))
        if image.shape[:2] != tuple(mask.shape):
            raise UserError(
                f"{self.name}: the mask {self.where(self.masks[index])} is {mask.shape[1]}x{mask.shape[0]}, its "
                f"picture {place} {image.shape[1]}x{image.shape[0]}. Put the mask that belongs to the picture there."
            )
        return torch.from_numpy(image).permute(2, 0, 1), mask

    def mask(self, index: int) -> Tensor:
        """The mask of `read` alone."""
        place = self.where(self.masks[index])
        values = self._values(self.masks[index], f"{self.name}: the mask {place}")
        if values.ndim != 2 or values.dtype.kind not in "ui":
            raise UserError(
                f"{self.name}: the mask {place} is a colour picture ({values.dtype} {values.shape}); masks hold one "
                "class number per pixel. Replace it by the data set's mask with 8-bit numbers or a palette."
            )
        labels = self.table[np.clip(values, 0, 255)]
        if labels.min(initial=0) < 0 or values.max(initial=0) > 255:
            wrong = labels == FORBIDDEN if labels.min() < 0 else values > 255
            row, column = np.argwhere(wrong)[0].tolist()
            raise UserError(
                f"{self.name}: the mask {place} holds the value {values[row, column]} in row {row}, column {column}, "
                f"which is no class; allowed are {_ranges(np.flatnonzero(self.table >= 0))}. Replace that mask."
            )
        return torch.from_numpy(labels.astype(np.uint8))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a picture, from the head of its file. Raises UserError as `read`."""
        what = f"{self.name}: the picture {self.where(self.images[index])}"
        return picture_size(self._source(self.images[index], what), what=what)

    def where(self, name: str) -> str:
        """A file's path, or `<zip>:<member>`."""
        return f"{self.archive}{ARCHIVE_SEPARATOR}{name}" if self.archive else name

    def fingerprint(self) -> str:
        """16 hex digits: names with sizes and, in a zip, checksums; reading every file would take minutes."""
        digest = hashlib.sha256(self.table.tobytes())
        if self._codes is not None:
            digest.update(self._codes.tobytes())
        for name in (*self.images, *self.masks):
            digest.update(f"{Path(name).name} {self._mark(name)}\n".encode())
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zips": {}}

    def _mark(self, name: str) -> str:
        if self.archive is None:
            return str(os.stat(name).st_size)
        info = self._zip().getinfo(name)
        return f"{info.file_size}-{info.CRC:08x}"

    def _values(self, name: str, what: str) -> np.ndarray:
        if self._codes is not None:
            return self._numbers_of_colours(np.array(read_picture(self._source(name, what), what=what)), what)
        if not name.endswith(".mat"):
            return read_values(self._source(name, what), what=what)
        from scipy.io import loadmat  # SBD: a struct with one field of interest

        try:
            return np.asarray(loadmat(name)["GTcls"][0]["Segmentation"][0])
        except (*UNREADABLE, NotImplementedError) as error:
            raise UserError(f"{what} cannot be read ({reason_of(error, name)}). {INTACT}") from error

    def _numbers_of_colours(self, pixels: np.ndarray, what: str) -> np.ndarray:
        """uint8 (H, W, 3) -> the number of each colour (H, W). Raises UserError for one that is not listed."""
        codes, order = _code(pixels), np.argsort(self._codes)
        places = np.searchsorted(self._codes, codes, sorter=order).clip(max=len(order) - 1)
        numbers = order[places]
        wrong = self._codes[numbers] != codes
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            raise UserError(
                f"{what} holds the colour {' '.join(map(str, pixels[row, column]))} in row {row}, column {column}, "
                "which is no class. List it among the classes, or set data.source.ignore to it. JPEG changes colours: "
                "save masks as PNG."
            )
        return numbers

    def _source(self, name: str, what: str) -> Path | bytes:
        return read_member(self._zip(), name, what=what) if self.archive else Path(name)

    def _zip(self) -> zipfile.ZipFile:
        # one handle per process: a file position shared with a forked worker would be read from two places
        process = os.getpid()
        if process not in self._zips:
            self._zips[process] = open_zip(self.archive)
        return self._zips[process]


def _code(colours: np.ndarray) -> np.ndarray:
    """(..., 3) of 0..255 -> (...) one number for each colour."""
    return colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def check_pairs(pairs: Pairs, count: int | None) -> None:
    """Reads `count` pairs, evenly spaced over the split; None: all of them. Raises UserError as `Pairs.read`."""
    wanted = len(pairs) if count is None else min(count, len(pairs))
    for number in range(wanted):
        pairs.read(number * len(pairs) // wanted)


def require_files(name: str, pairs: list[tuple[str, str]], listed: str) -> None:
    """Every picture and mask of `pairs` exists; folders are listed once, so that 20,000 files take moments.

    listed  where the names come from. Raises UserError naming the first missing file and how many are.
    """
    folders: dict[str, set[str]] = {}

    def missing(path: str) -> bool:
        folder, file = os.path.split(path)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return file not in folders[folder]

    for what, other, column in (("mask", "picture", 1), ("picture", "mask", 0)):
        gone = [pair for pair in pairs if missing(pair[column])]
        if gone:
            raise UserError(
                f"{name}: the {what} {gone[0][column]} of the {other} {gone[0][1 - column]} is missing ({len(gone)} of "
                f"{len(pairs)} are). Put it there, or check {listed}."
            )


def read_names(path: Path, name: str, fix: str) -> list[str]:
    """The names in a split file, one a line. Raises UserError when it is missing, unreadable, empty or repeats one."""
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{name}: the split file {path} {what}. {fix}") from error
    if not names:
        raise UserError(f"{name}: the split file {path} is empty. {fix}")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"{name}: the split file {path} names {twice} twice. {fix}")
    return names


def require_folder(path: Path, name: str, fix: str) -> Path:
    """`path` itself. Raises UserError when it is no folder."""
    if not path.is_dir():
        raise UserError(f"{name} not found: {path} is not a folder. {fix}")
    return path


def _ranges(values: np.ndarray) -> str:
    """0, 1, 2, 5 as "0..2, 5"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
