"""Optical flow at test time: DEQ-Flow's network against torchvision's RAFT, and the correlation lookup."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.deq.solvers import Picard
from common.errors import UserError
from projects.deq_flow.raft.correlation import AllPairs, OnDemand
from projects.deq_flow.raft.network import FlowEquilibrium, grid

DESCRIPTION = """\
One random pair, random weights, size base (5.2 M parameters). A training step is measured by: flow_memory.
  inference  12 steps and one upsampling, without autograd: torchvision's raft_large (5.3 M parameters, which upsamples
             after every step), ours with the correlation volume (dense) and without (on_demand)
  lookup     one lookup of 4 levels in windows of 9x9, without the volume's own cost: dense and on_demand
The first variant of a case is what its ratios refer to."""

CASES = ("inference", "lookup")
THEIRS, DENSE, ON_DEMAND = "torchvision raft_large", "dense", "on_demand"
STEPS = 12
TINY = dict(
    feature_channels=16, hidden_channels=8, corr_channels=[16, 12], flow_channels=[8, 4], motion_channels=8,
    head_channels=16, encoder_channels=[8, 12, 16],
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to measure")
    add_size_arguments(parser)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the pair and of the network, and the device."""
    parser.add_argument(
        "--size", type=int, nargs=2, default=[320, 448], metavar=("HEIGHT", "WIDTH"), help="of the pair"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a network of a few thousand parameters, to try it out")


def variants(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(name for case in cases(options) for name in variants_of(case, options)))


def variants_of(case: str, options: argparse.Namespace) -> list[str]:
    """The variants a case is measured with, its baseline first."""
    return {"inference": [THEIRS, DENSE, ON_DEMAND], "lookup": [DENSE, ON_DEMAND]}[case]


def cases(options: argparse.Namespace) -> list[str]:
    check_size(options)
    return list(options.only)


def check_size(options: argparse.Namespace) -> None:
    """Raises `UserError` for a device that is not there or a size RAFT cannot take."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if min(options.size) < 128 or any(side % 8 for side in options.size):
        raise UserError(f"--size must be multiples of 8 of at least 128, got {options.size}. Use --size 320 448.")


def make(variant: str, options: argparse.Namespace) -> Callable[[str, int], dict]:
    works: dict[str, Callable[[], dict | None]] = {}

    def step(case: str, repeat: int) -> dict:
        if case not in works:
            works[case] = MAKERS[case](variant, options)
        facts = works[case]() or {}
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return facts

    return step


def sizes(options: argparse.Namespace) -> dict:
    return TINY if options.tiny else {}


def pair(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(1, 3, *options.size, generator=generator).to(options.device) * 2 - 1
    return draw(), draw()


def network(lookup: str, options: argparse.Namespace) -> torch.nn.Module:
    """Ours in evaluation mode: 12 plain steps, all of them taken."""
    torch.manual_seed(0)
    deq = DEQ(solver=Picard(max_iter=STEPS, stop="never"))
    net = FlowEquilibrium(deq=deq, norm=partial(apply_norm, kind="weight"), lookup=lookup, **sizes(options))
    return net.eval().to(options.device)


def inference(variant: str, options: argparse.Namespace) -> Callable[[], None]:
    first, second = pair(options)
    if variant == THEIRS:
        from torchvision.models.optical_flow import raft_large

        torch.manual_seed(0)
        theirs = raft_large(weights=None).eval().to(options.device)
        run = lambda: theirs(first, second, num_flow_updates=STEPS)
    else:
        ours = network(variant, options)
        run = lambda: ours(first, second)

    def step() -> None:
        with torch.no_grad():
            run()

    return step


def lookup(variant: str, options: argparse.Namespace) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    channels = TINY["feature_channels"] if options.tiny else 256
    height, width = (side // 8 for side in options.size)
    one, two = (torch.randn(1, channels, height, width, generator=generator).to(options.device) for _ in range(2))
    coords = grid(1, height, width, device=one.device) + torch.randn(1, 2, height, width, generator=generator).to(one)
    find = {DENSE: AllPairs, ON_DEMAND: OnDemand}[variant]()
    with torch.no_grad():
        prepared = find.prepare(one, two)

    def step() -> None:
        with torch.no_grad():
            find(prepared, coords)

    return step


MAKERS = {"inference": inference, "lookup": lookup}

# ---------------------------------------------------------------------------------------------------------------------
# What the table shows


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """Pairs per second, and the ratios to torchvision's network and to the dense lookup."""
    lines = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        table = {(row["case"], row["variant"]): row for row in rows if row["threads"] == threads}
        where = f"{threads} thread{'s' * (threads > 1)}"
        for name in (THEIRS, DENSE, ON_DEMAND):
            if ("inference", name) in table:
                row = table["inference", name]
                ratio = "" if name == THEIRS else f", {row['ratio']:.2f} of raft_large's time"
                lines.append(f"{where}: {name}: {1 / row['step s']:.2f} pairs/s{ratio if name == DENSE else ''}")
        if ("lookup", ON_DEMAND) in table:
            ratio = table["lookup", ON_DEMAND]["ratio"]
            lines.append(f"{where}: a lookup on demand takes {ratio:.1f} times as long as a dense one")
    return lines
