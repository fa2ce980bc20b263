"""Optical flow on disk: Middlebury .flo, KITTI 16-bit .png, FlyingThings3D .pfm, and the pictures beside them."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png

from common.data.pictures import picture_size, read_picture, reason_of
from common.data.source import UNREADABLE
from common.errors import UserError
from common.files import write_bytes

SUFFIXES = (".flo", ".png", ".pfm")
KITTI_SCALE = 64.0  # steps of a KITTI file per pixel
KITTI_ZERO = 32768
UNKNOWN = 1e10  # written to .flo where the flow is unknown; components above UNKNOWN_ABOVE are read as unknown
UNKNOWN_ABOVE = 1e9
_FIX = "Put an intact copy there, or check data.root."
_FLO_TAG = b"PIEH"  # the float32 202021.25, little-endian


def read_image(path: str | Path) -> Tensor:
    """The picture, uint8 (3, H, W) 0..255; grey ones three times. Raises UserError naming a file that is no picture."""
    return torch.from_numpy(np.array(read_picture(path, what=f"The picture {path}", fix=_FIX))).permute(2, 0, 1)


def read_flow(path: str | Path, *, scale: float = KITTI_SCALE) -> tuple[Tensor, Tensor]:
    """Flow float32 (2, H, W) in pixels, u (right) then v (down), and validity float32 (H, W), 1 known and 0 unknown.

    path   .flo, .png (16-bit RGB, KITTI's devkit) or .pfm
    scale  of a .png: steps per pixel; 64 is KITTI's. flow = (value - 32768) / scale

    Unknown: components above 1e9 or not finite (.flo, .pfm), third channel 0 (.png); the flow is 0 there.
    Raises UserError naming the file when it is missing, damaged or of another kind.
    """
    path = Path(path)
    reader = {".flo": _read_flo, ".pfm": _read_pfm, ".png": _read_png}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is no flow file: the name must end with one of {', '.join(SUFFIXES)}.")
    try:
        data = path.read_bytes()
        flow, valid = reader(data, scale) if reader is _read_png else reader(data)
    except (*UNREADABLE, RuntimeError) as error:  # RuntimeError: torchvision's PNG reader
        raise UserError(f"The flow {path} cannot be read ({reason_of(error, path)}). {_FIX}") from error
    if valid is None:
        valid = (np.abs(flow) <= UNKNOWN_ABOVE).all(0)  # also False for nan
    flow = np.where(valid, flow, np.float32(0))
    return torch.from_numpy(flow), torch.from_numpy(valid.astype(np.float32))


def write_flow(path: str | Path, flow: Tensor, valid: Tensor | None = None, *, scale: float = KITTI_SCALE) -> None:
    """Writes flow (2, H, W) in pixels to .flo, .png or .pfm, whole or not at all; `read_flow` reads it back.

    valid  (H, W), unknown where < 0.5; None: known everywhere
    scale  of a .png, see `read_flow`: flow is rounded to 1 / scale pixels

    Raises UserError for another suffix or shape, known flow that is not finite, and known flow beyond what a .png can
    hold (+-512 pixels at scale 64).
    """
    path = Path(path)
    if flow.dim() != 3 or flow.shape[0] != 2 or (valid is not None and valid.shape != flow.shape[1:]):
        shape = "" if valid is None else f" with valid {tuple(valid.shape)}"
        raise UserError(f"flow for {path} must be (2, H, W) with valid (H, W), got {tuple(flow.shape)}{shape}.")
    values = flow.detach().cpu().to(torch.float32).numpy()
    known = np.ones(values.shape[1:], bool) if valid is None else valid.detach().cpu().numpy() >= 0.5
    if not np.isfinite(values[:, known]).all():
        raise UserError(f"flow for {path} holds values that are not finite. Mark those pixels as not valid.")
    suffix = path.suffix.lower()
    if suffix == ".flo":
        height, width = known.shape
        pixels = np.where(known, values, np.float32(UNKNOWN)).transpose(1, 2, 0)
        data = _FLO_TAG + struct.pack("<ii", width, height) + pixels.astype("<f4").tobytes()
    elif suffix == ".pfm":
        height, width = known.shape
        pixels = np.where(known, values, np.float32(np.nan))
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])]).transpose(1, 2, 0)[::-1]  # rows from the bottom
        data = f"PF\n{width} {height}\n-1.0\n".encode() + pixels.astype("<f4").tobytes()
    elif suffix == ".png":
        steps = np.rint(values.astype(np.float64) * scale) + KITTI_ZERO
        wrong = known & ((steps < 0) | (steps > 65535)).any(0)
        if wrong.any():
            most = float(np.abs(values[:, wrong]).max())
            raise UserError(
                f"flow for {path} reaches {most:.0f} pixels, a .png with scale {scale:g} holds "
                f"{KITTI_ZERO / scale:.0f} at most. Write .flo instead, or set a smaller scale."
            )
        stored = np.where(known, steps, 0)
        data = _png16(np.concatenate([stored, known[None]]).transpose(1, 2, 0))
    else:
        raise UserError(f"{path} is no flow file: the name must end with one of {', '.join(SUFFIXES)}.")
    write_bytes(path, data)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a picture from the head of its file, upright. Raises UserError as `read_image`."""
    return picture_size(path, what=f"The picture {path}", fix=_FIX)


def _read_flo(data: bytes) -> tuple[np.ndarray, None]:
    if data[:4] != _FLO_TAG:
        raise ValueError("it does not begin with PIEH")
    width, height = struct.unpack("<ii", data[4:12])
    if min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise ValueError(f"its head says {width}x{height}, which is not what its {len(data)} bytes hold")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1).astype(np.float32), None


def _read_pfm(data: bytes) -> tuple[np.ndarray, None]:
    kind, size, order, pixels = data.split(b"\n", 3)
    channels = {b"PF": 3, b"Pf": 1}.get(kind.strip())
    if channels != 3:
        raise ValueError("it is no PFM of three channels")
    width, height = (int(word) for word in size.split())
    if min(width, height) < 1 or len(pixels) != 12 * width * height:
        raise ValueError(f"its head says {width}x{height}, which is not what its {len(data)} bytes hold")
    values = np.frombuffer(pixels, "<f4" if float(order) < 0 else ">f4").reshape(height, width, 3)
    return values[::-1, :, :2].transpose(2, 0, 1).astype(np.float32), None


def _read_png(data: bytes, scale: float) -> tuple[np.ndarray, np.ndarray]:
    # not Pillow, which silently reduces 16-bit RGB to 8 bits
    with (
        warnings.catch_warnings()
    ):  # torchvision 0.29 announces its end; nothing else that is required reads 16-bit RGB
        warnings.simplefilter("ignore", DeprecationWarning)
        values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    if values.dtype != torch.uint16 or values.shape[0] != 3:
        raise ValueError(f"it is no 16-bit RGB picture but {values.dtype} with {values.shape[0]} channels")
    values = values.numpy()
    return (values[:2].astype(np.float32) - KITTI_ZERO) / np.float32(scale), values[2] > 0


def _png16(pixels: np.ndarray) -> bytes:
    """PNG of 16-bit RGB pixels (H, W, 3): Pillow writes no such files."""
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels, dtype=">u2").view(np.uint8).reshape(height, width * 6)
    filtered = np.zeros((height, width * 6 + 1), np.uint8)
    filtered[:, 0] = 2  # each row as its difference to the one above, modulo 256
    filtered[:, 1:] = rows
    filtered[1:, 1:] -= rows[:-1]
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(filtered.tobytes(), 6)),
        (b"IEND", b""),
    )
    written = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + written
