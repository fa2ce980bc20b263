"""Weights from files, without running anything a file contains, and into modules, with every gap reported."""

import fnmatch
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.archives import open_zip
from common.errors import UserError
from common.files import checksum_path, refuse_lfs_pointer, verify_checksum

# What wrappers put in front of the names: Lightning modules, DDP, torch.compile, EMA containers.
PREFIXES = ("model.", "module.", "net.", "ema.")
# Tensors a file may have and a network may lack: EDM was trained with augmentation labels, ECT is tuned without.
DROPPED = ("*map_augment.weight",)
# What torch raises for a damaged file.
_DAMAGED = (
    zipfile.BadZipFile, MemoryError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
    AttributeError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_into` did.

    missing and mismatched are names in the module, unexpected and skipped names in the file (prefix repaired);
    outside counts tensors of the file that lie under another prefix than the one taken.
    """

    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    outside: int = 0
    stripped: str = ""
    added: str = ""

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        if self.stripped or self.added:
            parts.append(f"prefix {self.stripped or 'none'!r} read as {self.added or 'none'!r}")
        if self.outside:
            parts.append(f"{self.outside} under other prefixes ignored")
        for word in ("missing", "unexpected", "mismatched", "skipped"):
            names = getattr(self, word)
            if names:
                parts.append(f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        return ", ".join(parts)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor (on the CPU) of a safetensors file, a torch file, or a folder written by `export`.

    A torch file is read with `weights_only=True`; of a checkpoint its `state_dict` (or `model`, `ema`) is taken.
    A checksum in `<path>.sha256` is verified when there is one.
    Raises UserError that names the file when it is missing, truncated, altered, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"Weights {path} do not exist. Check the path.")
    refuse_lfs_pointer(path)
    if verify_checksum(path) is False:
        raise UserError(
            f"{path} is damaged or was changed: its sha256 is not the one in {checksum_path(path).name}. "
            "Copy it again, or delete that file if the change was yours."
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        raise UserError(f"{path} is a pickle. Convert it first: python -m tools.import_weights edm {path}")
    return _state_dict_of(read_torch(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}). Copy it again.") from error


def read_torch(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What a file of `torch.save` holds: tensors and plain data. The one reader of such files; runs nothing in them.

    mmap   leave the tensors in the file until they are used, for a look at one number
    Raises UserError that names the file when it is missing, truncated, would unpack to far more than its size, or asks
    for anything but tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Check the path.")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            open_zip(path).close()
        with torch.serialization.safe_globals([Namespace]):  # the options of a program, kept beside its weights
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and zipped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {unsafe(error)}. Save its state_dict with safetensors.") from error
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is truncated or not a torch file ({reason}). Copy it again.") from error


def stored_step(path: str | Path) -> int:
    """Optimiser steps behind a checkpoint of a run; its tensors are not read.

    Raises UserError that names the file, as `read_torch` does, and when it holds no such number.
    """
    content = read_torch(path, mmap=True)
    step = content.get("global_step") if isinstance(content, Mapping) else None
    if not isinstance(step, int):
        raise UserError(f"{path} is no checkpoint of a run: it holds no global_step. Give a step-*.ckpt.")
    return step


def unsafe(error: Exception) -> str:
    """Why torch refused to read a file, in our words: torch's own message explains how to disable the check."""
    asked = re.search(r"(?:GLOBAL|Unsupported (?:class|global:?(?: GLOBAL)?)) ([\w.]*\w)", str(error))
    if asked:
        return f"it asks for {asked[1]}, and only tensors and plain data are read; nothing was run"
    return "it is damaged, or holds more than tensors and plain data; nothing was run"


def _state_dict_of(content, path: Path) -> dict[str, Tensor]:
    for key in ("", "state_dict", "ema", "model", "model_state_dict"):
        found = content.get(key) if key and isinstance(content, Mapping) else content if not key else None
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return {str(name): value for name, value in found.items()}
    held = type(content).__name__
    if isinstance(content, Mapping):
        held = f"the keys {', '.join(map(str, list(content)[:6]))}"
    raise UserError(f"{path} holds no state_dict but {held}. Save the tensors as one dictionary of name -> tensor.")


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    strict: bool = True,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
    name: str = "the checkpoint",
) -> LoadReport:
    """Copies `tensors` into the parameters and buffers of `module` (their dtype and device are kept).

    prefix   take only the tensors below this prefix, e.g. "ema."; None repairs the usual wrapper prefixes (`PREFIXES`
             and torch.compile's `_orig_mod.`) when that makes names match
    ignore   glob patterns of names that may be missing or left over (they are reported)
    strict   every other tensor must be there with its shape; False loads what fits and reports the rest
    name     name of the source in messages

    Nothing is changed when it raises. Tensors named `map_augment.weight` that the module does not have are always
    skipped. Raises UserError when the names or shapes are those of another architecture.
    """
    want = {key.replace("_orig_mod.", ""): (key, value) for key, value in module.state_dict(keep_vars=True).items()}
    have, stripped, added = _repair(tensors, set(want), prefix, name)

    missing = [key for key in want if key not in have]
    left = [key for key in have if key not in want]
    skipped = [key for key in left if _matches(key, (*DROPPED, *ignore))]
    unexpected = [key for key in left if key not in skipped]
    mismatched = [key for key in want if key in have and have[key].shape != want[key][1].shape]
    refused = [key for key in missing + mismatched if not _matches(key, ignore)]
    if strict and (refused or unexpected):
        raise UserError(_other_architecture(module, have, want, missing, unexpected, mismatched, refused, name))

    ready = {want[key][0]: value for key, value in have.items() if key in want and key not in mismatched}
    module.load_state_dict(ready, strict=False)
    return LoadReport(
        loaded=len(ready),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        skipped=tuple(skipped),
        outside=len(tensors) - len(have),
        stripped=stripped,
        added=added,
    )


def load_file_into(
    module: nn.Module, path: str | Path, *, strict: bool = True, prefix: str | None = None, ignore: Sequence[str] = ()
) -> LoadReport:
    """`load_tensors` and `load_into` in one, with the file named in every message."""
    return load_into(module, load_tensors(path), strict=strict, prefix=prefix, ignore=ignore, name=str(path))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _repair(tensors: Mapping[str, Tensor], want: set[str], prefix: str | None, name: str):
    """(renamed tensors, prefix taken away, prefix put on): the renaming under which most names match."""
    plain = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    if prefix is not None:
        below = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
        if not below:
            raise UserError(f"{name} has no tensor below prefix {prefix!r}; its names begin {_begin(plain)}.")
        return below, prefix, ""

    chains = ["", *PREFIXES, *("".join(pair) for pair in product(PREFIXES, PREFIXES))]
    found = []  # (names that match, prefix taken away, prefix put on), the smallest change first
    for away, put in sorted(product(chains, ["", *PREFIXES]), key=lambda pair: len(pair[0]) + len(pair[1])):
        sources = {key for key in plain if key.startswith(away) and put + key.removeprefix(away) in want}
        found.append((sources, away, put))
    sources, away, put = max(found, key=lambda entry: len(entry[0]))
    rivals = [entry for entry in found if sources and len(entry[0]) == len(sources) and not entry[0] & sources]
    if rivals:
        raise UserError(
            f"{name} holds several copies of these weights. Choose one with prefix={away!r} or prefix={rivals[0][1]!r}."
        )
    return {put + key.removeprefix(away): value for key, value in plain.items() if key.startswith(away)}, away, put


def _begin(names) -> str:
    heads = sorted({key.split(".")[0] for key in names})
    return ", ".join(heads[:5]) + (", ..." if len(heads) > 5 else "")


def _other_architecture(module, have, want, missing, unexpected, mismatched, refused, name: str) -> str:
    def show(value) -> str:
        return str(tuple(value.shape)) if value is not None else "absent"

    first = next((key for key in mismatched if key in refused), (refused or unexpected)[0])
    there, here = have.get(first), want[first][1] if first in want else None
    return (
        f"{name} does not fit {type(module).__name__}: {len(missing)} missing, {len(unexpected)} unexpected and "
        f"{len(mismatched)} mismatched tensors, first {first}: {show(there)} in the file, {show(here)} in the network. "
        "Set the network's options to those the weights were made with, or choose other weights."
    )
