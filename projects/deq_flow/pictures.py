"""Flow as pictures: frame, truth, estimate and error of pairs, one row each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.flow.colours import flow_to_rgb
from common.files import atomic
from projects.deq_flow.metrics import end_point_error

GAP, LINE, WIDTH = 4, 14, 320  # pixels: between tiles, height of a line of text, width of a tile
WHEEL = 6 * LINE  # pixels: side of the colour wheel in the key
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
    and error are black. Below each row stand the mean error over the known pixels and both scales in pixels, at the end
    a key: the colour wheel and the colours of the error.
    """
    from PIL import Image, ImageDraw

    lines = [(_tiles(row), _caption(row)) for row in rows]
    width = max(tiles[0].width for tiles, _ in lines) + GAP
    rows_end = LINE + GAP + sum(tiles[0].height + LINE + GAP for tiles, _ in lines)
    height = rows_end + WHEEL + GAP
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
    _draw_key(canvas, pen, rows_end)
    with atomic(Path(path)) as temporary:
        canvas.save(temporary, format="PNG")
    return Path(path)


def _draw_key(canvas, pen, top: int) -> None:
    from PIL import Image

    wheel = Image.fromarray(wheel_picture(WHEEL).permute(1, 2, 0).numpy())
    canvas.paste(wheel, (GAP, top))
    left = 2 * GAP + WHEEL
    bar = heat(torch.linspace(0, 1, 160).expand(LINE, -1))
    canvas.paste(Image.fromarray(bar.permute(1, 2, 0).numpy()), (left, top + 4 * LINE))
    for line, text in (
        (0, "Flow: the hue is the direction of motion as on the wheel,"),
        (1, "white no motion, full colour the length below the row."),
        (3, "Error: from 0 (left) to the length below the row (right)."),
    ):
        pen.text((left, top + line * LINE), text, fill="black")


def wheel_picture(side: int) -> Tensor:
    """The colour wheel as uint8 (3, side, side): motion away from the centre, full colour at the rim, white outside."""
    place = 2 * torch.arange(side) / (side - 1) - 1
    flow = torch.stack(torch.meshgrid(place, place, indexing="xy"))
    inside = torch.linalg.vector_norm(flow, dim=0) <= 1
    return torch.where(inside, flow_to_rgb(flow, 1.0), 255)


def with_wheel(colours: Tensor, largest: float) -> Tensor:
    """Flow colours uint8 (3, H, W) with the wheel and its length in pixels in the lower right corner."""
    from PIL import Image, ImageDraw

    height, width = colours.shape[1:]
    side = max(min(height, width) // 5, 12)
    picture = Image.fromarray(colours.permute(1, 2, 0).contiguous().numpy())
    picture.paste(Image.fromarray(wheel_picture(side).permute(1, 2, 0).numpy()), (width - side, height - side))
    text = f"{largest:.1f} px"
    pen = ImageDraw.Draw(picture)
    room = int(pen.textlength(text)) + 4
    if room + side <= width:
        pen.rectangle((width - side - room, height - LINE, width - side - 1, height), fill="white")
        pen.text((width - side - room + 2, height - LINE + 1), text, fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _error_limit(row: Row) -> float:
    """Pixels at which the picture of the error is white."""
    return max(largest_motion(row.flow, row.valid > 0) / 10, 3.0)


def _tiles(row: Row) -> list:
    known = row.valid > 0
    largest = largest_motion(row.flow, known)
    error = end_point_error(row.estimate[None], row.flow[None])[0] / _error_limit(row)
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
    return (
        f"EPE {float(errors.mean()):.2f} px; true motion {float(still.mean()):.2f} px on average; "
        f"full colour {largest_motion(row.flow, known):.1f} px; error up to {_error_limit(row):.1f} px"
    )


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
