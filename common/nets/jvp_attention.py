"""Attention and its tangent in one go, without a graph and without the N x N matrix: what forward mode needs of it.

With s = q k^T / sqrt(C) and p = softmax(s), row by row,

    out = p v,   dout = p * (ds - sum(p * ds)) v + p dv,   ds = (dq k^T + q dk^T) / sqrt(C)

Two ways, equal up to rounding:
  fused_attention    one Triton kernel (`common.nets.jvp_attention_kernel`), for CUDA devices
  blocked_attention  torch's products over blocks of queries, for any device

`dual_attention` chooses for `common.nets.attention.token_attention`. Neither way keeps a graph: where one is wanted
(torch.func.jvp inside a loss, compilation), PyTorch's own rules for the plain products do it.

The kernel has run in Triton's interpreter, and has been compiled for compute capabilities 8.0, 8.9, 9.0, 10.0 and 12.0.
It has not run on a GPU yet: speed and tile sizes are untested.
"""

import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from common.tensors import only_shapes

# Scores of one block of queries, all samples and heads together. On one CPU core 2^20 (4 MiB) is about fastest:
# 8 x 6 heads, 256 tokens 42 ms against 52 ms with PyTorch's rules; 2 heads, 4096 tokens 297 ms against 599 ms.
# Accelerators want large products: 128 MiB a block.
BLOCK_SCORES = {"cpu": 2**20}
BLOCK_SCORES_ELSEWHERE = 2**25
MAX_CHANNELS = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dual_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """softmax(q k^T / sqrt(C)) v of dual tensors (torch.autograd.forward_ad) as a dual tensor, (B, heads, N, C).

    q, k, v  (B, heads, N, C), of which some carry a tangent

    None where the plain products with PyTorch's rules must do it: nothing moves, a graph is wanted, or the caller is
    torch.func, autocast, a compiler or a plan on fake tensors.
    """
    if (
        torch.compiler.is_compiling()
        or only_shapes(q, k, v)  # before autocast, which the meta device does not have
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_autocast_enabled(q.device.type)
    ):
        return None
    pairs = [forward_ad.unpack_dual(x) for x in (q, k, v)]
    values, tangents = ([pair[i] for pair in pairs] for i in (0, 1))
    moving = [x for x in tangents if x is not None]
    if not moving or (torch.is_grad_enabled() and any(x.requires_grad for x in (*values, *moving))):
        return None
    found = None
    if q.device.type == "cuda" or interpreted():
        found = _try_fused(values, tangents)
    return forward_ad.make_dual(*(found or blocked_attention(*values, *tangents)))


# Any device -----------------------------------------------------------------------------------------------------------


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(value, tangent) of attention, each (B, heads, N, C) in the dtype of v, from matrix products over query blocks.

    q, dq  (B, heads, N, C);   k, v, dk, dv  (B, heads, M, C); a tangent of None is zero
    block  queries at a time: B heads block M scores are held, three times over. None: as many as BLOCK_SCORES allows,
           all of them where N is small. The values depend on it by rounding only
    The softmax runs in float32 at least.
    """
    batch, heads, count, channels = q.shape
    keys = k.shape[2]
    if block is None:
        scores = BLOCK_SCORES.get(q.device.type, BLOCK_SCORES_ELSEWHERE)
        block = max(16, scores // max(1, batch * heads * keys))
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = channels**-0.5
    q, dq = (_rows(x, wide) for x in (q, dq))
    k, dk = (None if x is None else (_rows(x, wide) * scale).transpose(1, 2) for x in (k, dk))
    v, dv = (_rows(x, v.dtype) for x in (v, dv))
    out, dout = (torch.empty(batch, count, heads, channels, dtype=v.dtype, device=v.device) for _ in range(2))
    # S = Q K^T / sqrt(C), P = softmax(S), O = P V. Tangents: dS = (dQ K^T + Q dK^T) / sqrt(C),
    # dP = P * (dS - rowsum(P * dS)), dO = dP V + P dV. The factor 1 / sqrt(C) is in k and dk.
    for start in range(0, count, block):
        rows = slice(start, start + block)
        p = torch.bmm(q[:, rows], k).softmax(2)
        weights = p.to(v.dtype)
        value, tangent = torch.bmm(weights, v), None
        if dq is not None or dk is not None:
            ds = None if dq is None else torch.bmm(dq[:, rows], k)
            if dk is not None:
                ds = torch.bmm(q[:, rows], dk) if ds is None else ds.baddbmm_(q[:, rows], dk)
            # The Jacobian of a softmax is symmetric: its backward kernel is its forward rule.
            dp = torch._softmax_backward_data(ds, p, 2, p.dtype)
            tangent = torch.bmm(dp.to(v.dtype), v)
        if dv is not None:
            tangent = torch.bmm(weights, dv) if tangent is None else tangent.baddbmm_(weights, dv)
        for whole, part in ((out, value), (dout, tangent)):
            whole[:, rows] = 0 if part is None else part.unflatten(0, (batch, heads)).transpose(1, 2)
    return out.transpose(1, 2), dout.transpose(1, 2)


def _rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).flatten(0, 1)


# CUDA -----------------------------------------------------------------------------------------------------------------


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(value, tangent) of attention, each (B, heads, N, C) in the dtype of v, in one pass of one Triton kernel.

    q, dq  (B, heads, N, C);   k, v, dk, dv  (B, heads, M, C), any strides; a tangent of None is zero

    Sums are in float32; factors of products have the dtype of the inputs. float32 products run on tensor cores, in
    TF32 where torch.set_float32_matmul_precision allows it and in three TF32 parts where not. Memory beside the inputs
    is the two results (and copies of inputs whose channels do not lie together). Inputs must pass `unsupported`.
    """
    pairs = []
    for x, dx in ((q, dq), (k, dk), (v, dv)):
        dx = torch.zeros_like(x) if dx is None else dx
        if x.stride(3) != 1 or x.stride() != dx.stride():  # the kernel reads both by the same strides
            x, dx = x.contiguous(), dx.contiguous()
        pairs.append((x, dx))
    return kernel().launch(*(x for x, _ in pairs), *(dx for _, dx in pairs))


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `fused_attention` cannot take these inputs, or None when it can."""
    if isinstance(kernel(), str):
        return kernel()
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"the kernel takes float32, bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] > MAX_CHANNELS or v.shape[3] != q.shape[3]:
        return f"the kernel takes up to {MAX_CHANNELS} equal channels per head, not {q.shape[3]} and {v.shape[3]}"
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if max(x.shape[2] * max(x.stride(2), x.shape[1] * x.shape[3]) for x in (q, k, v)) >= 2**31:
        return "the kernel counts the numbers of one head in 32 bits"
    if q.device.type == "cuda" and (torch.version.cuda is None or torch.cuda.get_device_capability(q.device) < (8, 0)):
        return "the kernel needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


@cache
def kernel() -> ModuleType | str:
    """`common.nets.jvp_attention_kernel`, or why it cannot be imported."""
    try:
        from common.nets import jvp_attention_kernel
    except Exception as problem:  # Triton missing, or broken: no reason to stop, there is another way
        return f"Triton cannot be imported ({type(problem).__name__}: {problem})"
    return jvp_attention_kernel


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for (TRITON_INTERPRET=1): the kernel then runs on the CPU too, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


FAILED: set[tuple] = set()  # (device, dtype, channels) whose kernel could not be built or started


def _try_fused(values: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor] | None:
    """`fused_attention`, or None with a note (once per reason) where it cannot be had."""
    q = values[0]
    setting = (q.device, q.dtype, q.shape[3])
    if setting in FAILED:
        return None
    if reason := unsupported(*values):
        _note(reason)
        return None
    try:
        return fused_attention(*values, *tangents)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        FAILED.add(setting)
        first = str(problem).strip().partition("\n")[0]
        _note(f"Triton could not build or start the kernel ({type(problem).__name__}: {first})")
        return None


@cache
def _note(reason: str) -> None:
    warnings.warn(
        f"Attention in forward mode runs without its fused kernel: {reason}. Results are the same, slower.",
        stacklevel=2,
    )
