"""Self-attention: over (B*heads, C, N) tensors for the U-Nets, over (B, heads, N, C) ones for the transformers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from common.nets.jvp_attention import dual_attention

# On one CPU core two plain matrix products win below this many positions (256: 17 ms against 22 ms); the fused kernel
# wins above (1024: 235 ms against 464 ms), where it also saves the N x N matrix.
FUSED_FROM = 512


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation (torch.func.jvp) is under way."""
    return forward_ad._current_level >= 0


def fused_is_better(q: Tensor, length: int) -> bool:
    """Whether the fused kernel may be used and is the faster way for `length` positions on the device of q."""
    return not in_forward_mode() and (q.device.type != "cpu" or length >= FUSED_FROM)


def attention(q: Tensor, k: Tensor, v: Tensor, *, fused: bool | None = None) -> Tensor:
    """softmax(q^T k / sqrt(C)) applied to v: (B*heads, C, N), dtype of v.

    q, k, v  (B*heads, C, N)  channels first; the softmax runs in float32 whatever the dtype, as in EDM
    fused    None picks the faster of two exact ways: F.scaled_dot_product_attention on accelerators and on long
             inputs, else the plain products. Always plain under forward-mode differentiation (torch.func.jvp), for
             which fused kernels have no rule. False forces plain, which a second derivative needs too.
    """
    if fused is None:
        fused = fused_is_better(q, q.shape[2])
    if fused:
        # Fused kernels want the channels innermost; without these copies torch silently takes its slow path.
        q, k, v = (t.transpose(1, 2).contiguous().unsqueeze(1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.to(wide).transpose(1, 2), k.to(wide) / math.sqrt(k.shape[1]))
    return torch.bmm(v, scores.softmax(dim=2).to(v.dtype).transpose(1, 2))


def token_attention(q: Tensor, k: Tensor, v: Tensor, *, fused: bool | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v per head: (B, heads, N, C), dtype of v.

    q, k, v  (B, heads, N, C)  one row per token, as transformers have them
    fused    as in `attention`: None chooses. Under forward-mode differentiation without a graph that is
             `common.nets.jvp_attention` (a Triton kernel on CUDA, blocks of queries elsewhere), with one the plain
             products. False: plain products always
    """
    if fused is None and in_forward_mode():
        found = dual_attention(q, k, v)
        if found is not None:
            return found
    if fused is None:
        fused = fused_is_better(q, q.shape[2])
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ (k.to(wide) * (1 / math.sqrt(k.shape[3]))).transpose(2, 3)
    return scores.softmax(dim=3).to(v.dtype) @ v
