"""Pictures in a folder or a zip: the general data source, ImageNet-64 included."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common import limits
from common.archives import open_zip
from common.data.pictures import is_hidden, is_picture, list_pictures, picture_size, read_member, read_picture
from common.data.source import UNREADABLE, check_split
from common.errors import UserError

FITS = ("exact", "center", "adm")
LABEL_FILE = "dataset.json"


class ImageFolder:
    """Pictures below a folder (recursively) or inside a zip.

    path         folder or zip of the train split
    test_path    folder or zip of the test split, None when there is none
    resolution   pixels, width = height
    channels     3 converts every picture to RGB, 1 to grey
    num_classes  classes the labels must stay below; 0 reads no labels
    fit          "exact": pictures must have the resolution already. "center": largest centred square, resized
                 (Lanczos). "adm": halve by boxes while twice too large, resize the short side (bicubic), crop the
                 centre, as Dhariwal & Nichol (arXiv 2105.05233) prepare ImageNet
    verify       decode every picture when the split is loaded, so that a damaged one stops the run before it starts
    name         name used in messages and beside numbers

    What counts as a picture and how it is read: `common.data.pictures`.

    Labels come from `dataset.json` (`{"labels": [["00000/img.png", 3], ...]}`, the layout of the EDM data tool) when
    there is one; else a picture's class is the rank of its top-level subfolder, as in torchvision's ImageFolder.
    """

    def __init__(
        self,
        *,
        path: str,
        resolution: int,
        test_path: str | None = None,
        channels: int = 3,
        num_classes: int = 0,
        fit: str = "exact",
        verify: bool = False,
        name: str = "folder",
    ):
        limits.choice("data.source.fit", fit, FITS)
        limits.choice("data.source.channels", channels, (1, 3))
        limits.whole("data.source.resolution", resolution, least=1)
        limits.whole("data.source.num_classes", num_classes)
        self.path = path
        self.test_path = test_path
        self.resolution = resolution
        self.channels = channels
        self.num_classes = num_classes
        self.fit = fit
        self.verify = verify
        self.name = name
        self.splits = ("train",) if test_path is None else ("train", "test")

    def check(self) -> None:
        for split in self.splits:
            self._place(split)

    def load(self, split: str) -> "ImageFiles":
        check_split(split, self.splits, self.name)
        files = ImageFiles(
            path=self._place(split),
            resolution=self.resolution,
            channels=self.channels,
            num_classes=self.num_classes,
            fit=self.fit,
        )
        if self.verify:
            for index in range(len(files)):
                files.read(index)
        return files

    def _place(self, split: str) -> Path:
        key = "path" if split == "train" else "test_path"
        path = Path(getattr(self, key)).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
            return path
        what = "is neither a folder nor a .zip" if path.exists() else "does not exist"
        raise UserError(
            f"Pictures of {self.name} not found: {path} {what}. Set data.root or data.source.{key} to the folder or "
            "zip that holds them."
        )


class ImageFiles:
    """The pictures of one folder or zip, decoded on demand; see `ImageFolder` for the arguments.

    Raises UserError when there is no picture, or when labels are asked for and missing or out of range.
    """

    def __init__(self, *, path: Path, resolution: int, channels: int, num_classes: int, fit: str):
        self.path = path
        self.resolution = resolution
        self.channels = channels
        self.fit = fit
        self._zips: dict[int, zipfile.ZipFile] = {}
        self._sizes = self._list_zip() if path.is_file() else self._list_folder()
        self.files = sorted(name for name in self._sizes if is_picture(name))
        if not self.files:
            raise UserError(f"{path} holds no pictures. Set data.root to another place, or put .png files there.")
        self.labels = self._read_labels(num_classes) if num_classes else np.zeros(len(self.files), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.asarray(indices, dtype=np.int64)
        images = np.stack([self.read(index) for index in rows.tolist()])
        return torch.from_numpy(images), torch.from_numpy(self.labels[rows])

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, uint8 (C, H, W). Raises UserError naming its path when it cannot be decoded."""
        what, fix = self._words(index)
        picture = read_picture(self._source(index, what, fix), what=what, fix=fix, channels=self.channels)
        if self.fit != "exact":
            picture = _fit(picture, self.resolution, self.fit)
        elif picture.size != (self.resolution, self.resolution):
            raise UserError(
                f"{what} is {picture.width}x{picture.height}, not "
                f"{self.resolution}x{self.resolution}. Set data.source.fit=center to crop and resize, or change "
                "data.source.resolution."
            )
        pixels = np.asarray(picture)
        return pixels[None].copy() if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index` as it is stored. Raises UserError as `read`."""
        what, fix = self._words(index)
        return picture_size(self._source(index, what, fix), what=what, fix=fix)

    @property
    def numbered(self) -> bool:
        """Whether `dataset.json` numbers the classes, instead of subfolders."""
        return LABEL_FILE in self._sizes

    def where(self, index: int) -> str:
        """Path of picture `index`; inside a zip `<zip>:<member>`."""
        return f"{self.path}:{self.files[index]}" if self.path.is_file() else str(self.path / self.files[index])

    def fingerprint(self) -> str:
        # names, sizes and (in a zip) checksums: reading a million pictures to name a data set would take minutes
        facts = [[name, self._sizes[name], int(label)] for name, label in zip(self.files, self.labels)]
        text = json.dumps([self.resolution, self.channels, self.fit, facts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zips": {}}

    def _words(self, index: int) -> tuple[str, str]:
        """How a message names picture `index`, and what to do when it cannot be read."""
        return f"Image {index} of the data set, {self.where(index)},", "Replace or delete that file."

    def _source(self, index: int, what: str, fix: str) -> Path | bytes:
        if not self.path.is_file():
            return self.path / self.files[index]
        return read_member(self._zip(), self.files[index], what=what, fix=fix)

    def _bytes(self, name: str) -> bytes:
        return self._zip().read(name) if self.path.is_file() else (self.path / name).read_bytes()

    def _zip(self) -> zipfile.ZipFile:
        # one handle per process: a file position shared with a forked worker would be read from two places
        process = os.getpid()
        if process not in self._zips:
            self._zips[process] = open_zip(self.path)
        return self._zips[process]

    def _list_zip(self) -> dict[str, str]:
        try:
            members = [info for info in self._zip().infolist() if not is_hidden(info.filename)]
            return {info.filename: f"{info.file_size}-{info.CRC:08x}" for info in members}
        except UNREADABLE as error:
            raise UserError(f"{self.path} cannot be read as a zip ({error}). Put an intact copy there.") from error

    def _list_folder(self) -> dict[str, str]:
        return {name: str(size) for name, size in list_pictures(self.path, also=(LABEL_FILE,)).items()}

    def _read_labels(self, num_classes: int) -> np.ndarray:
        labels = self._labels_from_json() if self.numbered else self._labels_from_folders()
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"{self.path} holds labels {labels.min()}..{labels.max()}, but data.source.num_classes is "
                f"{num_classes}. Set data.source.num_classes to at least {labels.max() + 1}, or 0 for no labels."
            )
        return labels

    def _labels_from_json(self) -> np.ndarray:
        place = f"{self.path}{':' if self.path.is_file() else '/'}{LABEL_FILE}"
        try:
            pairs = json.loads(self._bytes(LABEL_FILE))["labels"]
            table = {str(name).replace("\\", "/"): label for name, label in pairs}
            return np.asarray([int(table[name]) for name in self.files], dtype=np.int64)
        except (TypeError, *UNREADABLE) as error:
            raise UserError(
                f"{place} does not give one whole-number label for every picture ({type(error).__name__}: {error}). "
                "Repair it, or set data.source.num_classes=0 to read no labels."
            ) from error

    def _labels_from_folders(self) -> np.ndarray:
        loose = [name for name in self.files if "/" not in name]
        if loose:
            raise UserError(
                f"{self.path} has no class for {loose[0]}: there is no {LABEL_FILE} and the picture lies in no "
                "subfolder. Sort the pictures into one folder per class, or set data.source.num_classes=0."
            )
        classes = sorted({name.split("/")[0] for name in self.files})
        ranks = {name: rank for rank, name in enumerate(classes)}
        return np.asarray([ranks[name.split("/")[0]] for name in self.files], dtype=np.int64)


def _fit(picture: Image.Image, resolution: int, fit: str) -> Image.Image:
    """The picture as resolution x resolution; `fit` as in `ImageFolder`."""
    if fit == "center":
        return ImageOps.fit(picture, (resolution, resolution), method=Image.Resampling.LANCZOS)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))
