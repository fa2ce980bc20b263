"""Memory and time of one training step of DEQ-Flow: the equilibrium against unrolling, as its claim measures them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from common.deq.correction import Correction
from common.deq.grads import Backprop, OneStep, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.deq.solvers import Picard
from projects.deq_flow.losses import flow_loss
from projects.deq_flow.raft.network import FlowEquilibrium
from tools.benchmarks import flow

DESCRIPTION = """\
Forward and backward pass of one random pair, random weights, size base (5.2 M parameters) with weight normalisation,
without the optimiser.
  unroll_36, unroll_12  all steps differentiated with a loss on each, as RAFT trains
  deq                   36 steps of plain iteration without autograd, six losses of one differentiated step each, that
                        step evaluated again in the backward pass
  deq_kept              the same with all activations kept
  deq_3_steps           two losses of three differentiated steps
  one_step              the encoders and one step: what all the others contain
Ratios refer to unroll_36."""


def deq(steps: int, states: int, grad) -> DEQ:
    """Plain iteration of `steps`, all of them taken, in as many slices as states."""
    return DEQ(solver=Picard(max_iter=steps, stop="never"), grad=grad, states=states, sliced=states > 1)


def unrolled(steps: int) -> DEQ:
    """All steps differentiated, with a loss on each: RAFT."""
    return DEQ(solver=Picard(max_iter=steps, stop="never"), grad=Backprop(), states=steps)


VARIANTS: Mapping[str, Callable[[], DEQ]] = {
    "unroll_36": lambda: unrolled(36),
    "unroll_12": lambda: unrolled(12),
    "deq": lambda: deq(36, 6, OneStep(recompute=True)),  # the gradient rule of the published settings
    "deq_kept": lambda: deq(36, 6, OneStep()),
    "deq_3_steps": lambda: deq(36, 2, Unrolled(steps=3, tau=1.0, recompute=True)),
    "one_step": lambda: unrolled(1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flow.add_size_arguments(parser)


def variants(options: argparse.Namespace) -> list[str]:
    return list(VARIANTS)


def cases(options: argparse.Namespace) -> list[str]:
    flow.check_size(options)
    return ["training"]


def make(variant: str, options: argparse.Namespace) -> Callable[[str, int], dict]:
    # PyTorch imports 145 MiB of code with the first recomputed step. One small step first keeps them out of the peak.
    training_step(build(variant, levels=2, **flow.TINY).to(options.device), 32, 48)()
    work: list[Callable[[], None]] = []

    def step(case: str, repeat: int) -> dict:
        if not work:
            net = build(variant, **flow.sizes(options)).to(options.device)
            work.append(training_step(net, *options.size))
        work[0]()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return {}

    return step


def build(variant: str, **sizes) -> FlowEquilibrium:
    """The network of a variant, base size unless `sizes` (arguments of `FlowEquilibrium`) say otherwise."""
    torch.manual_seed(0)
    norm = partial(apply_norm, kind="weight")
    return FlowEquilibrium(deq=VARIANTS[variant](), **{"norm": norm, **sizes})


def training_step(net: nn.Module, height: int, width: int) -> Callable[[], None]:
    """Forward and backward pass of one random pair of height x width pixels."""
    generator = torch.Generator().manual_seed(0)
    device = next(net.parameters()).device
    first, second = (torch.rand(1, 3, height, width, generator=generator).to(device) * 2 - 1 for _ in range(2))
    truth, valid = torch.zeros(1, 2, height, width, device=device), torch.ones(1, height, width, device=device)
    correction = Correction(gamma=0.8)

    def step() -> None:
        net.train()
        net.zero_grad(set_to_none=True)
        correction([flow_loss(output, truth, valid) for output in net.outputs(first, second)]).backward()

    return step


# ---------------------------------------------------------------------------------------------------------------------
# What the table shows


def metrics(rows: Sequence[Mapping]) -> dict[str, float]:
    """`<variant>_step_s`, median seconds; `<variant>_mib`, growth of a fresh process in two steps; `<variant>_net_mib`,
    that growth beyond what the encoders and one step need. At the first number of threads."""
    table = _by_variant(rows)
    found = {f"{name}_step_s": row["step s"] for name, row in table.items()}
    if all("peak MiB" in row for row in table.values()):
        found |= {f"{name}_mib": float(row["peak MiB"]) for name, row in table.items()}
        found |= {
            f"{name}_net_mib": float(row["peak MiB"] - table["one_step"]["peak MiB"])
            for name, row in table.items()
            if name != "one_step"
        }
    return found


def _by_variant(rows: Sequence[Mapping]) -> dict[str, Mapping]:
    return {row["variant"]: row for row in rows if row["threads"] == rows[0]["threads"]}


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """The ratios the claim asks for: step time, memory beyond the encoders and one step."""
    found = metrics(rows)
    seconds = found["deq_step_s"]
    lines = [
        f"a step of deq takes {seconds / found['unroll_36_step_s']:.2f} of unroll_36's seconds and "
        f"{seconds / found['unroll_12_step_s']:.2f} of unroll_12's"
    ]
    if "deq_net_mib" in found:
        net = found["deq_net_mib"]
        more = ", ".join(
            f"{name} {found[f'{name}_net_mib'] / max(net, 1):.2f}" for name in ("deq_kept", "unroll_12", "unroll_36")
        )
        lines.append(
            f"memory beyond the encoders and one step, as multiples of that of deq ({net:.0f} MiB): {more} "
            "(official code: 216 MB with six corrections, 774 with 12 steps unrolled, 2493 with 36)"
        )
    return lines
