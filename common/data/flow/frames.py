"""Frames without ground truth: a folder of pictures, or one animated picture."""

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from common.data.flow.files import read_image
from common.data.images.folder import SUFFIXES
from common.data.source import UNREADABLE
from common.errors import UserError, nearest


class Frames:
    """Sequences of frames: `sequences` name -> number of frames, `read(name)` -> uint8 (N, 3, H, W).

    path  a folder: its pictures in the order of the number their names end with, one sequence for each name before that
          number (`alley_1_0016.webp` belongs to `alley_1`); or one animated .gif, .webp or .png

    Raises UserError when there is no picture, for a film (no reader comes with the requirements), and from `read` for
    damaged frames, frames of several sizes, and an unknown name.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self._files: dict[str, list[Path]] = {}
        if self.path.is_dir():
            found = [p for p in self.path.iterdir() if p.suffix.lower() in SUFFIXES]
            for file in sorted(found, key=lambda p: (_split(p), p.name)):
                self._files.setdefault(_split(file)[0] or self.path.name, []).append(file)
        elif self.path.is_file() and self.path.suffix.lower() in SUFFIXES:
            self._files[self.path.stem] = []
        if not self._files:
            what = "is missing" if not self.path.exists() else "holds no pictures"
            raise UserError(
                f"{self.path} {what}. Give a folder of frames or an animated .gif; frames of a film: "
                f"ffmpeg -i film.mp4 frames/%05d.png."
            )

    @property
    def sequences(self) -> dict[str, int]:
        return {name: len(files) or len(self._animation(name)) for name, files in self._files.items()}

    def read(self, name: str | None = None) -> Tensor:
        """The frames of one sequence, uint8 (N, 3, H, W); None: the only or first one."""
        name = next(iter(self._files)) if name is None else name
        if name not in self._files:
            raise UserError(
                f"{self.path} has no sequence {name!r}. {nearest(name, self._files)}"
                f"Sequences: {', '.join(self._files)}."
            )
        files = self._files[name]
        frames = [read_image(file) for file in files] if files else self._animation(name)
        for number, frame in enumerate(frames):
            if frame.shape != frames[0].shape:
                where = files[number] if files else f"frame {number} of {self.path}"
                raise UserError(
                    f"{where} is {frame.shape[2]}x{frame.shape[1]}, the first frame {frames[0].shape[2]}x"
                    f"{frames[0].shape[1]}. Give frames of one size."
                )
        return torch.stack(frames)

    def _animation(self, name: str) -> list[Tensor]:
        try:
            with Image.open(self.path) as picture:
                frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise UserError(f"The picture {self.path} cannot be read ({error}). Put an intact copy there.") from error
        return [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]


def _split(file: Path) -> tuple[str, int]:
    """(name of the sequence, number of the frame) of a file."""
    name, number = re.fullmatch(r"(.*?)[_\-. ]?(\d*)", file.stem).groups()
    return name, int(number or 0)
