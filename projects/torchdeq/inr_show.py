"""Pictures, sound and clips of a reconstructed signal beside the original."""

import wave
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from common.files import atomic
from projects.torchdeq.signals import Signal

ERROR_SCALE = 0.1  # |error| in units of the full range that is drawn white


def psnr(reconstruction: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1]: -10 log10 mean((x - y)^2 / 4), x clamped to [-1, 1]."""
    error = (reconstruction.clamp(-1, 1) - original) / 2
    return float(-10 * error.double().square().mean().clamp_min(1e-20).log10())


def draw(signal: Signal, values: Tensor, path: Path) -> Path:
    """One PNG that shows `values` (*grid, C) in [-1, 1] as reconstruction of `signal`; returns `path`."""
    figure = {"image": _image, "audio": _audio, "video": _video}[signal.kind](signal, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return path


def pixels(values: Tensor) -> np.ndarray:
    """Values (..., C) in [-1, 1] as uint8 (..., C), or (...) when C is 1."""
    levels = (values.clamp(-1, 1).float() * 127.5 + 127.5).round().to("cpu").numpy().astype(np.uint8)
    return levels[..., 0] if levels.shape[-1] == 1 else levels


def write_wav(path: Path, values: Tensor, rate: float) -> Path:
    """Samples (T, 1) in [-1, 1] as 16-bit PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (values[:, 0].clamp(-1, 1).double() * 32767).round().to("cpu").numpy().astype("<i2")
    with atomic(path) as temporary, open(temporary, "wb") as raw, wave.open(raw, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(round(rate))
        file.writeframes(levels.tobytes())
    return path


def write_gif(path: Path, signal: Signal, values: Tensor) -> Path:
    """Original and reconstruction side by side, (T, H, W, C), at the rate of the clip."""
    import torch
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    both = pixels(torch.cat([signal.values, values.to(signal.values)], dim=2))
    frames = [Image.fromarray(frame) for frame in both]
    with atomic(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=1000 / signal.rate, loop=0
        )
    return path


def _image(signal: Signal, values: Tensor) -> Figure:
    height, width = signal.grid
    error = (values.clamp(-1, 1) - signal.values).abs().mean(-1) / 2
    panel = 4.0
    figure = Figure(figsize=(3 * panel + 0.6, panel * height / width + 0.7), layout="constrained")
    axes = figure.subplots(1, 3)
    _picture(axes[0], signal.values, f"original, {height} x {width}")
    _picture(axes[1], values, f"reconstruction, PSNR {psnr(values, signal.values):.2f} dB")
    shown = axes[2].imshow(error.numpy(), cmap="magma", vmin=0, vmax=ERROR_SCALE, interpolation="nearest")
    axes[2].set_title(f"|error|, mean {float(error.mean()):.4f} of the range", fontsize=10)
    axes[2].set_axis_off()
    figure.colorbar(shown, ax=axes[2], shrink=0.8, pad=0.02, extend="max")
    return figure


def _audio(signal: Signal, values: Tensor) -> Figure:
    seconds = np.arange(signal.grid[0]) / signal.rate
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    title = f"reconstruction, PSNR {psnr(values, signal.values):.2f} dB"
    rows = ((signal.values, "original"), (values, title), (values - signal.values, "error"))
    for axis, (samples, label) in zip(axes, rows):
        axis.plot(seconds, samples[:, 0].numpy(), linewidth=0.5)
        axis.set_ylim(-1.05, 1.05)
        axis.set_title(label, fontsize=10)
    axes[-1].set_xlabel("seconds")
    return figure


def _video(signal: Signal, values: Tensor) -> Figure:
    frames, height, width = signal.grid
    chosen = np.unique(np.linspace(0, frames - 1, min(frames, 6)).round().astype(int))
    panel = 2.6
    figure = Figure(figsize=(panel * len(chosen), 2 * panel * height / width + 1.0), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for column, number in enumerate(chosen):
        _picture(axes[0, column], signal.values[number], f"frame {number}")
        _picture(axes[1, column], values[number], f"{psnr(values[number], signal.values[number]):.2f} dB")
    single = np.mean([psnr(a, b) for a, b in zip(values, signal.values)])
    figure.suptitle(
        f"original above, reconstruction below: PSNR {psnr(values, signal.values):.2f} dB over all, "
        f"{single:.2f} dB mean of frames",
        fontsize=10,
    )
    return figure


def _picture(axis, values: Tensor, title: str) -> None:
    axis.imshow(pixels(values), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
