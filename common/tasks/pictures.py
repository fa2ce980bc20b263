"""A user's own pictures, for `sample.input`: found in a folder, read upright, answered by class numbers."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def find_pictures(files: Path) -> dict[str, Path]:
    """Name -> picture, of one file or of all directly in a folder, in the order of their names.

    Raises UserError when there is none.
    """
    found = [files] if files.is_file() else sorted(p for p in files.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"There is no picture in {files}. Put files of one of {', '.join(SUFFIXES)} there.")
    stems = [path.stem for path in found]
    # two formats of one name keep their endings
    return {path.stem if stems.count(path.stem) == 1 else path.name.replace(".", "_"): path for path in found}


def read_picture(path: Path) -> Tensor:
    """uint8 (3, H, W), turned as the camera says. Raises UserError naming a file that is no picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}). Remove it, or save it anew as PNG.") from error
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def write_classes(path: Path, classes: Tensor, palette) -> Path:
    """Class numbers (H, W) < 256 as a PNG with the colours of `palette` (C, 3); returns `path`."""
    from PIL import Image

    picture = Image.fromarray(classes.to(torch.uint8).numpy())
    picture.putpalette(np.asarray(palette, dtype=np.uint8).reshape(-1).tolist())
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG")
    return Path(path)
