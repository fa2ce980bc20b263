"""The Triton kernel in Triton's interpreter: run by test_jvp_attention.py, in a process with TRITON_INTERPRET=1."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.diffusion.jvp import total_derivative
from common.nets import jvp_attention
from common.nets.dit import DiT
from common.nets.jvp_attention import blocked_attention, fused_attention
from common.nets.mit import MiT

assert jvp_attention.interpreted()


def inputs(queries: int, keys: int, channels: int, dtype=torch.float32, size: float = 1.0):
    """q, k, v and their tangents, views of (B, N, heads, C) as networks have them."""
    generator = torch.Generator().manual_seed(queries)
    draw = lambda n: (size * torch.randn(1, n, 2, channels, generator=generator)).transpose(1, 2).to(dtype)
    return [draw(n) for n in (queries, keys, keys, queries, keys, keys)]


def exact(given):
    return blocked_attention(*(None if x is None else x.double() for x in given))


SHAPES = [
    (64, 64, 16),  # full tiles
    (5, 5, 64),  # less than one
    (66, 33, 32),  # tails of queries and keys
    (1, 17, 40),  # channels between powers of two
    (65, 16, 72),  # two parts of channels, the second half empty
    (20, 20, 80),
    (9, 17, 128),
    (9, 9, 3),
]


@pytest.mark.parametrize("queries, keys, channels", SHAPES)
def test_value_and_tangent(queries, keys, channels):
    given = inputs(queries, keys, channels)
    found = fused_attention(*given)
    for a, b in zip(found, exact(given), strict=True):
        assert a.dtype == torch.float32 and a.shape == given[0].shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("channels, roomy", [(64, False), (96, False), (96, True)])
def test_every_tile_size(precision, channels, roomy, monkeypatch):
    monkeypatch.setattr(jvp_attention.kernel(), "_is_roomy", lambda device: roomy)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    given = inputs(33, 17, channels)
    for a, b in zip(fused_attention(*given), exact(given), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    given = inputs(9, 35, 72, dtype)
    for a, b in zip(fused_attention(*given), exact(given), strict=True):
        assert a.dtype == dtype and (a.double() - b).abs().max() < tolerance * b.abs().max()


def test_large_scores_neither_overflow_nor_lose_the_largest():
    """The maximum grows from tile to tile; e^s alone would be infinite."""
    given = inputs(20, 70, 16, size=6.0)
    given[1] = given[1] * torch.linspace(0, 3, 70)[:, None]
    value, tangent = fused_attention(*given)
    right = exact(given)
    torch.testing.assert_close(value.double(), right[0], rtol=1e-4, atol=1e-4)
    assert tangent.isfinite().all() and (tangent.double() - right[1]).abs().max() < 1e-4 * right[1].abs().max()


def test_any_strides_and_tangents_that_are_zero():
    given = inputs(18, 18, 16)
    given[0] = given[0].transpose(2, 3).contiguous().transpose(2, 3)  # channels apart
    given[4] = given[4].contiguous()  # not as its value
    given[5] = None
    for a, b in zip(fused_attention(*given), exact(given), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Bytes of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


def test_nothing_larger_than_the_result_is_allocated():
    given = inputs(96, 96, 8)
    with Largest() as seen:
        out, _ = fused_attention(*given)
    assert seen.bytes == out.nbytes < 4 * 96 * 96


@pytest.mark.parametrize("kind", [DiT, MiT])
def test_the_derivative_of_a_network(kind, monkeypatch):
    """From token_attention's choice to the total derivative, against the plain products with PyTorch's rules."""
    torch.manual_seed(0)
    own = {"head_depth": 1, "v_depth": None} if kind is MiT else {}
    net = kind(img_resolution=8, in_channels=2, patch_size=2, width=32, depth=2, num_heads=2, label_dim=0, **own)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, v = torch.randn(2, 3, 2, 8, 8).unbind(0)
    t, r = torch.tensor([0.9, 0.6, 0.5]), torch.tensor([0.2, 0.1, 0.5])
    calls, real = [], jvp_attention.fused_attention
    monkeypatch.setattr(jvp_attention, "fused_attention", lambda *x: calls.append(x[0].shape) or real(*x))
    found = total_derivative(net, z, t, r, (v, 1.0, 0.0))
    tokens = 16 if kind is DiT else 16 + net.prefix_length
    assert calls == [(2, 2, tokens, 16)] * 2 and not found[2].any()
    monkeypatch.setattr("common.nets.attention.dual_attention", lambda *x: None)
    plain = total_derivative(net, z, t, r, (v, 1.0, 0.0))
    assert len(calls) == 2 and plain.abs().max() > 0.01
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
