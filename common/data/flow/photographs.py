"""Photographs that generated pairs are made of: scikit-image's, and folders or zips of pictures."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import limits
from common.archives import open_zip
from common.data.pictures import is_picture, list_pictures, read_member, read_picture
from common.data.source import UNREADABLE
from common.errors import UserError

# those that come with the package itself; the last three are held out
BUNDLED = (
    "astronaut", "brick", "camera", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry",
    "moon", "retina", "rocket",
)  # fmt: skip
BUNDLED_HELD_OUT = ("chelsea", "clock", "stereo_motorcycle")
LONGEST = 1024  # pixels; larger pictures are shrunk when read
KEPT = 96  # pictures in memory


class Photographs:
    """Pictures by split, train or held_out, in the order of their names.

    folders   folders (searched recursively) or zips
    bundled   also scikit-image's
    held_out  share of the pictures of `folders` that are held out, [0, 1): every picture number that falls on it

    Raises UserError for a bad share.
    """

    def __init__(self, *, folders: Sequence[str] = (), bundled: bool = True, held_out: float = 0.1):
        limits.number("source.held_out", held_out, least=0, below=1)
        if isinstance(folders, str):
            raise UserError(f"source.folders must be a list, got {folders!r}. Set source.folders=[{folders}].")
        self.folders, self.bundled, self.held_out = [Path(f).expanduser() for f in folders], bundled, held_out

    def names(self, split: str) -> list[tuple[Path | None, str]]:
        """(folder or zip, name in it) of each picture, None for scikit-image's. Raises UserError when there is none."""
        found: list[tuple[Path | None, str]] = []
        if self.bundled:
            found += [(None, name) for name in (BUNDLED if split == "train" else BUNDLED_HELD_OUT)]
        for place in self.folders:
            inside = _pictures(place)
            # evenly spread, so that a folder of several scenes gives some of each
            out = [math.floor((i + 1) * self.held_out) > math.floor(i * self.held_out) for i in range(len(inside))]
            found += [(place, name) for name, held in zip(inside, out) if held == (split == "held_out")]
        if not found:
            raise UserError(
                f"synthflow has no photographs for {split}. Set source.bundled=true, name a folder with more "
                "pictures in source.folders, or raise source.held_out."
            )
        return found

    def of(self, split: str) -> "PhotographList":
        return PhotographList(self.names(split))


class PhotographList:
    """Pictures by number, decoded on first use."""

    def __init__(self, names: list[tuple[Path | None, str]]):
        self.names = names
        self._levels: OrderedDict[int, list[Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.names)

    def level(self, number: int, step: float) -> tuple[Tensor, int]:
        """Picture float32 (3, h, w) 0..255 shrunk 1, 2 or 4 times, such that samples `step` of its original pixels
        apart are at most about one of these apart; and how many times."""
        if number not in self._levels:
            while len(self._levels) >= KEPT:
                self._levels.popitem(last=False)
            full = torch.from_numpy(read_photograph(*self.names[number])).permute(2, 0, 1).float().contiguous()
            levels = [full]
            for _ in range(2):
                small = F.avg_pool2d(levels[-1], 2) if min(levels[-1].shape[1:]) >= 16 else levels[-1]
                levels.append(small)
            self._levels[number] = levels
        self._levels.move_to_end(number)
        levels = self._levels[number]
        depth = min(max(0, math.ceil(math.log2(step) - 0.1)), 2)
        chosen = levels[depth]
        return chosen, max(1, round(levels[0].shape[1] / chosen.shape[1]))

    def fingerprint(self, facts: str) -> str:
        """16 hex digits of the names and `facts`."""
        lines = [facts, *(f"{place.name if place else 'skimage'}/{name}" for place, name in self.names)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_levels": OrderedDict()}


def _pictures(place: Path) -> list[str]:
    """Names of the pictures in a folder or zip, sorted. Raises UserError when it is neither, or empty."""
    if place.is_dir():
        names = list(list_pictures(place))
    elif place.is_file() and place.suffix.lower() == ".zip":
        try:
            with open_zip(place) as archive:
                names = [name for name in archive.namelist() if is_picture(name)]
        except UNREADABLE as error:
            raise UserError(f"{place} cannot be read as a zip ({error}). Put an intact copy there.") from error
    else:
        raise UserError(f"source.folders: {place} is neither a folder nor a zip. Name one that holds photographs.")
    if not names:
        raise UserError(f"source.folders: {place} holds no pictures. Name a folder or zip that holds photographs.")
    return sorted(names)


def read_photograph(place: Path | None, name: str) -> np.ndarray:
    """uint8 (H, W, 3), no side longer than LONGEST.

    place  a folder, a zip, or None for the photographs inside scikit-image
    Raises UserError naming a photograph that cannot be read.
    """
    what = f"The photograph {place / name if place else name}"
    if place is None:
        from skimage import data

        pixels = getattr(data, name)()
        picture = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
    elif place.is_dir():
        picture = read_picture(place / name, what=what)
    else:
        with open_zip(place) as archive:
            picture = read_picture(read_member(archive, name, what=what), what=what)
    if max(picture.size) > LONGEST:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    return np.array(picture)
