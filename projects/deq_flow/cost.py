"""What a training step costs: peak memory in fresh processes, and seconds side by side in one.

`python -m projects.deq_flow.cost <variant> ...` measures the memory of one variant, `... time` the seconds of all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.deq.correction import Correction
from common.deq.grads import Backprop, OneStep, Unrolled
from common.deq.layer import DEQ
from common.deq.layers import apply_norm
from common.deq.solvers import Picard
from common.errors import UserError
from common.runtime.training.memory import peak_growth
from projects.deq_flow.losses import flow_loss
from projects.deq_flow.module import DeqFlow
from projects.deq_flow.raft.network import FlowEquilibrium

ROOT = Path(__file__).resolve().parents[2]


def deq(steps: int, states: int, grad) -> DEQ:
    """Plain iteration of `steps`, all of them taken, in as many slices as states."""
    return DEQ(solver=Picard(max_iter=steps, stop="never"), grad=grad, states=states, sliced=states > 1)


def unrolled(steps: int) -> DEQ:
    """All steps differentiated, with a loss on each: RAFT."""
    return DEQ(solver=Picard(max_iter=steps, stop="never"), grad=Backprop(), states=steps)


VARIANTS: Mapping[str, Callable[[], DEQ]] = {
    "one_step": lambda: unrolled(1),  # the encoders, one application, one loss: what all have in common
    "deq": lambda: deq(36, 6, OneStep(recompute=True)),  # as the published settings here
    "deq_kept": lambda: deq(36, 6, OneStep()),
    "deq_3_steps": lambda: deq(36, 2, Unrolled(steps=3, tau=1.0, recompute=True)),
    "unroll_12": lambda: unrolled(12),
    "unroll_36": lambda: unrolled(36),
}
TIMED = ("deq", "deq_kept", "unroll_12", "unroll_36")


def build(variant: str, **sizes) -> FlowEquilibrium:
    """The network of a variant, base size unless `sizes` (arguments of `FlowEquilibrium`) say otherwise."""
    torch.manual_seed(0)
    norm = partial(apply_norm, kind="weight")
    return FlowEquilibrium(deq=VARIANTS[variant](), **{"norm": norm, **sizes})


def training_step(net: nn.Module, height: int, width: int) -> Callable[[], None]:
    """Forward and backward of one random pair of height x width, without the optimiser."""
    generator = torch.Generator().manual_seed(0)
    device = next(net.parameters()).device
    first, second = (torch.rand(1, 3, height, width, generator=generator).to(device) * 2 - 1 for _ in range(2))
    flow, valid = torch.zeros(1, 2, height, width, device=device), torch.ones(1, height, width, device=device)
    correction = Correction(gamma=0.8)

    def step() -> None:
        net.train()
        net.zero_grad(set_to_none=True)
        correction([flow_loss(output, flow, valid) for output in net.outputs(first, second)]).backward()

    return step


def memory(variant: str, height: int, width: int, **sizes) -> float:
    """MiB by which this process grows in two training steps; measure in a fresh one."""
    step = training_step(build(variant, **sizes), height, width)
    return peak_growth(lambda: (step(), step()))


def seconds(height: int, width: int, rounds: int, **sizes) -> dict[str, float]:
    """Variant -> median seconds of a training step; the variants take turns, one round more goes first."""
    steps = {variant: training_step(build(variant, **sizes), height, width) for variant in TIMED}
    taken: dict[str, list[float]] = {variant: [] for variant in TIMED}
    for number in range(rounds + 1):
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                taken[variant].append(time.perf_counter() - started)
    return {variant: statistics.median(column) for variant, column in taken.items()}


class FlowCost(DeqFlow):
    """Reports what training steps of other sizes and rules cost; its own network only makes a run of it.

    Metrics: `<variant>_mib`, growth of a fresh process in MiB; `<variant>_net_mib`, the same without what one
    application needs; `<variant>_step_s`, median seconds. Variants: `VARIANTS`.

    height, width  of the pair;  rounds  measured steps
    measured       arguments of the measured `FlowEquilibrium`; none: size base
    others         see `DeqFlow`
    """

    unit = "measurements"

    def __init__(
        self,
        *,
        height: int,
        width: int,
        rounds: int,
        measured: Mapping[str, object],
        net: nn.Module,
        crop: Sequence[int],
        max_flow: float,
        freeze_norms: bool,
        padding: str,
        reuse: bool | str,
        optimizer: Callable,
        schedule: Callable | None,
        correction: Callable | None,
    ):
        super().__init__(
            net=net, crop=crop, max_flow=max_flow, freeze_norms=freeze_norms, padding=padding, reuse=reuse,
            optimizer=optimizer, schedule=schedule, correction=correction,
        )  # fmt: skip
        if rounds < 1:
            raise UserError(f"project.rounds must be >= 1, got {rounds}. Set it to the steps to measure.")
        self.question = ["--height", str(height), "--width", str(width), "--rounds", str(rounds)]
        self.question += ["--sizes", json.dumps(dict(measured)), "--threads", str(torch.get_num_threads())]

    def evaluation_step(self, batch: dict) -> dict[str, tuple[float, int]]:
        """All of it, whatever the batch."""
        grown = {variant: ask(variant, *self.question) for variant in VARIANTS}
        found = {f"{variant}_mib": mib for variant, mib in grown.items()}
        found |= {
            f"{variant}_net_mib": mib - grown["one_step"] for variant, mib in grown.items() if "one" not in variant
        }
        found |= {f"{variant}_step_s": taken for variant, taken in ask("time", *self.question).items()}
        return {name: (value, 1) for name, value in found.items()}


def ask(*arguments: str):
    """What `python -m projects.deq_flow.cost <arguments>` answers."""
    command = [sys.executable, "-m", "projects.deq_flow.cost", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1:]}. Run it by hand.")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m projects.deq_flow.cost", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=[*VARIANTS, "time"])
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=json.loads, default={}, help="arguments of FlowEquilibrium as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = (options.height, options.width)
    if options.what == "time":
        print(json.dumps(seconds(*size, options.rounds, **options.sizes)))
    else:
        print(json.dumps(memory(options.what, *size, **options.sizes)))


if __name__ == "__main__":
    main()
