"""Frames without ground truth: a folder of pictures, or one animated picture."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.flow.files import read_image
from common.data.pictures import is_picture, list_pictures, read_frames
from common.errors import UserError, nearest


class Frames:
    """Sequences of frames: `sequences` name -> number of frames, `read(name)` -> uint8 (N, 3, H, W).

    path  a folder: its pictures in the order of the number their names end with, one sequence for each name before that
          number (`alley_1_0016.webp` belongs to `alley_1`). Where no two names belong together (`first.png`,
          `second.png`) the folder is one sequence in the order of the names.
          Or one animated .gif, .webp or .png; or a list of pictures, one sequence in that order

    Raises UserError when there is no picture, for a film (no reader comes with the requirements), and from `read` for
    damaged frames, frames of several sizes, and an unknown name.
    """

    def __init__(self, path: str | Path | Sequence[str | Path]):
        if not isinstance(path, str | Path):
            files = [Path(file).expanduser() for file in path]
            if not files:
                raise UserError("The list of frames is empty. Name two pictures or more.")
            self.path = files[0].parent
            self._files = {"-".join(dict.fromkeys([files[0].stem, files[-1].stem])): files}
            return
        self.path = Path(path).expanduser()
        self._files: dict[str, list[Path]] = {}
        if self.path.is_dir():
            self._files = _sequences(self.path)
        elif self.path.is_file() and is_picture(self.path.name):
            self._files[self.path.stem] = []
        if not self._files:
            what = "is missing" if not self.path.exists() else "holds no pictures"
            raise UserError(
                f"{self.path} {what}. Give a folder of frames or an animated .gif; frames of a film: "
                f"ffmpeg -i film.mp4 frames/%05d.png."
            )

    @property
    def sequences(self) -> dict[str, int]:
        return {name: len(files) or len(self._animation()) for name, files in self._files.items()}

    def read(self, name: str | None = None) -> Tensor:
        """The frames of one sequence, uint8 (N, 3, H, W); None: the only or first one."""
        name = next(iter(self._files)) if name is None else name
        if name not in self._files:
            raise UserError(
                f"{self.path} has no sequence {name!r}. {nearest(name, self._files)}"
                f"Sequences: {', '.join(self._files)}."
            )
        files = self._files[name]
        frames = [read_image(file) for file in files] if files else self._animation()
        for number, frame in enumerate(frames):
            if frame.shape != frames[0].shape:
                where = files[number] if files else f"frame {number} of {self.path}"
                raise UserError(
                    f"{where} is {frame.shape[2]}x{frame.shape[1]}, the first frame {frames[0].shape[2]}x"
                    f"{frames[0].shape[1]}. Give frames of one size."
                )
        return torch.stack(frames)

    def _animation(self) -> list[Tensor]:
        frames = read_frames(self.path, what=f"The picture {self.path}")
        return [torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames]


def _sequences(folder: Path) -> dict[str, list[Path]]:
    """Name of each sequence -> its pictures in order; see `Frames`."""
    found: dict[str, list[Path]] = {}
    for file in sorted((folder / name for name in list_pictures(folder, recursive=False)), key=_sequence_and_number):
        found.setdefault(_sequence_and_number(file)[0] or folder.name, []).append(file)
    if len(found) > 1 and all(len(files) == 1 for files in found.values()):
        return {folder.resolve().name: sorted(file for files in found.values() for file in files)}
    return found


def _sequence_and_number(file: Path) -> tuple[str, int, str]:
    """Name of the sequence, number of the frame, name of the file: the order of frames."""
    name, number = re.fullmatch(r"(.*?)[_\-. ]?(\d*)", file.stem).groups()
    return name, int(number or 0), file.name
