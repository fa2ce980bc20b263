"""Lists of picture pairs with ground truth on disk, read and checked pair by pair."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.data.flow.augment import UNKNOWN_ABOVE
from common.data.flow.files import image_size, read_flow, read_image
from common.errors import UserError


class FlowPairs(Protocol):
    """One split: pairs addressed by number."""

    endless: bool  # True: any number >= 0 is a pair of its own; `len` is what one pass of a mixture takes

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, Tensor]:
        """first, second uint8 (3, H, W); flow float32 (2, H, W) pixels; valid float32 (H, W); some also occluded
        float32 (H, W), 1 where the pixel of the first picture is hidden or outside in the second. Raises UserError."""

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) without reading everything."""

    def fingerprint(self) -> str:
        """16 hex digits that change when the content does."""


class FlowSource(Protocol):
    """Where pairs lie and how they are read. Making one touches no file; `check` and `load` do."""

    name: str
    splits: tuple[str, ...]

    def check(self, split: str) -> None:
        """Whether the files of the split are there. Raises UserError with the expected layout."""

    def load(self, split: str) -> FlowPairs:
        """The split, listed; nothing is decoded yet. Raises UserError."""


class FilePairs:
    """Pairs in files.

    name     of the data set, for messages
    images   (first, second) paths of each pair
    flows    path of each ground truth
    scales   steps per pixel of each .png, one for all or one each (`common.data.flow.files.read_flow`)
    dense    True: components of 1000 pixels and more are not valid, as in the released code

    Raises UserError when there is no pair.
    """

    endless = False

    def __init__(
        self,
        *,
        name: str,
        images: Sequence[tuple[str, str]],
        flows: Sequence[str],
        scales: float | Sequence[float] = 64.0,
        dense: bool = True,
    ):
        if not images:
            raise UserError(f"{name} holds no pairs. Check data.root.")
        self.name, self.images, self.flows, self.dense = name, list(images), list(flows), dense
        self.scales = [float(scales)] * len(flows) if isinstance(scales, int | float) else [float(x) for x in scales]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> dict[str, Tensor]:
        """See `FlowPairs`. Raises UserError naming a missing or damaged file, or one of another size than its pair."""
        first, second = (self._named(read_image, path) for path in self.images[index])
        flow, valid = self._named(read_flow, self.flows[index], scale=self.scales[index])
        if first.shape != second.shape:
            raise self._other_size("second picture", self.images[index][1], second, index, first)
        if flow.shape[1:] != first.shape[1:]:
            raise self._other_size("flow", self.flows[index], flow, index, first)
        if self.dense:
            valid = valid * (flow.abs() < UNKNOWN_ABOVE).all(0)
        return {"first": first, "second": second, "flow": flow, "valid": valid}

    def size(self, index: int) -> tuple[int, int]:
        return self._named(image_size, self.images[index][0])

    def fingerprint(self) -> str:
        """Names with sizes of the files: reading them all would take minutes."""
        digest = hashlib.sha256()
        for (first, second), flow, scale in zip(self.images, self.flows, self.scales):
            for path in (first, second, flow):
                try:
                    digest.update(f"{Path(path).name} {os.stat(path).st_size} {scale:g}\n".encode())
                except OSError as error:
                    raise UserError(f"{self.name}: {path} is missing. Put it there, or check data.root.") from error
        return digest.hexdigest()[:16]

    def require(self) -> None:
        """Raises UserError naming the first missing file of the pairs."""
        folders: dict[str, set[str]] = {}
        for pair, flow in zip(self.images, self.flows):
            for path in (*pair, flow):
                folder, file = os.path.split(path)
                if folder not in folders:  # listed once: 40,000 files take moments
                    folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
                if file not in folders[folder]:
                    raise UserError(f"{self.name}: {path} is missing. Put it there, or check data.root.")

    def _named(self, reader, path: str, **options):
        try:
            return reader(path, **options)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def _other_size(self, what: str, path: str, found: Tensor, index: int, first: Tensor) -> UserError:
        return UserError(
            f"{self.name}: the {what} {path} is {found.shape[2]}x{found.shape[1]}, its picture {self.images[index][0]} "
            f"{first.shape[2]}x{first.shape[1]}. Put the file that belongs to the picture there."
        )


def stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of one size as a batch, of what all of them have."""
    names = [name for name in samples[0] if all(name in sample for sample in samples)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}
