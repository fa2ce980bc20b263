"""The Triton kernel of `common.nets.jvp_attention`. Importing this file needs Triton.

Online softmax of FlashAttention-2 (arXiv 2307.08691), whose sums gain two of the tangent. With s = q k^T / sqrt(C), its
tangent ds, and e_ij = exp(s_ij - m_i), m the largest score seen so far, a row needs

    l = sum e,   a = sum e v,   g = sum e ds,   b = sum e (ds v + dv);   out = a / l,   dout = b / l - (g / l) out

all of which are rescaled alike when m grows. A program owns a block of queries and walks over the keys: scores exist
only as tiles of queries x keys, and nothing but the two outputs is written.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, sum, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:  # Triton's interpreter multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _inside(rows, count, channels, CHANNELS: tl.constexpr):
    return (rows < count)[:, None] & (channels < CHANNELS)[None, :]


@triton.jit
def _read(at, rows, step, count, channels, CHANNELS: tl.constexpr):
    """The tile rows x channels of a matrix whose rows lie `step` apart, zero outside of it."""
    places = rows[:, None] * step + channels[None, :]
    return tl.load(at + places, mask=_inside(rows, count, channels, CHANNELS), other=0.0)


@triton.jit
def _write(at, rows, step, count, channels, CHANNELS: tl.constexpr, tile):
    places = rows[:, None] * step + channels[None, :]
    tl.store(at + places, tile.to(at.dtype.element_ty), mask=_inside(rows, count, channels, CHANNELS))


@triton.jit
def _attention(
    q_at, k_at, v_at, dq_at, dk_at, dv_at, out_at, dout_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    scale, heads, queries,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. Value and tangent of an input share their strides; channels lie together.

    LENGTH is the number of keys: a kernel per length, of which image networks have one; full tiles need no mask then.
    Tiles have powers of two for sides, so channels come in two parts: the first WIDTH, then REST more (or none). 72 of
    them make tiles of 64 and 16 rather than one of 128.
    """
    blocks = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    pair = program // blocks  # which (sample, head); int64, because whole tensors pass 2^31 numbers
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q_at, dq_at = q_at + batch * q_batch + head * q_head, dq_at + batch * q_batch + head * q_head
    k_at, dk_at = k_at + batch * k_batch + head * k_head, dk_at + batch * k_batch + head * k_head
    v_at, dv_at = v_at + batch * v_batch + head * v_head, dv_at + batch * v_batch + head * v_head
    out_at, dout_at = out_at + batch * out_batch + head * out_head, dout_at + batch * out_batch + head * out_head

    rows = (program % blocks) * QUERIES + tl.arange(0, QUERIES)
    near = tl.arange(0, WIDTH)
    q = _read(q_at, rows, q_row, queries, near, CHANNELS)
    dq = _read(dq_at, rows, q_row, queries, near, CHANNELS)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    dout = tl.zeros([QUERIES, WIDTH], tl.float32)
    if REST:
        far = WIDTH + tl.arange(0, REST)
        far_q = _read(q_at, rows, q_row, queries, far, CHANNELS)
        far_dq = _read(dq_at, rows, q_row, queries, far, CHANNELS)
        far_out = tl.zeros([QUERIES, REST], tl.float32)
        far_dout = tl.zeros([QUERIES, REST], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    slope = tl.zeros([QUERIES], tl.float32)
    for start in range(0, LENGTH, KEYS):
        columns = start + tl.arange(0, KEYS)
        k = tl.trans(_read(k_at, columns, k_row, LENGTH, near, CHANNELS))
        s = _product(q, k, tl.zeros([QUERIES, KEYS], tl.float32), PRECISION, WIDE)
        ds = _product(dq, k, tl.zeros([QUERIES, KEYS], tl.float32), PRECISION, WIDE)
        dk = tl.trans(_read(dk_at, columns, k_row, LENGTH, near, CHANNELS))
        ds = _product(q, dk, ds, PRECISION, WIDE)
        if REST:
            k = tl.trans(_read(k_at, columns, k_row, LENGTH, far, CHANNELS))
            s = _product(far_q, k, s, PRECISION, WIDE)
            ds = _product(far_dq, k, ds, PRECISION, WIDE)
            dk = tl.trans(_read(dk_at, columns, k_row, LENGTH, far, CHANNELS))
            ds = _product(far_q, dk, ds, PRECISION, WIDE)
        s = s * (scale * LOG2E)
        if LENGTH % KEYS:
            s = tl.where((columns < LENGTH)[None, :], s, float("-inf"))
        higher = tl.maximum(largest, tl.max(s, 1))
        shrink = tl.exp2(largest - higher)
        largest = higher
        e = tl.exp2(s - higher[:, None])
        moved = e * (ds * scale)
        total = total * shrink + tl.sum(e, 1)
        slope = slope * shrink + tl.sum(moved, 1)
        v = _read(v_at, columns, v_row, LENGTH, near, CHANNELS)
        e, moved = e.to(v.dtype), moved.to(v.dtype)
        out = _product(e, v, out * shrink[:, None], PRECISION, WIDE)
        dout = _product(moved, v, dout * shrink[:, None], PRECISION, WIDE)
        dv = _read(dv_at, columns, v_row, LENGTH, near, CHANNELS)
        dout = _product(e, dv, dout, PRECISION, WIDE)
        if REST:
            v = _read(v_at, columns, v_row, LENGTH, far, CHANNELS)
            far_out = _product(e, v, far_out * shrink[:, None], PRECISION, WIDE)
            far_dout = _product(moved, v, far_dout * shrink[:, None], PRECISION, WIDE)
            dv = _read(dv_at, columns, v_row, LENGTH, far, CHANNELS)
            far_dout = _product(e, dv, far_dout, PRECISION, WIDE)
    slope = slope / total
    out = out / total[:, None]
    _write(out_at, rows, out_row, queries, near, CHANNELS, out)
    _write(dout_at, rows, out_row, queries, near, CHANNELS, dout / total[:, None] - slope[:, None] * out)
    if REST:
        far_out = far_out / total[:, None]
        far_dout = far_dout / total[:, None] - slope[:, None] * far_out
        _write(out_at, rows, out_row, queries, far, CHANNELS, far_out)
        _write(dout_at, rows, out_row, queries, far, CHANNELS, far_dout)


def interpreted() -> bool:
    """Whether the kernel runs in Triton's interpreter (TRITON_INTERPRET=1 when this file was imported)."""
    return not isinstance(_attention, triton.runtime.JITFunction)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 products run: as torch's own would, which `speed.tf32` sets; other dtypes have one way."""
    if dtype != torch.float32:
        return "ieee"
    # Three products of TF32 parts keep nearly the accuracy of float32 and run on tensor cores.
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def constants(channels: int, dtype: torch.dtype, precision: str, roomy: bool) -> dict:
    """The compile-time arguments.

    roomy  whether a block may have 160 KiB of shared memory (A100, H100 and later; 99 KiB on consumer cards)

    Tiles were chosen by the registers and the shared memory of the compiled kernel, not by timing.
    """
    if dtype != torch.float32:
        queries, keys, warps, stages = 64, 32, 4, 2
    elif precision == "tf32" and channels <= 64:
        queries, keys, warps, stages = 64, 32, 4, 1
    elif roomy or precision == "tf32" or channels <= 64:
        queries, keys, warps, stages = 64, 16, 8, 1
    else:
        queries, keys, warps, stages = 32, 16, 4, 1
    part = lambda count: max(16, triton.next_power_of_2(count))
    return {
        "CHANNELS": channels, "WIDTH": min(64, part(channels)), "REST": part(channels - 64) if channels > 64 else 0,
        "QUERIES": queries, "KEYS": keys, "PRECISION": precision,
        "WIDE": interpreted() and dtype == torch.bfloat16,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def launch(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent; see `common.nets.jvp_attention.fused_attention`, which checks and prepares the inputs."""
    batch, heads, queries, channels = q.shape
    # Rows innermost but for the heads: what follows an attention layer joins the heads, free of charge in this layout.
    strides = (queries * heads * channels, channels, heads * channels, 1)
    out, dout = (torch.empty_strided(q.shape, strides, dtype=v.dtype, device=v.device) for _ in range(2))
    chosen = constants(channels, q.dtype, precision_of(q.dtype), _is_roomy(q.device))
    grid = (batch * heads * triton.cdiv(queries, chosen["QUERIES"]),)
    with torch.cuda.device_of(q):
        _attention[grid](
            q, k, v, dq, dk, dv, out, dout, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides[:3],
            channels**-0.5, heads, queries, LENGTH=k.shape[2], **chosen,
        )  # fmt: skip
    return out, dout


@cache
def _is_roomy(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024
