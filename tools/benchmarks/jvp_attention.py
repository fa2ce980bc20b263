"""Attention in forward mode, without a graph: value and tangent in one kernel, in blocks, or by plain products."""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from common.diffusion.jvp import ForwardRules
from common.errors import UserError
from common.nets import jvp_attention
from common.nets.attention import token_attention

DESCRIPTION = """\
softmax(q k^T / sqrt(C)) v and its tangent for random q, k, v and tangents of all three: MeanFlow's derivative.
  math    plain matrix products under the forward-mode rules of common.diffusion.jvp; holds N x N matrices
  blocks  common.nets.jvp_attention.blocked_attention: torch's products over blocks of queries, on any device
  fused   common.nets.jvp_attention.fused_attention: one Triton kernel; CUDA only, left out elsewhere
A case is a number of tokens N. gflop: 10^9 operations of the six products, 12 B heads N^2 C."""

MATH, BLOCKS, FUSED = "math", "blocks", "fused"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="N, one case each")
    parser.add_argument("--batch", type=int, default=1, help="samples")
    parser.add_argument("--heads", type=int, default=6, help="heads")
    parser.add_argument("--channels", type=int, default=64, help="channels per head")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of all inputs")
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32 (CUDA)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def variants(options: argparse.Namespace) -> list[str]:
    return [MATH, BLOCKS, *([FUSED] if options.device.startswith("cuda") else [])]


def cases(options: argparse.Namespace) -> list[str]:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    for field in ("heads", "channels"):
        if getattr(options, field) < 1:
            raise UserError(f"--{field} must be >= 1, got {getattr(options, field)}.")
    if min(options.tokens) < 1:
        raise UserError(f"--tokens must be >= 1, got {min(options.tokens)}.")
    if options.device.startswith("cuda"):
        q, k, v = draw(options, 16, 0)[:3]
        if reason := jvp_attention.unsupported(q, k, v):
            raise UserError(f"--device cuda: {reason}. Use --device cpu, or change the named option.")
    return [f"{tokens} tokens" for tokens in sorted(options.tokens)]


def make(variant: str, options: argparse.Namespace) -> Callable[[str, int], dict]:
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    way = {MATH: by_rules, BLOCKS: jvp_attention.blocked_attention, FUSED: jvp_attention.fused_attention}[variant]

    with torch.no_grad():  # what torch loads with the first dual tensor is no memory of a step
        by_rules(*draw(options, 1, 0))

    def step(case: str, repeat: int) -> dict:
        tokens = int(case.split()[0])
        given = draw(options, tokens, repeat)
        facts = {"gflop": 12e-9 * options.batch * options.heads * tokens**2 * options.channels}
        if given[0].device.type != "cuda":
            cpu = time.process_time()
            with torch.no_grad():
                way(*given)
            return {**facts, "cpu ms": (time.process_time() - cpu) * 1e3}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.no_grad():
            way(*given)
        stop.record()
        torch.cuda.synchronize()
        return {**facts, "gpu ms": start.elapsed_time(stop), "gpu MiB": memory_since(before)}

    return step


def memory_since(before: int) -> float:
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def by_rules(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """(value, tangent) as networks had them before: the plain products of dual tensors."""
    with ForwardRules(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, dx) for x, dx in ((q, dq), (k, dk), (v, dv))]
        return tuple(forward_ad.unpack_dual(token_attention(*duals, fused=False)))


def draw(options: argparse.Namespace, tokens: int, repeat: int) -> list[Tensor]:
    """q, k, v, dq, dk, dv (B, heads, N, C), strided as one projection to all three gives them."""
    generator = torch.Generator().manual_seed(repeat)
    shape = (2, options.batch, tokens, 3, options.heads, options.channels)
    both = torch.randn(shape, generator=generator).to(options.device, DTYPES[options.dtype])
    return [part for half in both for part in half.permute(2, 0, 3, 1, 4).unbind(0)]


def remarks(rows: list[dict]) -> list[str]:
    """Time and memory of the others relative to math, per case; on a CPU, a note that the kernel was not measured."""
    key = "gpu ms" if "gpu ms" in rows[0] else "cpu ms"
    lines = []
    for row in rows:
        if row["variant"] == MATH:
            continue
        math = next(r for r in rows if r["variant"] == MATH and all(r[k] == row[k] for k in ("case", "threads")))
        memory = "gpu MiB" if "gpu MiB" in row else "peak MiB"
        text = f"{row['case']}, {row['variant']}: {math[key] / row[key]:.2f}x as fast as math"
        lines.append(text + (f", {row[memory]:.0f} MiB against {math[memory]:.0f}." if memory in row else "."))
    if key == "cpu ms":
        lines.append("The fused kernel needs CUDA: nothing here was measured with it.")
    return lines
