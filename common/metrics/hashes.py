"""Short hashes that say what a number was measured with."""

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor


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
        # seen as bytes, because numpy has no bfloat16
        parts += [
            name,
            str(tensor.dtype),
            str(tuple(tensor.shape)),
            tensor.view(-1).view(torch.uint8).numpy().tobytes(),
        ]
    return short_hash(*parts)


def safe_name(text: str) -> str:
    """`text` with everything a file name should not hold replaced by a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
