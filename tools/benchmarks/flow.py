"""Optical flow as an equilibrium against unrolling: memory and time of a training step, inference, the lookup."""

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch

from common.deq.layer import DEQ
from common.deq.solvers import Picard
from common.errors import UserError
from projects.deq_flow.cost import VARIANTS, build, training_step
from projects.deq_flow.raft.correlation import AllPairs, OnDemand
from projects.deq_flow.raft.network import grid

SAYS = """\
One random pair, random weights, size base (5.2 M parameters) with weight normalisation.
  training   forward and backward, without the optimiser. unroll_36, unroll_12: all steps differentiated with a loss on
             each, as RAFT trains; deq: 36 steps of plain iteration without autograd, six losses of one differentiated
             step, evaluated again in the backward pass; deq_kept: the same with all activations kept; deq_3_steps: two
             losses of three steps; one_step: the encoders and one step, what all have in common
  inference  12 steps and one upsampling, without autograd: torchvision's raft_large (5.3 M parameters, which upsamples
             after every step), ours with the correlation volume (dense) and without (on_demand)
  lookup     one lookup of 4 levels in windows of 9x9, without the volume's own cost: dense and on_demand
The first variant of a case is what its ratios refer to."""

CASES = ("training", "inference", "lookup")
TRAINING = ("unroll_36", "unroll_12", "deq", "deq_kept", "deq_3_steps", "one_step")
THEIRS, DENSE, ON_DEMAND = "torchvision raft_large", "dense", "on_demand"
STEPS = 12
TINY = dict(
    feature_channels=16, hidden_channels=8, corr_channels=[16, 12], flow_channels=[8, 4], motion_channels=8,
    head_channels=16, encoder_channels=[8, 12, 16],
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to measure")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[320, 448], metavar=("HEIGHT", "WIDTH"), help="of the pair"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a network of a few thousand parameters, to try it out")


def variants(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(name for case in cases(options) for name in variants_of(case, options)))


def variants_of(case: str, options: argparse.Namespace) -> list[str]:
    """The variants a case is measured with, its baseline first."""
    return {"training": list(TRAINING), "inference": [THEIRS, DENSE, ON_DEMAND], "lookup": [DENSE, ON_DEMAND]}[case]


def cases(options: argparse.Namespace) -> list[str]:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    if min(options.size) < 128 or any(side % 8 for side in options.size):
        raise UserError(f"--size must be multiples of 8 of at least 128, got {options.size}. Use --size 320 448.")
    return list(options.only)


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


def training(variant: str, options: argparse.Namespace) -> Callable[[], None]:
    return training_step(build(variant, **sizes(options)).to(options.device), *options.size)


def network(lookup: str, options: argparse.Namespace) -> torch.nn.Module:
    """Ours in evaluation mode: 12 plain steps, all of them taken."""
    net = build("one_step", lookup=lookup, **sizes(options))
    net.deq = DEQ(solver=Picard(max_iter=STEPS, stop="never"))
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


MAKERS = {"training": training, "inference": inference, "lookup": lookup}
assert set(TRAINING) == set(VARIANTS)

# ---------------------------------------------------------------------------------------------------------------------
# What the table shows


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """The ratios of the issue: memory net of encoders and one step, step time, pairs per second."""
    lines = []
    for threads in dict.fromkeys(row["threads"] for row in rows):
        table = {(row["case"], row["variant"]): row for row in rows if row["threads"] == threads}
        where = f"{threads} thread{'s' * (threads > 1)}"
        if ("training", "deq") in table:
            time = lambda name, table=table: table["training", name]["step s"]
            lines.append(
                f"{where}: a step of deq takes {time('deq') / time('unroll_36'):.2f} of unroll_36's seconds and "
                f"{time('deq') / time('unroll_12'):.2f} of unroll_12's (asked: at most .6 of unroll_36's)"
            )
        if "peak MiB" in table.get(("training", "deq"), {}):
            net = lambda name, table=table: (
                table["training", name]["peak MiB"] - table["training", "one_step"]["peak MiB"]
            )
            others = ("deq_kept", "unroll_12", "unroll_36")
            more = ", ".join(f"{name} {net(name) / max(net('deq'), 1):.2f}" for name in others)
            lines.append(
                f"{where}: memory net of encoders and one step, in that of deq ({net('deq')} MiB): {more} "
                f"(asked of unroll_12 and unroll_36: 3, 8)"
            )
        for name in (THEIRS, DENSE, ON_DEMAND):
            if ("inference", name) in table:
                row = table["inference", name]
                ratio = "" if name == THEIRS else f", {row['ratio']:.2f} of raft_large's time (asked: at most 1)"
                lines.append(f"{where}: {name}: {1 / row['step s']:.2f} pairs/s{ratio if name == DENSE else ''}")
        if ("lookup", ON_DEMAND) in table:
            ratio = table["lookup", ON_DEMAND]["ratio"]
            lines.append(f"{where}: a lookup on demand takes {ratio:.1f} times as long as a dense one")
    return lines
