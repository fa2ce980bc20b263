"""Signals: grids, value ranges, every file kind, and one clear sentence for everything that can be wrong."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from projects.torchdeq.signals import PHOTOGRAPHS, Frames, ImageFile, Photograph, Signal, Wav, pcm


def as_values(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)


def test_coordinates_follow_the_grid_axes_from_minus_one_to_one():
    coords = Signal("video", torch.zeros(3, 2, 5, 1)).coordinates()
    assert coords.shape == (3, 2, 5, 3) and coords.dtype == torch.float32
    assert coords[:, 0, 0, 0].tolist() == [-1, 0, 1]
    assert coords[0, :, 0, 1].tolist() == [-1, 1]
    assert coords[0, 0, :, 2].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert Signal("audio", torch.zeros(1, 1)).coordinates().tolist() == [[0]]


@pytest.mark.parametrize("picture", ["camera", "coffee", "rocket"])
def test_photographs_come_with_scikit_image(picture):
    signal = Photograph(picture=picture).load()
    assert signal.kind == "image" and signal.values.shape[-1] == PHOTOGRAPHS[picture]
    assert -1 <= signal.values.min() < -0.9 and 0.9 < signal.values.max() <= 1
    small = Photograph(picture=picture, size=(24, 40), channels=3).load()
    assert small.values.shape == (24, 40, 3)


def test_a_photograph_is_the_pixels_divided_by_half_the_range():
    from skimage import data

    values = Photograph(picture="camera").load().values
    assert torch.equal(values, as_values(data.camera()[..., None]))


def test_picture_file_folder_and_array(tmp_path):
    rng = np.random.RandomState(0)
    stack = rng.randint(0, 256, (3, 6, 8, 3)).astype(np.uint8)
    for number, array in enumerate(stack):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "stack.npy", stack)
    expected = as_values(stack[1])
    for path, index in ((tmp_path / "1.png", 0), (tmp_path, 1), (tmp_path / "stack.npy", 1)):
        assert torch.equal(ImageFile(path=str(path), index=index).load().values, expected)
    with pytest.raises(UserError, match=r"index is 3, .* holds 3 pictures. Choose 0..2"):
        ImageFile(path=str(tmp_path), index=3).load()


def write_wav(path, samples: np.ndarray, width: int, rate: int = 8000):
    """samples (T, channels) in [-1, 1) as PCM of that many bytes."""
    scaled = np.floor(samples * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    octets = scaled.astype("<i8").view(np.uint8).reshape(*samples.shape, 8)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(octets).tobytes())


@pytest.mark.parametrize("width, error", [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_wav_of_every_width_is_the_mean_channel_at_full_scale(tmp_path, width, error):
    t = np.arange(800) / 8000
    left, right = 0.5 * np.sin(2 * np.pi * 440 * t), 0.25 * np.cos(2 * np.pi * 300 * t)
    write_wav(tmp_path / "a.wav", np.stack([left, right], 1), width)
    mean = (left + right) / 2
    signal = Wav(path=str(tmp_path / "a.wav")).load()
    assert signal.kind == "audio" and signal.rate == 8000 and signal.values.shape == (800, 1)
    assert np.abs(signal.values[:, 0].numpy() - mean / np.abs(mean).max()).max() < 4 * error
    part = Wav(path=str(tmp_path / "a.wav"), start=0.01, seconds=0.05).load()
    assert part.values.shape == (400, 1)


def test_pcm_keeps_the_sign():
    assert pcm(b"\x00\x80\xff\x7f\x00\x00", 2).tolist() == [-1, 1 - 2**-15, 0]
    assert pcm(b"\x00\x00\x80\xff\xff\x7f", 3).tolist() == [-1, 1 - 2**-23]
    assert pcm(b"\x00\xff\x80", 1).tolist() == [-1, 1 - 2**-7, 0]


def test_silence_stays_silent(tmp_path):
    write_wav(tmp_path / "silent.wav", np.zeros((16, 1)), 2)
    assert torch.equal(Wav(path=str(tmp_path / "silent.wav")).load().values, torch.zeros(16, 1))


def test_clip_of_a_folder_a_gif_and_an_array(tmp_path):
    rng = np.random.RandomState(1)
    frames = rng.randint(0, 256, (4, 6, 8, 3)).astype(np.uint8)
    (tmp_path / "frames").mkdir()
    for number, array in enumerate(frames):
        Image.fromarray(array).save(tmp_path / "frames" / f"f{number:03d}.png")
    np.save(tmp_path / "clip.npy", frames)
    pictures = [Image.fromarray(np.repeat(a[..., :1] // 128 * 255, 3, -1)) for a in frames]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:])
    expected = as_values(frames[1:3])
    for path in ("frames", "clip.npy"):
        signal = Frames(path=str(tmp_path / path), start=1, frames=2).load()
        assert signal.kind == "video" and signal.grid == (2, 6, 8)
        assert torch.equal(signal.values, expected)
    film = Frames(path=str(tmp_path / "clip.gif")).load()
    assert film.grid == (4, 6, 8)
    assert torch.allclose(film.values[2], as_values(np.asarray(pictures[2])), atol=0.02)


def test_a_real_clip_comes_with_scikit_image():
    from pathlib import Path

    import skimage

    path = Path(skimage.__file__).parent / "data" / "no_time_for_that_tiny.gif"
    assert Frames(path=str(path), size=(12, 7)).load().grid == (24, 12, 7)


def test_everything_wrong_is_one_sentence(tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF but no sound")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "mixed").mkdir()
    for number, side in enumerate((4, 5)):
        Image.new("RGB", (side, 4)).save(tmp_path / "mixed" / f"{number}.png")
    (tmp_path / "empty").mkdir()
    gone = str(tmp_path / "gone")
    wrong = {
        r"data\.source\.picture must be one of .*, got 'cofee'\. Closest: coffee": lambda: Photograph(picture="cofee"),
        r"size must be \[height, width\]": lambda: Photograph(size=[4]),
        r"data\.source\.channels must be one of 1, 3, got 2": lambda: Photograph(channels=2).load(),
        r"picture not found: .*gone does not exist": ImageFile(path=gone).check,
        r"sound not found: .*gone does not exist": Wav(path=gone).check,
        r"clip not found: .*gone does not exist": Frames(path=gone).check,
        r"broken.wav is not a PCM": Wav(path=str(tmp_path / "broken.wav")).load,
        r"broken.png .*cannot be read": ImageFile(path=str(tmp_path / "broken.png")).load,
        r"2 frames of sizes": Frames(path=str(tmp_path / "mixed")).load,
        r"gives 0 frames": Frames(path=str(tmp_path / "empty")).load,
        r"holds no pictures": ImageFile(path=str(tmp_path / "empty")).load,
        r"data\.source\.seconds must be > 0": lambda: Wav(path=gone, seconds=0),
        r"data\.source\.frames must be a whole number >= 1": lambda: Frames(path=gone, frames=0),
    }
    for message, action in wrong.items():
        with pytest.raises(UserError, match=message):
            action()
