"""Parameter trees of JAX programs as flat dictionaries of tensors, read without JAX and without running anything.

Two kinds of files: `.npz`, whose names are the paths of the tree ("params/net/x_embedder/proj/kernel"), and the msgpack
file that `flax.serialization` writes. A checkpoint folder written by Orbax needs JAX to be read; where it was made,

    from flax.training import checkpoints
    from flax.traverse_util import flatten_dict
    state = checkpoints.restore_checkpoint(folder, target=None)
    numpy.savez("weights.npz", **flatten_dict({"params": state["ema_params"]}, sep="/"))

turns it into the first kind.
"""

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.archives import open_npz
from common.errors import UserError
from common.files import refuse_lfs_pointer

_NDARRAY, _SCALAR = 1, 3  # extension types of flax.serialization
_CHUNKED = "__msgpack_chunked_array__"


def read_flax(path: str | Path) -> dict[str, Tensor]:
    """Path in the tree, joined by "/" -> tensor, of an `.npz` or a flax msgpack file.

    Raises UserError that names the file when it is missing, a folder, truncated, or neither kind.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a checkpoint folder, which only JAX can read. "
            "Turn it into an .npz file where JAX is installed, as common/weights/flax.py shows."
        )
    if not path.is_file():
        raise UserError(f"Weights {path} do not exist. Check the path.")
    refuse_lfs_pointer(path)
    try:
        if zipfile.is_zipfile(path):
            with open_npz(path) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        data = memoryview(path.read_bytes())
        tree, end = _value(data, 0)
        if not isinstance(tree, dict) or end != len(data):
            raise ValueError("it is no tree of arrays")
        return dict(_leaves(tree, ()))
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        EOFError,
        OSError,
        RecursionError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{path} is truncated or no .npz or flax msgpack file ({error}). Copy it again.") from error


def _leaves(node: Any, above: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every array below `node`; numbers and words are left out."""
    if isinstance(node, dict) and node.get(_CHUNKED):
        shape = [int(node["shape"][str(i)]) for i in range(len(node["shape"]))]
        chunks = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        node = torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)
    if isinstance(node, Tensor):
        yield "/".join(above), node
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, (*above, str(name)))


# msgpack: one byte says the type (and, for small things, the size), then size, then content; numbers are big-endian.
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_SIZED = {0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I")}
_SIZED |= {0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I")}
_SIZED |= {0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I")}
_SIZED |= {0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}


def _value(data: memoryview, at: int) -> tuple[Any, int]:
    """The msgpack value that starts at byte `at`, and where the next one starts."""
    code, at = data[at], at + 1
    if code <= 0x7F or code >= 0xE0:
        return (code if code <= 0x7F else code - 256), at
    if code <= 0x8F:
        return _content("map", code & 0x0F, data, at)
    if code <= 0x9F:
        return _content("list", code & 0x0F, data, at)
    if code <= 0xBF:
        return _content("str", code & 0x1F, data, at)
    if code in _CONSTANTS:
        return _CONSTANTS[code], at
    if code in _NUMBERS:
        return struct.unpack_from(_NUMBERS[code], data, at)[0], at + struct.calcsize(_NUMBERS[code])
    if 0xD4 <= code <= 0xD8:
        return _content("ext", 1 << (code - 0xD4), data, at)
    kind, form = _SIZED[code]
    return _content(kind, struct.unpack_from(form, data, at)[0], data, at + struct.calcsize(form))


def _content(kind: str, size: int, data: memoryview, at: int) -> tuple[Any, int]:
    if kind in ("list", "map"):
        items = []
        for _ in range(size * (2 if kind == "map" else 1)):
            item, at = _value(data, at)
            items.append(item)
        return (dict(zip(items[::2], items[1::2])) if kind == "map" else items), at
    start = at + (kind == "ext")
    end = start + size
    if end > len(data):
        raise ValueError(f"ends at byte {len(data)}, {end} are needed")
    if kind == "ext":
        return _extension(data[at], data[start:end]), end
    return (str(data[start:end], "utf-8") if kind == "str" else data[start:end]), end


def _extension(code: int, payload: memoryview) -> Tensor | None:
    """An array: (shape, name of the dtype, bytes), itself in msgpack. Other extensions hold no weights: None."""
    if code not in (_NDARRAY, _SCALAR):
        return None
    (shape, name, content), _ = _value(payload, 0)
    dtype = getattr(torch, name if isinstance(name, str) else str(name, "utf-8"))
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape) if content else torch.empty(shape).to(dtype)
