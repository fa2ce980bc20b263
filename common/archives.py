"""Archives (zip, npz) whose table of contents is checked before anything is unpacked."""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.lib import format as npy

# A small compressed file can unpack to more than the memory holds. Deflate reaches 1,032 : 1 on zeros; pictures, text
# and weights stay below 30 : 1. Up to FREE_BYTES the ratio does not count.
MOST_RATIO, FREE_BYTES, MOST_MEMBERS = 200, 64 << 20, 4_000_000


def open_zip(file: str | os.PathLike | IO[bytes]) -> zipfile.ZipFile:
    """The zip archive, opened for reading after its table of contents was checked; nothing is unpacked for that.

    Raises zipfile.BadZipFile when it is no zip, holds more than `MOST_MEMBERS` members, has members that share bytes,
    or would unpack to more than `FREE_BYTES` at over `MOST_RATIO` times its size. (Python reads no more of a member
    than its entry in the table says.)
    """
    archive = zipfile.ZipFile(file)
    try:
        members = archive.infolist()
        packed, unpacked = sum(m.compress_size for m in members), sum(m.file_size for m in members)
        if len(members) > MOST_MEMBERS:
            raise zipfile.BadZipFile(f"it holds {len(members):,} members, more than {MOST_MEMBERS:,}")
        if packed > _size(archive.fp):
            raise zipfile.BadZipFile("its members overlap")
        if unpacked > FREE_BYTES and unpacked > MOST_RATIO * packed:
            raise zipfile.BadZipFile(f"it would unpack from {packed:,} to {unpacked:,} bytes, and is refused")
        for m in members:
            if m.file_size > FREE_BYTES and m.file_size > MOST_RATIO * m.compress_size:
                raise zipfile.BadZipFile(
                    f"{m.filename} would unpack from {m.compress_size:,} to {m.file_size:,} bytes, and is refused"
                )
    except BaseException:
        archive.close()
        raise
    return archive


def _size(file: IO[bytes] | None) -> int:
    if file is None:
        return 0
    at = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(at)
    return size


@contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz file by name, read when asked for; objects are never unpickled.

    Raises zipfile.BadZipFile as `open_zip` does, also for an array whose header announces more than its member holds.
    """
    with open_zip(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    _check_npy(file, member.file_size, member.filename)
    with np.load(path, allow_pickle=False) as arrays:
        yield arrays


def _check_npy(file: IO[bytes], size: int, name: str) -> None:
    version = npy.read_magic(file)
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size:
        raise zipfile.BadZipFile(f"{name} announces an array of shape {shape} in {size:,} bytes")
