"""A folder of encoded images: the moments of their latents in shards, written by `tools.encode_latents`.

    encoding.json               what is encoded and how; written first, never changed
    shard-00000.safetensors     `moments` (n, V, 2c, h, w), `label` int64 (n,); V: the image, and its mirror image
    shard-00000.safetensors.sha256
    index.json                  encoding.json and every shard's size and checksum; written when all shards are there

Moments are the mean and then the standard deviation on the channel axis, unscaled, as the MeanFlow release stores them
(Gsunshine/meanflow, `prepare_dataset.py`). Shard k holds images k * shard_size and on, in the order of their paths.
"""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import checksum_path, read_json, sha256_file, verify_checksum, write_bytes, write_checksum, write_json

FORMAT = 1
ENCODING, INDEX = "encoding.json", "index.json"
STORED = {"F32": np.float32, "F16": np.float16, "I64": np.int64}  # names of types in safetensors files


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_count(facts: dict) -> int:
    return math.ceil(facts["images"] / facts["shard_size"])


def begin(folder: Path, facts: dict) -> None:
    """Writes `encoding.json`. Raises UserError when the folder holds latents encoded in another way.

    facts  JSON: images (their number), source (fingerprint of the images), size, fit, mirrored, autoencoder,
           arithmetic, stored, shard_size, num_classes, classes, command; all but the last must stay what they were
    """
    place = folder / ENCODING
    if not place.is_file():
        write_json(place, {"format": FORMAT, **facts})
        return
    before = read_json(place)
    for key, value in {"format": FORMAT, **facts}.items():
        if key != "command" and before.get(key) != value:
            raise UserError(
                f"{folder} holds latents encoded with other settings: {key} was {_short(before.get(key))}, is "
                f"{_short(value)}. Give another folder, or the settings of that one: {shlex.join(before['command'])}"
            )


def write_shard(path: Path, moments: np.ndarray, label: np.ndarray, skipped: Sequence[str] = ()) -> None:
    """Writes one shard and its checksum, each complete or not at all.

    moments  (n, V, 2c, h, w) float32 or float16;   label  (n,) int64
    skipped  names of the images left out
    """
    from safetensors.numpy import save

    # one entry alone: safetensors writes several in changing order, and equal shards should be equal files
    about = {"skipped": json.dumps(list(skipped))}
    # written here, because safetensors gives its files to their owner alone
    write_bytes(path, save({"moments": moments, "label": np.asarray(label, dtype=np.int64)}, metadata=about))
    write_checksum(path)


def is_finished(folder: Path, number: int) -> bool:
    """Whether a shard is there and is, by its checksum, the one that was written."""
    path = folder / shard_name(number)
    return path.is_file() and verify_checksum(path) is True


def finish(folder: Path) -> dict | None:
    """Writes `index.json` and returns it when every shard is there; None while some are missing."""
    facts = read_json(folder / ENCODING)
    paths = [folder / shard_name(number) for number in range(shard_count(facts))]
    if not all(path.is_file() and checksum_path(path).is_file() for path in paths):
        return None
    shards, shape = [], None
    for path in paths:
        arrays, skipped = open_shard(path)
        shape = list(arrays["moments"].shape[1:])
        digest = checksum_path(path).read_text(encoding="utf-8").split()[0]
        shards.append({
            "file": path.name, "count": len(arrays["label"]), "bytes": path.stat().st_size, "sha256": digest,
            "skipped": skipped,
        })  # fmt: skip
    index = {
        **facts, "channels": shape[1] // 2, "resolution": shape[-1], "count": sum(s["count"] for s in shards),
        "shards": shards,
    }  # fmt: skip
    write_json(folder / INDEX, index)
    return index


def open_shard(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """(name -> array mapped from the file, names of skipped images); reads the header alone.

    Raises UserError when the file is no complete safetensors file of ours.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 2**20:  # ours are below a kilobyte, but for names of skipped images
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        skipped = json.loads(header.pop("__metadata__")["skipped"])
        arrays = {
            name: np.memmap(
                path, mode="r", dtype=STORED[entry["dtype"]], offset=8 + length + entry["data_offsets"][0],
                shape=tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }  # fmt: skip
        arrays["moments"], arrays["label"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The shard {path} is damaged ({type(error).__name__}: {error}), the others are kept. {again(path.parent)}"
        ) from error
    return arrays, skipped


def read_index(folder: Path, *, verify: bool = False) -> dict:
    """`index.json` of a complete folder, after a look whether each shard is there with its size.

    verify  compare every shard's sha256 too, which reads them all
    Raises UserError that names the first missing or damaged shard and the command that makes it again.
    """
    if not (folder / INDEX).is_file():
        if not (folder / ENCODING).is_file():
            raise UserError(
                f"Encoded images not found: {folder} holds no {INDEX}. Set data.source.path to a folder written by "
                "python -m tools.encode_latents, or write one."
            )
        total = shard_count(read_json(folder / ENCODING))
        there = sum((folder / shard_name(number)).is_file() for number in range(total))
        raise UserError(f"{folder} is not finished: {there} of {total} shards are there. {again(folder)}")
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise UserError(f"{folder / INDEX} has format {index.get('format')}, not {FORMAT}. Encode the images again.")
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != shard["bytes"]:
            problem = f"is damaged: it has {path.stat().st_size} bytes, not {shard['bytes']}"
        elif verify and sha256_file(path) != shard["sha256"]:
            problem = "is damaged: its sha256 is not the one in index.json"
        else:
            continue
        raise UserError(f"The shard {path} {problem}; the others are kept. {again(folder)}")
    return index


def again(folder: Path) -> str:
    """The sentence that says how to make what is missing."""
    try:
        words = list(read_json(folder / ENCODING)["command"])
        words[words.index("tools.encode_latents") + 2] = str(folder)  # where it lies now
        command = shlex.join(words)
    except (UserError, KeyError, TypeError, ValueError, IndexError):
        command = f"python -m tools.encode_latents <images> {folder}"
    return f"Make what is missing, and nothing else, with: {command}"


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
