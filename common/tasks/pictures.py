"""A user's own pictures, for `sample.input`: found in a folder, read upright, answered by class numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data import pictures
from common.errors import UserError
from common.files import atomic


def find_pictures(files: Path | Sequence[Path]) -> dict[str, Path]:
    """Name -> picture, of one file, of a list of them, or of all directly in a folder in the order of their names.

    Raises UserError when there is none.
    """
    if not isinstance(files, Path):
        found = list(files)
    elif files.is_file():
        found = [files]
    else:
        found = [files / name for name in pictures.list_pictures(files, recursive=False)]
    if not found:
        endings = ", ".join(sorted(pictures.SUFFIXES))
        raise UserError(f"There is no picture in {files}. Put files of one of {endings} there.")
    stems = [path.stem for path in found]
    # two formats of one name keep their endings
    return {path.stem if stems.count(path.stem) == 1 else path.name.replace(".", "_"): path for path in found}


def read_picture(path: Path) -> Tensor:
    """uint8 (3, H, W), upright. Raises UserError naming a file that is no picture."""
    picture = pictures.read_picture(path, what=f"The picture {path}", fix="Remove it, or save it anew as PNG.")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def write_classes(path: Path, classes: Tensor, palette) -> Path:
    """Class numbers (H, W) < 256 as a PNG with the colours of `palette` (C, 3); returns `path`."""
    from PIL import Image

    picture = Image.fromarray(classes.to(torch.uint8).numpy())
    picture.putpalette(np.asarray(palette, dtype=np.uint8).reshape(-1).tolist())
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG")
    return Path(path)
