"""Files that are either complete or not there: atomic writes, checksums, and errors that name the path.

A reader never sees half a file: everything is written to a temporary file in the same folder, flushed to the disk and
then renamed over the old one. When the disk is full the old file is untouched.
"""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError

CHECKSUM_SUFFIX = ".sha256"
NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"

_REASONS = {
    errno.ENOSPC: "the disk is full. Free some space and run again",
    errno.EDQUOT: "the disk quota is used up. Free some space and run again",
    errno.EROFS: "the file system is read-only. Choose another output folder",
    errno.EACCES: "there is no permission to write there. Choose another output folder or change its permissions",
    errno.EPERM: "writing there is not permitted. Choose another output folder or change its permissions",
    errno.ENOTDIR: "part of that path is a file, not a folder. Choose another output folder",
    errno.EEXIST: "part of that path is a file, not a folder. Choose another output folder",
    errno.EISDIR: "there is a folder of that name. Choose another name",
}


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary Path in the folder of `path`; when the block ends well it replaces `path` in one step.

    The temporary file keeps the suffix of `path` (writers such as numpy and matplotlib look at it) and starts with a
    dot. It is removed when the block raises. The folder is created when missing.

    Raises UserError when the disk is full or the place cannot be written: it names `path`, and the old file is intact.
    """
    path = Path(path)
    tmp = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
        _fsync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename).parent not in (path.parent, *path.parents):
            raise  # about another file that the block touched
        raise write_error(path, error) from error
    except Exception as error:
        # torch.save and safetensors report a full disk as their own error types, with the cause only in the text
        if "No space left on device" in str(error) or "os error 28" in str(error):
            raise write_error(path, OSError(errno.ENOSPC, "No space left on device")) from error
        raise
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def write_error(path: str | os.PathLike, error: OSError) -> Exception:
    """The UserError for a failed write to `path`, or `error` itself when a user cannot fix it."""
    reason = _REASONS.get(error.errno or 0)
    if reason is None:
        return error
    kept = " The previous file is intact." if Path(path).is_file() else ""
    return UserError(f"Cannot write {path}: {reason}.{kept}")


def atomic_write(path: str | os.PathLike, writer: Callable[[Path], Any]) -> None:
    """Calls `writer(tmp)` and then replaces `path`; see `atomic`."""
    with atomic(path) as tmp:
        writer(tmp)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` by `data` atomically."""
    with atomic(path) as tmp:
        tmp.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces `path` by `text` (UTF-8) atomically."""
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Replaces `path` by `obj` as indented JSON atomically. Raises TypeError for what JSON cannot hold.

    JSON has no infinity: numbers that are not finite are written as the words of `NOT_FINITE`, for `with_numbers`.
    """
    write_text(path, json.dumps(_with_words(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _with_words(obj: Any) -> Any:
    if isinstance(obj, float) and not math.isfinite(obj):
        return "NaN" if math.isnan(obj) else "Infinity" if obj > 0 else "-Infinity"
    if isinstance(obj, dict):
        return {key: _with_words(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_with_words(value) for value in obj]
    return obj


def with_numbers(obj: Any) -> Any:
    """What `read_json` gave, the words for infinities and NaN turned back into numbers."""
    if isinstance(obj, str):
        return NOT_FINITE.get(obj, obj)
    if isinstance(obj, dict):
        return {key: with_numbers(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [with_numbers(value) for value in obj]
    return obj


def read_json(path: str | os.PathLike) -> Any:
    """The object in a JSON file. Raises UserError that names the file when it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. Check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}). Write it again.") from error


def sha256_file(path: str | os.PathLike) -> str:
    """sha256 of the file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lfs_pointer(source: str | os.PathLike | bytes) -> bool:
    """Whether a file (or the bytes of one) is what git-lfs leaves in place of a file that was not fetched."""
    if isinstance(source, bytes):
        return source.startswith(_LFS_HEAD)
    try:
        with open(source, "rb") as file:
            return file.read(len(_LFS_HEAD)) == _LFS_HEAD
    except OSError:
        return False


def refuse_lfs_pointer(path: str | os.PathLike) -> None:
    """Raises UserError with the command that fetches the file when `path` is a git-lfs pointer."""
    if lfs_pointer(path):
        raise UserError(
            f"{path} is a git-lfs pointer, not the file itself. Fetch that in its repository with: "
            f'git lfs pull --include="{Path(path).name}"'
        )


def checksum_path(path: str | os.PathLike) -> Path:
    """Where the checksum of `path` is kept: `<path>.sha256`, in the format of `sha256sum`."""
    path = Path(path)
    return path.with_name(path.name + CHECKSUM_SUFFIX)


def write_checksum(path: str | os.PathLike) -> str:
    """Writes `<path>.sha256` and returns the checksum (64 hex digits)."""
    digest = sha256_file(path)
    write_text(checksum_path(path), f"{digest}  {Path(path).name}\n")
    return digest


def verify_checksum(path: str | os.PathLike) -> bool | None:
    """True when the file is the one `<path>.sha256` was written for, False when not, None when there is no sidecar."""
    sidecar = checksum_path(path)
    if not sidecar.is_file():
        return None
    words = sidecar.read_text(encoding="utf-8", errors="replace").split()
    return bool(words) and words[0].lower() == sha256_file(path)


def _fsync_folder(folder: Path) -> None:
    # The rename itself is only durable once the folder is flushed; some file systems refuse, which is no failure.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
