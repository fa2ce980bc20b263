"""Signals for implicit representations: a photograph, a picture file, a sound, a clip; values float in [-1, 1]."""

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common import limits
from common.data.pictures import is_picture, list_pictures, read_frames, read_picture, reason_of
from common.data.source import UNREADABLE
from common.errors import UserError

# Photographs inside scikit-image's wheel: name -> grey or colour. Others of its gallery are downloads.
PHOTOGRAPHS = {
    "astronaut": 3, "brick": 1, "camera": 1, "chelsea": 3, "coffee": 3, "coins": 1, "grass": 1, "gravel": 1,
    "hubble_deep_field": 3, "moon": 1, "page": 1, "rocket": 3, "text": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Signal:
    """Values on a regular grid.

    kind    image (grid H, W), audio (grid T) or video (grid T, H, W)
    values  float32 (*grid, C) in [-1, 1]
    rate    samples or frames per second; 0 for an image
    """

    kind: str
    values: Tensor
    rate: float = 0.0

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.values.shape[:-1])

    def coordinates(self) -> Tensor:
        """(*grid, d) float32: position along each grid axis in its order, -1 first and 1 last sample (0 if alone)."""
        axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


class SignalSource(Protocol):
    """Where one signal lies and how it is read. Making one touches no file; `check` and `load` do."""

    name: str

    def check(self) -> None:
        """Cheap look whether the file is there. Raises UserError saying what was looked for, where, and the fix."""

    def load(self) -> Signal:
        """The signal. Raises UserError naming the missing or damaged file."""


class Photograph:
    """A photograph that comes with scikit-image: no download, no root.

    picture   one of PHOTOGRAPHS; DEQ-INR's zoo uses `camera`, grey 512x512
    size      (height, width) in pixels: largest centred part of that shape, resized; None: as it is
    channels  1 grey, 3 colour; None: as it is

    Raises UserError for an unknown picture or a bad size.
    """

    def __init__(
        self, *, picture: str = "camera", size: tuple[int, int] | list[int] | None = None, channels: int | None = None
    ):
        self.name = limits.choice("data.source.picture", picture, PHOTOGRAPHS)
        self.size = checked_size(size)
        self.channels = PHOTOGRAPHS[picture] if channels is None else channels

    def check(self) -> None:
        """Nothing can be missing: the pictures come with scikit-image."""

    def load(self) -> Signal:
        from skimage import data

        return picture_signal(Image.fromarray(getattr(data, self.name)()), self.size, self.channels)


class ImageFile:
    """One picture of a file, of a folder (searched recursively, by name), or of a .npy array uint8 (N, H, W, C).

    path      the file or folder;  index  number of the picture in a folder or array
    size      as in `Photograph`
    channels  1 grey, 3 colour
    name      name in messages
    """

    def __init__(
        self,
        *,
        path: str,
        index: int = 0,
        size: tuple[int, int] | list[int] | None = None,
        channels: int = 3,
        name: str = "picture",
    ):
        self.path = Path(path).expanduser()
        self.index = index
        self.size = checked_size(size)
        self.channels = channels
        self.name = name

    def check(self) -> None:
        """Raises UserError when there is no such file or folder."""
        if not self.path.exists():
            raise UserError(
                f"{self.name} not found: {self.path} does not exist. Set data.source.path to a picture, a folder of "
                "pictures, or an array file .npy of uint8 (N, H, W, C)."
            )

    def load(self) -> Signal:
        self.check()
        fix = "Choose another with data.source.index."
        if self.path.suffix != ".npy":
            file = self._file()
            picture = read_picture(file, what=f"{file} (picture {self.index})", fix=fix, channels=self.channels)
            return picture_signal(picture, self.size, self.channels)
        try:
            stack = np.load(self.path, mmap_mode="r", allow_pickle=False)
            picture = Image.fromarray(np.asarray(stack[self._bounded(len(stack))]).squeeze())
        except UserError:
            raise
        except (*UNREADABLE, TypeError) as error:
            what = f"{self.path} (picture {self.index})"
            raise UserError(f"{what} cannot be read ({reason_of(error, self.path)}). {fix}") from error
        return picture_signal(picture, self.size, self.channels)

    def _file(self) -> Path:
        if self.path.is_file():
            return self.path
        files = [self.path / name for name in list_pictures(self.path)]
        return files[self._bounded(len(files))]

    def _bounded(self, count: int) -> int:
        if not 0 <= self.index < count:
            raise UserError(
                f"data.source.index is {self.index}, but {self.path} holds {count} pictures. Choose 0..{count - 1}."
                if count
                else f"{self.path} holds no pictures. Set data.source.path to another place."
            )
        return self.index


class Wav:
    """A PCM .wav file as one channel: the mean of its channels, divided by the largest |amplitude|.

    path     the file
    start    seconds skipped at the beginning, >= 0;  seconds  length taken, > 0; None: to the end
    """

    name = "audio"

    def __init__(self, *, path: str, start: float = 0.0, seconds: float | None = None):
        limits.number("data.source.start", start, least=0, hint="Set data.source.start=0 to skip nothing.")
        if seconds is not None:
            limits.number("data.source.seconds", seconds, above=0, hint="Set null to read to the end.")
        self.path = Path(path).expanduser()
        self.start = start
        self.seconds = seconds

    def check(self) -> None:
        """Raises UserError when there is no such file."""
        if not self.path.is_file():
            raise UserError(
                f"sound not found: {self.path} does not exist. Set data.source.path to a PCM .wav file (gt_bach.wav "
                "and gt_counting.wav come with the SIREN authors' data)."
            )

    def load(self) -> Signal:
        self.check()
        try:
            with wave.open(str(self.path), "rb") as file:
                rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
                file.setpos(min(round(self.start * rate), file.getnframes()))
                data = file.readframes(file.getnframes() if self.seconds is None else round(self.seconds * rate))
        except (wave.Error, *UNREADABLE) as error:
            raise UserError(f"{self.path} is not a PCM .wav file ({error}). Convert it to 16-bit PCM first.") from error
        samples = pcm(data, width).reshape(-1, channels).mean(axis=1)
        if not len(samples):
            raise UserError(f"{self.path} has no samples after data.source.start={self.start} s. Choose a smaller one.")
        loudest = np.abs(samples).max()
        samples = samples / (loudest if loudest > 0 else 1.0)
        return Signal("audio", torch.from_numpy(samples.astype(np.float32))[:, None], float(rate))


class Frames:
    """A clip: a folder of equally large pictures in name order, an animated .gif, a .npy of uint8 (T, H, W, 3), or a
    film file where the installed torchvision still reads films.

    path     folder or file
    pattern  file names taken from a folder
    start    frames skipped at the beginning;  frames  number taken; None: to the end
    size     (height, width) of a frame, cropped and resized as in `Photograph`; None: as it is
    rate     frames per second, used for what is written
    """

    name = "video"

    def __init__(
        self,
        *,
        path: str,
        pattern: str = "*",
        start: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | list[int] | None = None,
        rate: float = 25.0,
    ):
        limits.whole("data.source.start", start, hint="Set data.source.start=0 to skip nothing.")
        if frames is not None:
            limits.whole("data.source.frames", frames, least=1, hint="Set null to read to the end.")
        self.path = Path(path).expanduser()
        self.pattern = pattern
        self.start = start
        self.frames = frames
        self.size = checked_size(size)
        self.rate = rate

    def check(self) -> None:
        """Raises UserError when there is no such file or folder."""
        if not self.path.exists():
            raise UserError(
                f"clip not found: {self.path} does not exist. Set data.source.path to a folder of frames, an animated "
                ".gif, or a .npy array (T, H, W, 3)."
            )

    def load(self) -> Signal:
        self.check()
        try:
            pictures = self._pictures()
        except UserError:
            raise
        except (*UNREADABLE, TypeError, RuntimeError) as error:
            reason = reason_of(error, self.path)
            raise UserError(f"{self.path} cannot be read as a clip ({reason}). Give a folder of frames.") from error
        signals = [picture_signal(picture, self.size, 3).values for picture in pictures]
        if not signals or any(s.shape != signals[0].shape for s in signals):
            sizes = sorted({tuple(s.shape[:2]) for s in signals})
            raise UserError(
                f"{self.path} gives {len(signals)} frames of sizes {sizes or 'none'}; a clip needs frames of one size. "
                "Set data.source.pattern, data.source.start or data.source.size."
            )
        return Signal("video", torch.stack(signals), self.rate)

    def _pictures(self) -> list[Image.Image]:
        wanted = slice(self.start, None if self.frames is None else self.start + self.frames)
        if self.path.is_dir():
            names = (file.relative_to(self.path).as_posix() for file in self.path.glob(self.pattern))
            files = sorted(self.path / name for name in names if is_picture(name))
            return [read_picture(file, what=f"The frame {file}") for file in files[wanted]]
        if self.path.suffix == ".npy":
            return [Image.fromarray(a) for a in np.load(self.path, mmap_mode="r", allow_pickle=False)[wanted]]
        if self.path.suffix.lower() == ".gif":
            return read_frames(self.path, what=f"The clip {self.path}", fix="Give a folder of frames.")[wanted]
        return [Image.fromarray(a) for a in self._film()[wanted]]

    def _film(self) -> np.ndarray:
        from torchvision import io

        if not hasattr(io, "read_video"):  # removed from newer releases
            raise UserError(
                f"{self.path}: the installed torchvision reads no films. Split it into frames first, e.g. "
                f"ffmpeg -i {self.path.name} frames/%05d.png, and set data.source.path=frames."
            )
        return io.read_video(str(self.path), pts_unit="sec", output_format="THWC")[0].numpy()


def picture_signal(picture: Image.Image, size: tuple[int, int] | None, channels: int) -> Signal:
    """An image signal (H, W, channels), pixels x / 127.5 - 1; `size` and `channels` as in `Photograph`."""
    limits.choice("data.source.channels", channels, (1, 3), hint="Set 1 for grey, 3 for colour.")
    picture = picture.convert("RGB" if channels == 3 else "L")
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32).reshape(picture.height, picture.width, channels)
    return Signal("image", torch.from_numpy(pixels / 127.5 - 1))


def checked_size(size) -> tuple[int, int] | None:
    """`(height, width)` or None. Raises UserError unless both are at least 1."""
    if size is None:
        return None
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"data.source.size must be [height, width] in pixels, each >= 1, got {list(size)}.")
    return int(size[0]), int(size[1])


def pcm(data: bytes, width: int) -> np.ndarray:
    """PCM bytes of `width` 1 (unsigned), 2, 3 or 4 (signed, little-endian) bytes a sample as float64 in [-1, 1)."""
    if width == 1:
        return np.frombuffer(data, np.uint8) / 128.0 - 1.0
    if width == 3:
        octets = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(octets), 4), np.uint8)
        padded[:, 1:] = octets
        return padded.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)
