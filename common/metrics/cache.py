"""Files a metric may lose and make again: written in one piece, refused when damaged."""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.errors import UserError


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Puts `data` at `path`; readers (and other ranks writing the same file) see the old or the new file, never half.

    Raises UserError when the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}. Choose a writable folder with free space.") from error


def short_hash(*parts: bytes | str) -> str:
    """First 16 hex digits of the SHA-256 of the parts, each preceded by its length so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def tensors_hash(tensors: Mapping[str, Tensor], *extra: str) -> str:
    """16 hex digits of names, types, shapes and bytes of the tensors, and of the `extra` strings."""
    parts: list[bytes | str] = [*extra]
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), tensor.numpy().tobytes()]
    return short_hash(*parts)


def safe_name(text: str) -> str:
    """`text` with everything a file name should not hold replaced by a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
