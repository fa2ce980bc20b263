"""Flow as pictures: frame, truth, estimate and error of pairs, one row each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.data.flow.colours import flow_to_rgb
from common.files import atomic
from projects.deq_flow.metrics import end_point_error

GAP, LINE, WIDTH = 4, 14, 320  # pixels: between tiles, height of a line of text, width of a tile
HEADS = ("first frame", "true flow", "estimate", "error")


@dataclass(frozen=True)
class Row:
    """One pair: frame uint8 (3, H, W), estimate (2, H, W) and flow (2, H, W) in pixels, valid (H, W)."""

    frame: Tensor
    estimate: Tensor
    flow: Tensor
    valid: Tensor


def write_pairs(path: Path, rows: Sequence[Row]) -> Path:
    """A line of four tiles for each pair, colours of truth and estimate on one scale; returns `path`.

    The error is white at a tenth of the largest true motion, but at 3 pixels at least; where the truth is unknown truth
    and error are black. Its mean over the known pixels stands below each row.
    """
    from PIL import Image, ImageDraw

    lines = [(_tiles(row), _caption(row)) for row in rows]
    width = max(tiles[0].width for tiles, _ in lines) + GAP
    height = LINE + GAP + sum(tiles[0].height + LINE + GAP for tiles, _ in lines)
    canvas = Image.new("RGB", (len(HEADS) * width + GAP, height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, head in enumerate(HEADS):
        pen.text((GAP + column * width, 2), head, fill="black")
    y = LINE + GAP
    for tiles, caption in lines:
        for column, tile in enumerate(tiles):
            canvas.paste(tile, (GAP + column * width, y))
        pen.text((GAP, y + tiles[0].height), caption, fill="black")
        y += tiles[0].height + LINE + GAP
    with atomic(Path(path)) as temporary:
        canvas.save(temporary, format="PNG")
    return Path(path)


def _tiles(row: Row) -> list:
    known = row.valid > 0
    largest = largest_motion(row.flow, known)
    error = end_point_error(row.estimate[None], row.flow[None])[0] / max(largest / 10, 3.0)
    return [
        tile(row.frame),
        tile(flow_to_rgb(row.flow, largest) * known),
        tile(flow_to_rgb(row.estimate, largest)),
        tile(heat(error) * known),
    ]


def _caption(row: Row) -> str:
    known = row.valid > 0
    errors = end_point_error(row.estimate[None], row.flow[None])[0][known]
    still = torch.linalg.vector_norm(row.flow, dim=0)[known]
    return f"EPE {float(errors.mean()):.2f} px; true motion {float(still.mean()):.2f} px on average"


def largest_motion(flow: Tensor, known: Tensor | None = None) -> float:
    """Largest magnitude in pixels of (..., 2, H, W) where `known` (..., H, W); at least 1e-3."""
    size = torch.linalg.vector_norm(flow.float(), dim=-3)
    return max(float((size if known is None else size * known).max()), 1e-3)


def heat(values: Tensor) -> Tensor:
    """Values (H, W) as uint8 (3, H, W): black at 0, white at 1 and above."""
    from matplotlib import colormaps

    colours = colormaps["magma"](values.clamp(0, 1).numpy(), bytes=True)[..., :3]
    return torch.from_numpy(colours.copy()).permute(2, 0, 1)


def tile(pixels: Tensor, width: int = WIDTH):
    """uint8 (3, H, W) as a PIL picture of `width` pixels."""
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if picture.width == width:
        return picture
    smooth = Image.Resampling.BILINEAR if picture.width > width else Image.Resampling.NEAREST
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), smooth)
