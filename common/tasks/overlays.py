"""Segmentations as pictures: the classes' colours over the image, in a sheet with a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import atomic

GAP, LINE = 4, 14  # pixels between tiles; height of a line of text
OPACITY = 0.55  # of the colours
WIDTHS = (240, 480)  # pixels: narrower pictures are shown enlarged, wider ones reduced


def painted(image: Tensor, classes: Tensor, palette: Tensor) -> Tensor:
    """Image uint8 (3, H, W) under the colours of classes (H, W): uint8 (3, H, W).

    palette  uint8 (C, 3). Pixels of other classes, such as the void label, are the image's own, darkened.
    """
    known = (classes >= 0) & (classes < len(palette))
    colours = palette[classes.where(known, torch.zeros_like(classes)).long()].permute(2, 0, 1).float()
    mixed = torch.where(known, OPACITY * colours + (1 - OPACITY) * image.float(), 0.4 * image.float())
    return mixed.round().to(torch.uint8)


def write_overlays(
    path: Path,
    images: Sequence[Tensor],
    predictions: Sequence[Tensor],
    truths: Sequence[Tensor] | None,
    *,
    palette: Sequence[tuple[int, int, int]],
    names: Sequence[str],
) -> Path:
    """A row for each image, of its truth if there is one, and of its prediction; below, the classes seen. -> `path`

    images uint8 (3, H, W), predictions and truths (H, W) of the image's size, which may differ from row to row; names
    of the classes in the palette.
    """
    from PIL import Image, ImageDraw

    colours = torch.as_tensor(np.asarray(palette), dtype=torch.uint8)
    rows = []
    for number, image in enumerate(images):
        masks = [predictions[number]] if truths is None else [truths[number], predictions[number]]
        rows.append([_tile(part) for part in (image, *(painted(image, mask, colours) for mask in masks))])
    heads = ("image", "prediction") if truths is None else ("image", "truth", "prediction")
    width = max(row[0].width for row in rows) + GAP
    seen = sorted({int(c) for mask in (*predictions, *(truths or ())) for c in mask.unique() if int(c) < len(palette)})
    sheet_width = max(len(heads) * width + GAP, 240)
    swatches, bottom = _legend([names[c] for c in seen], sheet_width)
    top = LINE + GAP + sum(row[0].height + GAP for row in rows)
    sheet = Image.new("RGB", (sheet_width, top + bottom), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        pen.text((GAP + column * width, 2), head, fill="black")
    y = LINE + GAP
    for row in rows:
        for column, tile in enumerate(row):
            sheet.paste(tile, (GAP + column * width, y))
        y += row[0].height + GAP
    for (x, y, name), label in zip(swatches, seen, strict=True):
        pen.rectangle((x, top + y + 2, x + 9, top + y + 11), fill=tuple(palette[label]), outline="black")
        pen.text((x + 13, top + y), name, fill="black")
    with atomic(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)


def _tile(pixels: Tensor):
    """A picture of at least the first, at most the second of WIDTHS: enlarged by a whole number, or reduced."""
    from PIL import Image

    tile = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if tile.width < WIDTHS[0]:
        factor = -(-WIDTHS[0] // tile.width)
        return tile.resize((factor * tile.width, factor * tile.height), Image.Resampling.NEAREST)
    if tile.width > WIDTHS[1]:
        return tile.resize((WIDTHS[1], max(1, round(tile.height * WIDTHS[1] / tile.width))), Image.Resampling.BILINEAR)
    return tile


def _legend(names: Sequence[str], width: int) -> tuple[list[tuple[int, int, str]], int]:
    """(x, y, name) of every entry in lines of the width, and the height of all lines."""
    placed, x, y = [], GAP, 0
    for name in names:
        needed = 6 * len(name) + 24
        if x > GAP and x + needed > width:
            x, y = GAP, y + LINE
        placed.append((x, y, name))
        x += needed
    return placed, y + LINE + GAP
