"""What an image data set must offer, and the one kind that fits in memory."""

import hashlib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, nearest
from common.files import sha256_file

# What Pillow, numpy and the zip reader raise for damaged bytes; PIL.UnidentifiedImageError is an OSError.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, struct.error)


class Images(Protocol):
    """One split of a data set: pictures of one size, addressed by number."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) 0..255 and labels int64 (B,) of `indices` (B,). Raises UserError naming a file
        that cannot be read."""

    def fingerprint(self) -> str:
        """16 hex digits that change when the content does."""


class Source(Protocol):
    """Where a data set lies and how it is read. Making one touches no file; `check` and `load` do."""

    name: str
    num_classes: int  # 0: no labels
    channels: int
    resolution: int  # pixels, width = height
    splits: tuple[str, ...]

    def check(self) -> None:
        """Cheap look whether the files are there. Raises UserError saying what was looked for, where, and the fix."""

    def load(self, split: str) -> Images:
        """The split, read and verified. Raises UserError naming the missing or damaged file."""


class ImageArray:
    """Images held in memory: `images` uint8 (N, C, H, W) 0..255, `labels` int64 (N,)."""

    def __init__(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor):
        # torch tensors, because those move to worker processes as shared memory instead of as copies
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels).to(torch.int64)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or len(self.images) != len(self.labels):
            raise ValueError(
                f"images must be uint8 (N, C, H, W) with one label each, got {self.images.dtype} "
                f"{tuple(self.images.shape)} and {len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[rows], self.labels[rows]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()[:16]


def check_split(split: str, splits: tuple[str, ...], name: str) -> str:
    """`split` itself. Raises UserError naming the data set, the nearest split and all of them."""
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}. {nearest(split, splits)}Splits: {', '.join(splits)}.")
    return split


def find_folder(root: str, candidates: list[str], probe: str, name: str, fix: str) -> Path:
    """First of `candidates` (folders below `root`, "" for root itself) that holds the file `probe`.

    Raises UserError: what was looked for, where, and `fix`.
    """
    base = Path(root).expanduser()
    for candidate in candidates:
        if (base / candidate / probe).is_file():
            return base / candidate
    places = " or ".join(str(base / candidate / probe) for candidate in candidates)
    gone = "" if base.is_dir() else f" (the folder {base} does not exist)"
    raise UserError(f"{name} not found: looked for {places}{gone}. {fix}")


def differs_from_sums(path: Path) -> bool:
    """Whether SHA256SUMS beside `path` has a line for it with another checksum; False without such a file or line."""
    sums = path.with_name("SHA256SUMS")
    if not sums.is_file():
        return False
    for line in sums.read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name.strip() == path.name:
            return sha256_file(path) != digest.strip()
    return False


def sha256(data: bytes | np.ndarray) -> str:
    """Hex sha256 of bytes or of an array's memory in C order."""
    return hashlib.sha256(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data).hexdigest()
