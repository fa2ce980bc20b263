"""Flow along a clip: frames in, coloured flow out, and what starting from the last equilibrium saves."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from common.data.flow.colours import flow_to_rgb
from common.data.flow.frames import Frames
from common.data.images.module import to_unit_range
from common.data.pictures import is_picture
from common.errors import UserError
from common.files import atomic, write_json
from common.runtime.training import figures
from projects.deq_flow.pictures import largest_motion, tile, with_wheel

RATE = 10.0  # frames per second of what has no rate of its own
ZERO = "from zero"
FILMS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class Clip:
    """Frames uint8 (3, H, W) of one size; `rate` in frames per second."""

    name: str
    frames: Iterable[Tensor]
    rate: float = RATE

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        for frame in self.frames:
            count += 1
            yield frame
        if count < 2:
            what = "one frame" if count else "no frames"
            raise UserError(
                f"{self.name} has {what}, flow needs two. Give sample.input a clip, "
                "a folder of pictures, or two pictures: sample.input=[first.png,second.png]."
            )


def open_clips(path: Path | list[Path]) -> list[Clip]:
    """The sequences of a folder of pictures, a list of pictures, an animated picture, or a film (with PyAV).

    Raises UserError for what is none of them, now or when it is read.
    """
    if not isinstance(path, Path) or path.is_dir() or is_picture(path.name):
        frames = Frames(path)
        return [Clip(name, frames.read(name)) for name in frames.sequences]
    return [_film(path)]


def _film(path: Path) -> Clip:
    if path.suffix.lower() not in FILMS:
        raise UserError(
            f"sample.input={path} is no clip. Give a folder of frames, an animated .gif or a film: {', '.join(FILMS)}."
        )
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{path} is a film, and there is nothing here to read films with: pip install av, or split it into frames "
            f"(ffmpeg -i {path.name} frames/%05d.png) and give sample.input that folder."
        ) from error
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise UserError(f"{path} holds no pictures. Give sample.input a film or a folder of frames.")
            rate = film.streams.video[0].average_rate
    except (OSError, ValueError) as error:  # PyAV's errors are kinds of these
        raise UserError(f"{path} cannot be read as a film ({error}). Give sample.input a folder of frames.") from error

    def frames() -> Iterator[Tensor]:
        try:
            with av.open(str(path)) as film:
                for frame in film.decode(video=0):
                    yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}). Give sample.input a folder of frames.") from error

    return Clip(path.stem, frames(), float(rate) if rate else RATE)


# ---------------------------------------------------------------------------------------------------------------------
# Solving


def steps_needed(solution, tol: float) -> tuple[int, float]:
    """(evaluations until the relative residual of the worst sample is at most `tol`, its smallest relative residual).

    Those made if it never was. Reads the device.
    """
    trace = solution.residual_trace[1].amax(0)
    reached = (trace <= tol).nonzero()
    return int(reached[0]) + 1 if len(reached) else len(trace), float(trace.min())


class Follower:
    """Estimates pair after pair of one sequence.

    reuse  False: every solve starts from zero; True: from the last equilibrium; "interpolate": from its hidden state
           and its flow carried along by itself
    """

    def __init__(self, module, reuse: bool | str):
        self.module, self.reuse, self.start = module, reuse, None

    def __call__(self, first: Tensor, second: Tensor) -> tuple[Tensor, int, float]:
        """Frames (B, 3, H, W) in [-1, 1] -> (flow (B, 2, H, W) in pixels, evaluations, relative residual)."""
        net = self.module.net
        flow = self.module.estimate(first, second, start=self.start)
        if self.reuse:
            self.start = net.carried() if self.reuse == "interpolate" else net.state
        return flow, *steps_needed(net.deq.solution, net.deq.eval_solver.tol)


@torch.no_grad()
def write_clip(module, clip: Clip, folder: Path, *, reuse: bool | str) -> list[Path]:
    """See `projects.deq_flow.module.DeqFlow.show_files`. The flow drawn is that of `reuse`."""
    ways = {ZERO: Follower(module, False)}
    if reuse:
        ways["reuse, interpolated" if reuse == "interpolate" else "reuse"] = Follower(module, reuse)
    rows, shown, frames, scale = [], [], [], 0.0
    for number, pair in enumerate(pairwise(clip)):
        first, second = (to_unit_range(frame[None].to(module.device)) for frame in pair)
        flows, row = {}, {"pair": number}
        for name, follow in ways.items():
            flow, steps, residual = follow(first, second)
            flows[name] = flow[0].float().cpu()
            row[name] = {"steps": steps, "residual": residual}
        chosen = flows[list(ways)[-1]]
        row["mean_motion_px"] = float(torch.linalg.vector_norm(chosen, dim=0).mean())
        if len(flows) > 1:
            row["difference_px"] = float(torch.linalg.vector_norm(chosen - flows[ZERO], dim=0).mean())
        rows.append(row)
        scale = max(scale, largest_motion(chosen))  # colours of later frames do not flicker
        coloured = with_wheel(flow_to_rgb(chosen, scale), scale)
        frames.append(_write_png(folder / "frames" / f"{number:06d}.png", coloured))
        shown.append(torch.cat([pair[0], coloured], dim=2 if pair[0].shape[1] > pair[0].shape[2] else 1))
    written = [_write_gif(folder / "flow.gif", shown, clip.rate)]
    film = write_film(folder / "flow.mp4", shown, clip.rate)
    if film is None:
        print("No flow.mp4: there is nothing here to write films with (pip install av). flow.gif shows the same.")
    deq = module.net.deq
    summary = {name: sum(row[name]["steps"] for row in rows) / len(rows) for name in ways}
    write_json(folder / "iterations.json", {
        "tolerance": deq.eval_solver.tol, "budget": deq.eval_solver.max_iter, "mean_steps": summary, "pairs": rows,
    })  # fmt: skip
    _plot(folder / "iterations.png", rows, list(ways), deq.eval_solver)
    print("evaluations per pair: " + ", ".join(f"{name} {steps:.1f}" for name, steps in summary.items()))
    return [*written, *([film] if film else []), folder / "iterations.png", folder / "iterations.json", *frames]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write_png(path: Path, pixels: Tensor) -> Path:
    from PIL import Image

    with atomic(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(temporary, format="PNG")
    return path


def _write_gif(path: Path, frames: list[Tensor], rate: float) -> Path:
    tiles = [tile(frame, 480) for frame in frames]
    with atomic(path) as temporary:
        tiles[0].save(
            temporary, format="GIF", save_all=True, append_images=tiles[1:], duration=1000 / rate, loop=0
        )  # fmt: skip
    return path


def write_film(path: Path, frames: list[Tensor], rate: float) -> Path | None:
    """H.264 (or MPEG-4 where that is missing) of frames uint8 (3, H, W) of one size; None without PyAV."""
    try:
        import av
    except ImportError:
        return None
    height, width = (side // 2 * 2 for side in frames[0].shape[1:])  # 4:2:0 needs even sides
    with atomic(path) as temporary, av.open(str(temporary), "w", format="mp4") as film:
        stream = None
        for codec in ("libx264", "mpeg4"):
            with suppress(ValueError):  # an unknown codec
                stream = film.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
                break
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            pixels = frame[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode(None))
    return path


def _plot(path: Path, rows: list[dict], ways: list[str], solver) -> None:
    figure, axes = figures.new_figure()
    for colour, name in zip(figures.COLOURS, ways):
        axes.plot([row["pair"] for row in rows], [row[name]["steps"] for row in rows], "o-", color=colour, label=name)
    axes.axhline(solver.max_iter, color="0.6", linestyle=":", label="budget: not reached")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("pair")
    axes.set_ylabel(f"evaluations until relative residual {solver.tol:g}")
    figure.legend(loc="outside lower center", ncols=len(ways) + 1, frameon=False)
    figures.save_figure(figure, path)
