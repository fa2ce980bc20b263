"""The one reader of pictures: every data set, tool and task that decodes a picture of a user calls it.

So one rule holds everywhere:
- 16-bit grey (PNG, TIFF, PGM) becomes 8-bit as round(v / 257), which maps 65535 to 255; nothing is clipped
- a picture is turned upright as its EXIF orientation says
- files and folders whose names start with a dot, and `__MACOSX`, are not looked at
- what cannot be read is one sentence that names the file; a git-lfs pointer and a broken link are called so
"""

import io
import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from common.data.source import UNREADABLE
from common.errors import UserError
from common.files import lfs_pointer

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
INTACT = "Put an intact copy there."
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112  # the EXIF tag
_SWAPPED = (5, 6, 7, 8)  # orientations that exchange width and height

# Finding --------------------------------------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Whether a relative path leads through what file managers and notebooks leave behind: `.x`, `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def is_picture(name: str) -> bool:
    """Whether a relative path names a picture to be read: its ending is one of SUFFIXES and it is not hidden."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not is_hidden(name)


def list_pictures(folder: Path, *, recursive: bool = True, also: Collection[str] = ()) -> dict[str, int]:
    """Relative path with slashes -> size in bytes, of every picture below `folder`, sorted by path.

    recursive  False: only those directly in it
    also       names of other files that are listed, wherever they lie

    Links are followed, a link back to a folder above it is not. Raises UserError for a broken link.
    """
    found, visited = {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        identity = os.path.realpath(place)
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if recursive and not is_hidden(name))
        for name in names:
            full = Path(place) / name
            if is_picture(name) or (name in also):
                found[full.relative_to(folder).as_posix()] = _size_of(full)
    return dict(sorted(found.items()))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error, path)}). Repair or delete it.") from error


# Reading --------------------------------------------------------------------------------------------------------------


def read_picture(source: Path | str | bytes, *, what: str, fix: str = INTACT, channels: int = 3) -> Image.Image:
    """The picture upright, of 8 bits: mode RGB for 3 channels, L for 1.

    source  a path, or the bytes of the file
    what    how a message names it, e.g. "The picture a/b.png";   fix  the sentence after "cannot be read (why)."

    Raises UserError.
    """
    with _opened(source, what, fix) as picture:
        return _eight_bits(_upright(picture)).convert("RGB" if channels == 3 else "L")


def read_frames(source: Path | str | bytes, *, what: str, fix: str = INTACT) -> list[Image.Image]:
    """All frames of an animated picture as `read_picture` gives them; one of a still picture. Raises UserError."""
    with _opened(source, what, fix) as picture:
        return [_eight_bits(_upright(frame)).convert("RGB") for frame in ImageSequence.Iterator(picture)]


def read_values(source: Path | str | bytes, *, what: str, fix: str = INTACT) -> np.ndarray:
    """The numbers stored for the pixels, upright: (H, W), or (H, W, C) of a colour picture. Raises UserError.

    Of a picture with a palette these are the indices; of one bit per pixel 0 and 1; 16 bits stay as they are.
    """
    with _opened(source, what, fix) as picture:
        values = np.array(_upright(picture))
    return values.astype(np.uint8) if values.dtype == bool else values


def read_member(archive: zipfile.ZipFile, name: str, *, what: str, fix: str = INTACT) -> bytes:
    """The bytes of a file in a zip. Raises UserError; see `read_picture` for `what` and `fix`."""
    try:
        return archive.read(name)
    except (*UNREADABLE, NotImplementedError, RuntimeError) as error:  # the last two: packed oddly, encrypted
        raise UserError(f"{what} cannot be read ({error}). {fix}") from error


def picture_size(source: Path | str | bytes, *, what: str, fix: str = INTACT) -> tuple[int, int]:
    """(height, width) of the upright picture, from the head of the file alone. Raises UserError."""
    with _opened(source, what, fix) as picture:
        height, width = picture.height, picture.width
        return (width, height) if _orientation(picture) in _SWAPPED else (height, width)


@contextmanager
def _opened(source: Path | str | bytes, what: str, fix: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            yield picture
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} cannot be read ({reason_of(error, source)}). {fix}") from error


def reason_of(error: BaseException, source: Path | str | bytes) -> str:
    """Why a file cannot be read, in a few words without object addresses.

    source  the path or the bytes that were read
    """
    is_path = not isinstance(source, bytes)
    if lfs_pointer(source):
        name = f' --include="{Path(source).name}"' if is_path else ""
        return f"it is a git-lfs pointer, not the file itself; fetch that with git lfs pull{name}"
    if isinstance(error, FileNotFoundError):
        return "it is a link to a file that is gone" if is_path and os.path.islink(source) else "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture, or its head is damaged"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; other pictures as they are. Raises ValueError for 32 bits, whose range is unknown."""
    # Pillow calls 16-bit PGM "I", and scales it to 0..65535; an "I" of a TIFF has 32 bits
    if picture.mode in _SIXTEEN_BITS or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(v / 257): 257 is odd, no ties
    if picture.mode in ("I", "F"):
        raise ValueError("it has 32 bits per pixel, of unknown range; save it with 8 or 16")
    return picture


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation 1..8 that is still to be applied. Call it before the pixels are decoded."""
    if picture.format == "TIFF":
        return 1  # Pillow turns these itself
    if picture.format == "PNG" and not {"exif", "Raw profile type exif"} & picture.info.keys():
        return 1  # `getexif` would decode the whole picture to look behind the pixels as well
    return picture.getexif().get(_ORIENTATION, 1)


def _upright(picture: Image.Image) -> Image.Image:
    # the format is lost in a turned copy, and `_eight_bits` asks for it
    if _orientation(picture) == 1:
        picture.load()
        return picture
    turned = ImageOps.exif_transpose(picture)
    turned.format = picture.format
    return turned
