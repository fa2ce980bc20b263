import struct

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.weights.flax import read_flax


def text(word: str) -> bytes:
    content = word.encode()
    if len(content) < 32:
        return bytes([0xA0 | len(content)]) + content
    return b"\xda" + struct.pack(">H", len(content)) + content


def mapping(**items: bytes) -> bytes:
    return bytes([0x80 | len(items)]) + b"".join(text(key) + value for key, value in items.items())


def array(values: np.ndarray, dtype: str | None = None) -> bytes:
    """As flax.serialization writes it: extension 1 holding (shape, dtype, bytes)."""
    raw = values.tobytes()
    inner = b"\x93" + bytes([0x90 | values.ndim, *values.shape]) + text(dtype or values.dtype.name)
    inner += b"\xc6" + struct.pack(">I", len(raw)) + raw
    return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner


KERNEL = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_a_msgpack_tree_comes_flat_with_numbers_left_out(tmp_path):
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    bits = half.view(torch.int16).numpy()
    tree = mapping(
        step=b"\xcd\x01\x00",
        rate=b"\xcb" + struct.pack(">d", 0.5),
        done=b"\xc2",
        name=text("x" * 40),
        params=mapping(net=mapping(kernel=array(KERNEL), half=array(bits, "bfloat16"))),
    )
    found = read_flax(write(tmp_path / "tree.msgpack", tree))
    assert list(found) == ["params/net/kernel", "params/net/half"]
    assert torch.equal(found["params/net/kernel"], torch.from_numpy(KERNEL))
    assert torch.equal(found["params/net/half"], half)


def test_arrays_in_pieces_are_joined(tmp_path):
    pieces = {str(i): array(part) for i, part in enumerate(np.split(KERNEL.ravel(), 2))}
    whole = mapping(
        __msgpack_chunked_array__=b"\xc3",
        shape=mapping(**{"0": b"\x02", "1": b"\x03", "2": b"\x04"}),
        chunks=mapping(**pieces),
    )
    found = read_flax(write(tmp_path / "tree.msgpack", mapping(kernel=whole)))
    assert torch.equal(found["kernel"], torch.from_numpy(KERNEL))


def test_an_npz_keeps_its_names(tmp_path):
    np.savez(tmp_path / "tree.npz", **{"params/net/kernel": KERNEL})
    assert torch.equal(read_flax(tmp_path / "tree.npz")["params/net/kernel"], torch.from_numpy(KERNEL))


@pytest.mark.parametrize(
    "content", [mapping(kernel=array(KERNEL))[:-3], b"", b"# no weights here", b"PK\x03\x04 cut", b"\xc1", b"\x91\x01"]
)
def test_damaged_and_foreign_files_are_named(tmp_path, content):
    path = write(tmp_path / "tree.msgpack", content)
    with pytest.raises(UserError, match=r"tree\.msgpack is truncated or no \.npz or flax msgpack file"):
        read_flax(path)


def test_nothing_in_an_npz_is_run(tmp_path):
    np.savez(tmp_path / "tree.npz", kernel=np.array([object()], dtype=object))
    with pytest.raises(UserError, match=r"tree\.npz"):
        read_flax(tmp_path / "tree.npz")


def test_folders_and_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="only JAX can read"):
        read_flax(tmp_path)
    with pytest.raises(UserError, match="do not exist"):
        read_flax(tmp_path / "absent.npz")
