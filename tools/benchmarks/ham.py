"""Global context by matrix decomposition against self-attention and other modules, over the size of the feature map."""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError
from common.ham.burger import Hamburger
from common.ham.decompose import CD, NMF, VQ
from common.ham.ham import Ham
from common.runtime.training import figures
from common.runtime.verbs.plan import flop_counter
from projects.hamburger.context import DoubleAttention, EMAttention, NonLocal, PyramidPooling

DESCRIPTION = """\
Modules from (B, C, H, W) to the same shape, C channels inside and out, one batch of random non-negative features.
  attention       self-attention of one head, 1x1 convolutions for query, key, value and output, PyTorch's fused kernel
  textbook nmf    the Hamburger block around NMF as in the paper, restated here: every product and quotient a new
                  tensor, the first codes with a product of their own; one-step gradient
  ham nmf|vq|cd   common.ham: Hamburger v1 (1x1 convolution, ReLU for NMF, ham, 1x1 convolution), one-step gradient
  a2, ema, psp    projects.hamburger.context: double attention, EMANet's unit, pyramid pooling
No module has a norm. A case "core" has neither convolutions nor shortcut: attention of the features with themselves,
and the decompositions alone; `bptt` differentiates all steps. forward is without autograd, training is forward and
backward. gmac: 10^9 multiply-adds of the matrix products and convolutions of a forward pass, counted (FlopCounterMode);
formula: the same by hand for the algorithm as published. Ours has one product (H W C r) less for NMF, whose first codes
and first step share it. cpu ms: processor time of this process, which other programs hardly disturb."""

ATTENTION, TEXTBOOK = "attention", "textbook nmf"
FUSED = "ham nmf fused"
MODULES = (ATTENTION, TEXTBOOK, "ham nmf", "ham vq", "ham cd", "a2", "ema", "psp")
CORES = (ATTENTION, TEXTBOOK, "ham nmf", "ham vq", "ham cd", "ham nmf bptt")
WAYS = ("forward", "training")
PARTS = ("module", "core")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="height and width, pixels")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="what is timed")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["module"], help="with convolutions, or without")
    parser.add_argument("--modules", nargs="+", choices=sorted({*MODULES, *CORES}), help="leave others out")
    parser.add_argument("--fused", action="store_true", help="a row with NMF(fused=True), compiled")
    parser.add_argument("--batch", type=int, default=1, help="samples")
    parser.add_argument("--channels", type=int, default=512, help="C")
    parser.add_argument("--rank", type=int, default=64, help="r, number of atoms")
    parser.add_argument("--steps", type=int, default=6, help="K")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def variants(options: argparse.Namespace) -> list[str]:
    every = [name for case in cases(options) for name in variants_of(case, options)]
    return list(dict.fromkeys(every))


def variants_of(case: str, options: argparse.Namespace) -> list[str]:
    """The variants of a case, its baseline first."""
    _, part, way = read(case)
    names = [*(CORES if part == "core" else MODULES), *([FUSED] if options.fused else [])]
    names = [name for name in names if way == "training" or name != "ham nmf bptt"]
    chosen = [name for name in names if options.modules is None or name in (*options.modules, FUSED)]
    if not chosen:
        raise UserError(
            f"--modules {' '.join(options.modules)} leaves nothing for '{case}'. It has: {', '.join(names)}."
        )
    return chosen


def cases(options: argparse.Namespace) -> list[str]:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if min(options.sizes) < 1:
        raise UserError(f"--sizes must be >= 1, got {min(options.sizes)}.")
    return [
        f"{size}x{size}{' core' * (part == 'core')} {way}"
        for part in options.part
        for way in options.only
        for size in sorted(options.sizes)
    ]


def read(case: str) -> tuple[int, str, str]:
    """(size, part, way) of a case."""
    words = case.split()
    return int(words[0].partition("x")[0]), "core" if "core" in words else "module", words[-1]


def make(variant: str, options: argparse.Namespace) -> Callable[[str, int], dict]:
    built = {}

    def step(case: str, repeat: int) -> dict:
        if case not in built:
            built[case] = Step(variant, case, options)
        return built[case]()

    return step


# ---------------------------------------------------------------------------------------------------------------------
# One measurement


class Step:
    """Forward, or forward and backward, of one module on one feature map."""

    def __init__(self, variant: str, case: str, options: argparse.Namespace):
        size, part, self.way = read(case)
        self.device = options.device
        torch.manual_seed(0)
        self.module = build(variant, part, options).to(self.device)
        shape = (options.batch, options.channels, size, size)
        self.x = torch.rand(shape, device=self.device).requires_grad_(self.way == "training")
        self.grad = torch.rand(shape, device=self.device) if self.way == "training" else None
        self.facts = {
            "params": sum(p.numel() for p in self.module.parameters()),
            "gmac": counted(variant, part, size, options) / 1e9,
            "formula": (formula(variant, part, size, options) or math.nan) / 1e9,
        }

    def __call__(self) -> dict:
        on_gpu = self.device.startswith("cuda")
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.process_time()
        if self.way == "forward":
            with torch.no_grad():
                self.module(self.x)
        else:
            torch.autograd.grad(self.module(self.x), [self.x, *self.module.parameters()], self.grad)
        if on_gpu:
            torch.cuda.synchronize()
            return {"gpu MiB": (torch.cuda.max_memory_allocated() - before) / 2**20, **self.facts}
        return {"cpu ms": (time.process_time() - began) * 1e3, **self.facts}


def build(variant: str, part: str, options: argparse.Namespace) -> nn.Module:
    channels = options.channels
    shared = {"rank": options.rank, "steps": options.steps, "eval_steps": options.steps}
    rules = {
        "ham nmf": NMF(**shared, negative="trust"),
        FUSED: NMF(**shared, negative="trust", fused=True),
        "ham nmf bptt": NMF(**shared, negative="trust", gradient="bptt"),
        "ham vq": VQ(**shared),
        "ham cd": CD(**shared),
    }
    if part == "core":
        if variant == ATTENTION:
            return SelfAttention()
        return TextbookNMF(options.rank, options.steps) if variant == TEXTBOOK else Ham(channels, rules[variant])
    if variant in rules:
        return Hamburger(channels, channels, version="v1", ham=rules[variant], norm="none")
    if variant == TEXTBOOK:
        block = Hamburger(channels, channels, version="v1", norm="none")
        block.ham = TextbookNMF(options.rank, options.steps)
        return block
    if variant == "ema":
        return EMAttention(channels, channels, rank=options.rank, norm="none")
    return {ATTENTION: NonLocal, "a2": DoubleAttention, "psp": PyramidPooling}[variant](channels, channels, norm="none")


class SelfAttention(nn.Module):
    """Softmax attention of the pixels with themselves."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)  # fused kernels want channels innermost
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return seen.squeeze(1).transpose(1, 2).reshape(x.shape)


class TextbookNMF(nn.Module):
    """NMF as the paper writes it: codes as (n, r), K updates without autograd, one update of the codes with it."""

    def __init__(self, rank: int, steps: int):
        super().__init__()
        self.rank, self.steps = rank, steps

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        z = x.flatten(2)
        d = F.normalize(torch.rand(len(z), z.shape[1], self.rank, device=z.device), dim=1) if bases is None else bases
        with torch.no_grad():
            c = torch.softmax(z.transpose(1, 2) @ d, dim=2)
            for _ in range(self.steps):
                c = self.update(z, d, c)
                d = d * (z @ c) / (d @ (c.transpose(1, 2) @ c) + 1e-6)
        c = self.update(z, d, c)
        return (d @ c.transpose(1, 2)).reshape(x.shape)

    def update(self, z: Tensor, d: Tensor, c: Tensor) -> Tensor:
        return c * (z.transpose(1, 2) @ d) / (c @ (d.transpose(1, 2) @ d) + 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Multiply-adds


def counted(variant: str, part: str, size: int, options: argparse.Namespace) -> float:
    """Multiply-adds of a forward pass by torch's counter of FLOPs, on tensors without values."""
    key = (options.channels, options.rank, options.steps)
    return options.batch * _counted(variant, part, size, *key)


@cache
def _counted(variant: str, part: str, size: int, channels: int, rank: int, steps: int) -> float:
    plain = argparse.Namespace(channels=channels, rank=rank, steps=steps)
    variant = "ham nmf" if variant == FUSED else variant
    with FakeTensorMode(), torch.no_grad(), flop_counter() as counter:
        build(variant, part, plain)(torch.empty(1, channels, size, size))
    return counter.get_total_flops() / 2


def formula(variant: str, part: str, size: int, options: argparse.Namespace) -> float | None:
    """Multiply-adds of a forward pass as in the paper's cost analysis; None where we have none.

    With n pixels, d channels, r atoms, K steps: NMF K (2 n d r + 2 r^2 (n + d)) + 3 n d r + r^2 (n + d), VQ and CD
    2 K n d r + 2 n d r (their first codes are not used) and r^2 (n + d) for CD's ridge; attention 2 n^2 d. 1x1
    convolutions: n d^2 each, two around a ham, four around attention.
    """
    n, d, r, k = size * size, options.channels, options.rank, options.steps
    small = r * r * (n + d)
    cost = {
        "nmf": k * (2 * n * d * r + 2 * small) + 3 * n * d * r + small,
        "vq": 2 * (k + 1) * n * d * r,
        "cd": 2 * (k + 1) * n * d * r + small,
        ATTENTION: 2 * n * n * d,
    }
    word = next((word for word in cost if word in variant.split()), None)
    if word is None:
        return None
    convolutions = 0 if part == "core" else (4 if variant == ATTENTION else 2) * n * d * d
    return options.batch * float(cost[word] + convolutions)


# ---------------------------------------------------------------------------------------------------------------------
# What the table shows


def seconds(row: Mapping) -> float:
    return row["cpu ms"] / 1e3 if "cpu ms" in row else row["step s"]


def series(rows: Sequence[Mapping]) -> dict[tuple, dict[str, dict[int, float]]]:
    """(part, way, threads) -> variant -> size -> seconds."""
    found: dict[tuple, dict[str, dict[int, float]]] = {}
    for row in rows:
        size, part, way = read(row["case"])
        found.setdefault((part, way, row["threads"]), {}).setdefault(row["variant"], {})[size] = seconds(row)
    return found


def crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Number of pixels from which `ours` is faster, between two sizes on straight lines in the log-log plot.

    0: at every size; None: at none, or not in the end.
    """
    sizes = sorted(ours.keys() & theirs.keys())
    lead = [math.log(theirs[size] / ours[size]) for size in sizes]  # > 0: ours is faster
    if not sizes or lead[-1] <= 0:
        return None
    last = max((i for i, value in enumerate(lead) if value <= 0), default=None)
    if last is None:
        return 0.0
    low, high = 2 * math.log(sizes[last]), 2 * math.log(sizes[last + 1])
    return math.exp(low + (high - low) * -lead[last] / (lead[last + 1] - lead[last]))


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """How much faster than attention, size by size, and from where on."""
    lines = []
    for (part, way, threads), found in series(rows).items():
        if ATTENTION not in found:
            continue
        theirs = found[ATTENTION]
        for name in (name for name in found if name != ATTENTION):
            gains = ", ".join(f"{s}x{s} {theirs[s] / t:.2g}" for s, t in sorted(found[name].items()) if s in theirs)
            pixels = crossover(found[name], theirs)
            start = {None: "slower at the largest size", 0.0: "faster at every size"}.get(
                pixels, f"faster from about {pixels or 0:.0f} pixels on"
            )
            where = f"{part}, {way}, {threads} thread{'s' * (threads > 1)}"
            lines.append(f"{where}: {name} than attention, times faster: {gains}; {start}")
    return lines


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Time against pixels, both logarithmic, one panel per part, way and thread count; slopes 1 and 2 for the eye."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = series(rows)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.8 * lines + 0.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    markers, labelled = "osD^vP*Xh", set()
    for index, ((part, way, threads), found) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        for name, points in found.items():
            place = names.index(name)
            sizes = sorted(points)
            axes.loglog(
                [s * s for s in sizes], [points[s] * 1e3 for s in sizes], linewidth=1.3, markersize=4,
                marker=markers[place % len(markers)], color=figures.COLOURS[place % len(figures.COLOURS)],
                linestyle="--" if place >= len(figures.COLOURS) else "-", label=name if name not in labelled else None,
            )  # fmt: skip
            labelled.add(name)
        pixels = sorted({size * size for points in found.values() for size in points})
        slowest = max(points[s] * 1e3 / (s * s) ** 2 for points in found.values() for s in points if s == max(points))
        fastest = min(points[s] * 1e3 / (s * s) for points in found.values() for s in points if s == max(points))
        for power, factor, text in ((1, 0.6 * fastest, "linear"), (2, 1.6 * slowest, "quadratic")):
            axes.plot(pixels, [factor * p**power for p in pixels], ":", color="0.6", linewidth=1)
            axes.annotate(text, (pixels[-1], factor * pixels[-1] ** power), color="0.5", fontsize=7, ha="right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{part}, {way}, {threads} thread{'s' * (threads > 1)}", fontsize=9)
        axes.set_xlabel("pixels H W")
        axes.set_ylabel("milliseconds")
    figure.legend(loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    figures.save_figure(figure, path)
