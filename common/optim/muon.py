"""Muon: momentum made orthogonal for matrices, Adam for everything else, in one optimiser with one state.

Keller Jordan's Muon (2024) as `optax.contrib.muon` computes it, which pMF (arXiv 2601.22158) was trained with. That is
not torch.optim.Muon: the momentum and the gradient in Nesterov's mean are each corrected for their start at 0 (here
`debias`), the iteration runs in float32 there and in bfloat16 in torch, and torch's class takes matrices alone.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from common import limits
from common.errors import UserError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SCALES = ("shape", "rms", "none")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STACKED = 2**25  # entries of equally shaped matrices that are orthogonalised at a time


class Muon(Optimizer):
    """p <- p - lr (scale O + weight_decay p), O nearly the orthogonal factor of the matrix M, M Nesterov's momentum.

    With gradients g_t: m_t = momentum m + (1 - momentum) g_t, and M = momentum m_t + (1 - momentum) g_t, each debiased.
    Parameters that are no matrices follow Adam at the same lr, with decoupled decay and, as in optax, with Nesterov's
    mean as well (Dozat 2016): b1 m_t / (1 - b1^(t+1)) + (1 - b1) g_t / (1 - b1^t) over the root of the second moment.

    params        parameters, or groups of them; a group may set `matrix`: whether all in it are matrices (out, in).
                  Without it, parameters with two axes count as matrices. `common.optim.groups.matrix_groups` sets it
                  rightly for tables of embeddings and learned tokens, which have two axes as well
    lr            step size of both
    momentum      decay of the running mean of gradients
    nesterov      False: M = m_t, and plain Adam
    debias        False: neither mean of a matrix is corrected (torch.optim.Muon)
    steps, coefficients   of the Newton-Schulz iteration, see `orthogonalise`
    scale         "shape": sqrt(max(1, out / in)) (Jordan, optax); "rms": 0.2 sqrt(max(out, in)), the size of Adam's
                  steps (Moonlight, arXiv 2502.16982); "none": 1
    precision     of the iteration: "float32" or "bfloat16", which halves its time on GPUs
    betas, eps    of Adam; eps also in the iteration's norm
    weight_decay  >= 0, times lr

    Matrices must be whole: not for parameters sharded over processes (FSDP). Raises UserError for options out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        debias: bool = True,
        steps: int = 5,
        coefficients: Sequence[float] = COEFFICIENTS,
        scale: str = "shape",
        precision: str = "float32",
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            limits.number(f"optimizer.{name}", value, least=0)
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            limits.number(f"optimizer.{name}", value, least=0, below=1, hint="Set it to e.g. 0.95.")
        limits.whole("optimizer.steps", steps, least=1)
        if len(coefficients) != 3:
            raise UserError(f"optimizer.coefficients must hold 3 numbers, got {len(coefficients)}. Give a, b and c.")
        limits.choice("optimizer.scale", scale, SCALES)
        limits.choice("optimizer.precision", precision, tuple(PRECISIONS))
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "debias": debias, "steps": steps,
            "coefficients": tuple(coefficients), "scale": scale, "precision": precision, "betas": tuple(betas),
            "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(split_groups(params), defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient:
                (self._matrices if group["matrix"] else self._others)(group, with_gradient)
        return loss

    def _matrices(self, group: dict, params: list[Tensor]) -> None:
        momentum = group["momentum"]
        grads, means = [p.grad for p in params], []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # on the CPU: read without waiting for a device
                state["momentum"] = torch.zeros_like(p)
            state["step"] += 1
            means.append(state["momentum"])
        # m_t = momentum m_(t-1) + (1 - momentum) g_t
        torch._foreach_lerp_(means, grads, 1 - momentum)
        shapes: dict[tuple, list[int]] = {}
        for index, p in enumerate(params):
            shapes.setdefault((p.shape, p.device, p.dtype, float(self.state[p]["step"])), []).append(index)
        for (shape, _, _, step), indices in shapes.items():
            at_once = max(1, STACKED // shape.numel())
            for first in range(0, len(indices), at_once):
                some = indices[first : first + at_once]
                mean = torch.stack([means[i] for i in some])
                # M = momentum m_t / (1 - momentum^(t+1)) + (1 - momentum) g_t / (1 - momentum^t), as optax's nadam;
                # undebiased without the denominators.
                if group["nesterov"]:
                    share = (momentum, 1 - momentum)
                    if group["debias"]:
                        share = (momentum / (1 - momentum ** (step + 1)), (1 - momentum) / (1 - momentum**step))
                    mean = mean.mul_(share[0]).add_(torch.stack([grads[i] for i in some]), alpha=share[1])
                found = orthogonalise(
                    mean, steps=group["steps"], coefficients=group["coefficients"], eps=group["eps"],
                    dtype=PRECISIONS[group["precision"]],
                )  # fmt: skip
                chosen = [params[i] for i in some]
                if group["weight_decay"]:
                    torch._foreach_mul_(chosen, 1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * scale_of(shape, group["scale"])
                torch._foreach_add_(chosen, list(found.to(mean.dtype).unbind()), alpha=-size)

    def _others(self, group: dict, params: list[Tensor]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
        grads, states = [p.grad for p in params], [self.state[p] for p in params]
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        done = [float(s["step"]) for s in states]
        # Adam (arXiv 1412.6980, algorithm 1): means of g and g^2; the step is mean / (root of the second + eps).
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - b2)
        below = torch._foreach_div(second, [1 - b2**n for n in done])
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, group["eps"])
        if group["nesterov"]:
            above = torch._foreach_mul(first, [b1 / (1 - b1 ** (n + 1)) for n in done])
            torch._foreach_add_(above, torch._foreach_mul(grads, [(1 - b1) / (1 - b1**n) for n in done]))
        else:
            above = torch._foreach_div(first, [1 - b1**n for n in done])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, above, below, value=-lr)


def split_groups(params: Iterable[Tensor] | Iterable[dict]) -> list[dict]:
    """Groups whose `matrix` is set, in the order given; a group without `matrix` is split into its two kinds."""
    params = list(params)
    groups = []
    for group in params if params and isinstance(params[0], dict) else [{"params": params}]:
        inside = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "matrix" not in group:
            for matrix in (True, False):
                some = [p for p in inside if (p.dim() == 2) == matrix]
                if some:
                    groups.append({**group, "params": some, "matrix": matrix})
            continue
        wrong = [tuple(p.shape) for p in inside if group["matrix"] and p.dim() != 2]
        if wrong:
            raise UserError(f"Muon's matrices must have two axes, got shape {wrong[0]}. Leave it to a group of others.")
        groups.append({**group, "params": inside})
    return groups


def orthogonalise(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = COEFFICIENTS,
    eps: float = 1e-8,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U S' V^T of matrices x = U S V^T (..., m, n) by a quintic Newton-Schulz iteration; where S is above a hundredth
    of its norm, S' lies between about 0.68 and 1.16.

    X <- a X + (b A + c A^2) X with A = X X^T, from X = x / (|x|_F + eps), on the shorter side of x.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    # Each step maps every singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone.
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def scale_of(shape: Sequence[int], scale: str) -> float:
    """Factor of the step of a matrix (out, in), see `Muon`."""
    rows, columns = shape
    if scale == "shape":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "rms" else 1.0
