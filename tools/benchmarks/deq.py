"""Fixed-point solvers and gradient rules of common/deq against the textbook algorithms, restated here.

Problems with known answers; every number of the table is measured in this process.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.deq.grads import Backprop, Implicit, Neumann, OneStep, Unrolled
from common.deq.solve import solve
from common.deq.solvers import Anderson, Broyden, NewtonKrylov, Picard
from common.errors import UserError
from tools.fixed_points import FAMILIES, measure, textbook

DESCRIPTION = """\
Solvers of common/deq against the algorithms as in the textbook (tools/fixed_points.py: plain iteration; Anderson with
an absolute ridge of 1e-4, the Gram matrix from scratch at each step, the oldest point dropped; good Broyden as a sum of
rank-one terms; all three stop when the worst sample of the batch has converged).
  random .95       z -> A z + b, D 256, B 8, Gaussian A of spectral radius .95, relative residual 1e-5
  symmetric .99    the same, symmetric A of spectral radius .99, relative residual 1e-4
  overhead         tanh layer, D 512, B 32, always 40 steps: milliseconds per step beyond those of the map
  tanh             tanh(W z + x), D 512, B 32, W of norm 1.5, relative residual 1e-5: time and error
  spread           64 linear maps of radius .5 to .955 in one batch (the slowest needs 15 times the steps of the
                   fastest), relative residual 1e-5, with and without taking finished samples out of the batch
  families         maps of many kinds (tools/fixed_points.py:FAMILIES, where each is described), five of each: median
                   over all samples of the evaluations until the tolerance is met, share that met it in percent,
                   smallest relative residual (geometric mean), and the ratio of the evaluations, or of the residuals
                   where none of the first three variants brings half of the samples there, to the best of those
  gradient         rules on a tanh layer (D 512, B 32) at its fixed point against the dense solve in double: relative
                   error and cosine of dL/dW; the time is forward and backward, without the solve
evaluations: calls of the map until the last sample has converged; sample evals: what they cost in samples; error: worst
relative distance from the true solution. The first variant of a case is what its ratios refer to."""

CASES = ("random .95", "symmetric .99", "overhead", "tanh", "spread", "families", "gradient")
FAMILY = "family "  # the case "families" is one case per family, called so and by its name
TEXTBOOK = ("textbook picard", "textbook anderson", "textbook broyden")
REFERENCES = ("textbook picard", "textbook anderson", "textbook anderson, relative ridge")  # of the families
OURS = {
    "picard": lambda **o: Picard(**o),
    "anderson": lambda **o: Anderson(**o),
    "anderson m=10": lambda **o: Anderson(m=10, **o),
    "anderson m=20": lambda **o: Anderson(m=20, **o),
    "broyden": lambda **o: Broyden(**o),
    "broyden memory 10": lambda **o: Broyden(memory=10, **o),
    "newton-krylov": lambda **o: NewtonKrylov(**o),
}
RULES = {
    "full unroll, 30 steps": Backprop(steps=30),
    "full unroll, 30 steps, recomputed": Backprop(steps=30, recompute=True),
    "implicit, picard": Implicit(solver=Picard(max_iter=300, tol=1e-7)),
    "implicit, anderson": Implicit(solver=Anderson(max_iter=300, tol=1e-7)),
    "implicit, broyden": Implicit(solver=Broyden(max_iter=100, tol=1e-7)),
    "phantom unrolled, k 5, tau .5": Unrolled(steps=5, tau=0.5),
    "phantom neumann, k 5, tau .5": Neumann(steps=5, tau=0.5),
    "phantom neumann, k 20, tau 1": Neumann(steps=20, tau=1.0),
    "one step": OneStep(),
}
SPREAD = {"whole batch": False, "compacted": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to measure")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=1, help="of the maps")


def variants(options: argparse.Namespace) -> list[str]:
    every = [name for case in cases(options) for name in variants_of(case, options)]
    return list(dict.fromkeys(every))


def variants_of(case: str, options: argparse.Namespace) -> list[str]:
    """The variants a case is measured with, its baseline first."""
    if case == "gradient":
        return list(RULES)
    if case.startswith(FAMILY):
        return [*REFERENCES, "anderson", "anderson m=10", "broyden"]
    if case == "spread":
        return [f"{solver}, {how}" for solver in ("picard", "anderson", "broyden") for how in SPREAD]
    if case == "overhead":
        return ["textbook anderson", "textbook picard", "textbook broyden", "picard", "anderson", "broyden"]
    return ["textbook anderson", "textbook picard", "textbook broyden", *OURS]


def cases(options: argparse.Namespace) -> list[str]:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    families = [FAMILY + name for name in FAMILIES]
    return [case for only in options.only for case in (families if only == "families" else [only])]


def make(variant: str, options: argparse.Namespace) -> Callable[[str, int], dict]:
    problems = {}

    def step(case: str, repeat: int) -> dict:
        if case not in problems:
            family = case.removeprefix(FAMILY)
            known = PROBLEMS.get(case)
            problems[case] = known(options.seed, options.device) if known else Family(family, options.seed)
        return problems[case](variant)

    return step


def wait(device: str) -> float:
    """Seconds on the clock, after the device has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# Problems


class Fixed:
    """A map with a known fixed point, solved from zeros."""

    def __init__(self, f: Callable, z: Tensor, *, tol: float, max_iter: int):
        self.f, self.fixed_point, self.tol, self.max_iter = f, z, tol, max_iter

    def __call__(self, variant: str) -> dict:
        calls = 0

        def counted(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.f(z)

        start = torch.zeros_like(self.fixed_point)
        if variant in TEXTBOOK:
            with torch.no_grad():
                z = textbook(variant.split()[1], counted, start, max_iter=self.max_iter, tol=self.tol)
            samples = calls * len(start)
        else:
            found = solve(counted, start, solver=OURS[variant](max_iter=self.max_iter, tol=self.tol))
            z, calls, samples = found.z, int(found.evaluations.max()), found.samples
        error = (z - self.fixed_point).norm(dim=1) / self.fixed_point.norm(dim=1)
        return {"evaluations": float(calls), "sample evals": float(samples), "error": float(error.max())}


def linear(seed: int, device: str, *, symmetric: bool, radius: float, tol: float) -> Fixed:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    a = (a + a.T) / 2 if symmetric else a
    a = a * radius / torch.linalg.eigvals(a).abs().max()
    b = torch.randn(8, 256, generator=generator, dtype=torch.float64)
    z = torch.linalg.solve(torch.eye(256, dtype=torch.float64) - a, b.T).T
    a, b, z = (t.float().to(device) for t in (a, b, z))
    return Fixed(lambda v: torch.addmm(b, v, a.T), z, tol=tol, max_iter=600)


def tanh_layer(seed: int, device: str, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """(W, x, fixed point) of z = tanh(W z + x), D 512, B 32; the spectral norm of W is `gain`."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(512, 512, generator=generator, dtype=torch.float64)
    w = w * gain / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(32, 512, generator=generator, dtype=torch.float64)
    z = solve(lambda v: torch.tanh(v @ w.T + x), torch.zeros_like(x), solver=Picard(max_iter=5000, tol=1e-13)).z
    return tuple(t.float().to(device) for t in (w, x, z))


def tanh(seed: int, device: str) -> Fixed:
    w, x, z = tanh_layer(seed, device, 1.5)
    return Fixed(lambda v: torch.tanh(torch.addmm(x, v, w.T)), z, tol=1e-5, max_iter=200)


class Overhead:
    """Milliseconds per step beyond the map, over 40 steps that no tolerance ends."""

    STEPS = 40

    def __init__(self, seed: int, device: str):
        w, x, self.fixed_point = tanh_layer(seed, device, 2.5)  # slow enough: residuals still fall at step 40
        self.f, self.device = lambda v: torch.tanh(torch.addmm(x, v, w.T)), device

    def __call__(self, variant: str) -> dict:
        start = torch.zeros_like(self.fixed_point)
        with torch.no_grad():
            began = wait(self.device)
            if variant in TEXTBOOK:
                textbook(variant.split()[1], self.f, start, max_iter=self.STEPS, tol=0.0)
                calls = self.STEPS + (variant == "textbook broyden")
            else:
                calls = solve(self.f, start, solver=OURS[variant](max_iter=self.STEPS, tol=1e-30)).calls
            solved = wait(self.device)
            for _ in range(calls):
                start = self.f(start)
            alone = wait(self.device)
        return {"overhead ms": ((solved - began) - (alone - solved)) / calls * 1e3}


class Spread:
    """64 linear maps r P z + b with r from .5 to .95: the fastest needs a tenth of the slowest one's steps."""

    def __init__(self, seed: int, device: str):
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0].to(device)
        self.rates = torch.linspace(0.5, 0.955, 64, device=device)[:, None]
        self.inputs = torch.randn(64, 256, generator=generator).to(device)
        self.f = lambda z, rate, b: rate * (z @ turn) + b

    def __call__(self, variant: str) -> dict:
        name, how = variant.split(", ")
        solver = OURS[name](max_iter=600, tol=1e-5)
        start = torch.zeros_like(self.inputs)
        found = solve(self.f, start, (self.rates, self.inputs), solver=solver, compact=SPREAD[how])
        return {"evaluations": float(found.evaluations.max()), "sample evals": float(found.samples)}


class Family:
    """Five maps of a family, on the CPU: evaluations to the tolerance, and the ratio to the best of REFERENCES."""

    MAPS = 5

    def __init__(self, name: str, seed: int):
        self.maps = [FAMILIES[name](seed + number) for number in range(self.MAPS)]
        references = [self.measured(variant) for variant in REFERENCES]
        self.evaluations = min(each["evaluations"] for each in references)
        self.residual = min(each["smallest residual"] for each in references)

    def measured(self, variant: str) -> dict:
        solver = variant.removeprefix("textbook ") if variant in REFERENCES else OURS[variant]()
        runs = [measure(problem, solver) for problem in self.maps]
        reached, smallest = (torch.cat([run[part] for run in runs]).double() for part in (0, 1))
        return {
            "evaluations": float(reached.median()),
            "converged %": float(reached.isfinite().double().mean()) * 100,
            "smallest residual": float(smallest.clamp_min(1e-30).log().mean().exp()),
        }

    def __call__(self, variant: str) -> dict:
        found = self.measured(variant)
        steps = self.evaluations < float("inf")
        of_best = found["evaluations"] / self.evaluations if steps else found["smallest residual"] / self.residual
        return {**found, "ratio to best": of_best}


class Gradients:
    """dL/dW of L = sum(z * c) by each rule at the fixed point, against the dense solve in double precision."""

    def __init__(self, seed: int, device: str):
        self.w, self.x, self.z = tanh_layer(seed, device, 0.9)
        self.c = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        self.w.requires_grad_()
        self.exact = self._dense()

    def f(self, z: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(self.x, z, self.w.T))

    def _dense(self) -> Tensor:
        w, z = self.w.detach().double(), self.z.double()
        slope = 1 - torch.tanh(z @ w.T + self.x.double()) ** 2  # f' at the fixed point
        jacobian = slope[:, :, None] * w
        eye = torch.eye(w.shape[0], dtype=torch.float64, device=w.device)
        y = torch.linalg.solve((eye - jacobian).transpose(1, 2), self.c.double().unsqueeze(2)).squeeze(2)
        return (y * slope).T @ z

    def __call__(self, variant: str) -> dict:
        rule = RULES[variant]
        if rule.replaces_solver:
            z = rule.run(lambda z: self.f(z), self.z, None, solver=Picard()).z
        else:
            z = rule.attach(self.f, self.z, None)[-1]
        (grad,) = torch.autograd.grad((z * self.c).sum(), self.w)
        error = (grad - self.exact).norm() / self.exact.norm()
        cosine = torch.cosine_similarity(grad.double().flatten(), self.exact.flatten(), dim=0)
        return {"error": float(error), "cosine": float(cosine)}


PROBLEMS = {
    "random .95": lambda seed, device: linear(seed, device, symmetric=False, radius=0.95, tol=1e-5),
    "symmetric .99": lambda seed, device: linear(seed, device, symmetric=True, radius=0.99, tol=1e-4),
    "overhead": Overhead,
    "tanh": tanh,
    "spread": Spread,
    "gradient": Gradients,
}
