"""Tangents of attention against finite differences and PyTorch's rules; which way is chosen; the kernel without a GPU.

The kernel itself runs in interpreted_jvp_attention.py, in a process with TRITON_INTERPRET=1.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from common.diffusion.jvp import total_derivative
from common.nets import jvp_attention
from common.nets.attention import token_attention
from common.nets.dit import DiT
from common.nets.jvp_attention import blocked_attention, dual_attention, unsupported

HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "Triton, which comes with torch for CUDA, is not installed"


def inputs(queries: int, keys: int | None = None, channels: int = 8, dtype=torch.float64, batch: int = 2):
    """q, k, v and their tangents (batch, 3, N, C), heads innermost but for the channels as in a network."""
    generator = torch.Generator().manual_seed(queries)
    draw = lambda n: torch.randn(batch, n, 3, channels, generator=generator, dtype=torch.float64).transpose(1, 2)
    keys = queries if keys is None else keys
    return [draw(n).to(dtype) for n in (queries, keys, keys, queries, keys, keys)]


def usual(q, k, v, dq, dk, dv):
    return torch.func.jvp(lambda q, k, v: token_attention(q, k, v, fused=False), (q, k, v), (dq, dk, dv))


def moving(q, k, v, dq, dk, dv):
    """(value, tangent) of what token_attention does with dual tensors."""
    duals = [x if dx is None else forward_ad.make_dual(x, dx) for x, dx in ((q, dq), (k, dk), (v, dv))]
    return forward_ad.unpack_dual(token_attention(*duals))


class Largest(TorchDispatchMode):
    """How many numbers the largest new tensor has."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


# Any device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("keys", [7, 12])
def test_blocks_of_queries_equal_pytorchs_rules(block, keys):
    given = inputs(7, keys)
    for found, expected in zip(blocked_attention(*given, block=block), usual(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_the_tangent_is_the_central_difference():
    given, h = inputs(6), 1e-5
    x, dx = given[:3], given[3:]
    ends = [token_attention(*(a + s * da for a, da in zip(x, dx)), fused=False) for s in (h, -h)]
    _, tangent = blocked_attention(*given, block=4)
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("still", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_what_does_not_move_has_a_tangent_of_zero(still):
    given = inputs(5)
    zeros = [torch.zeros_like(x) if i - 3 in still else x for i, x in enumerate(given)]
    nothing = [None if i - 3 in still else x for i, x in enumerate(given)]
    expected = usual(*zeros)
    with torch.no_grad(), forward_ad.dual_level():
        for ways in (blocked_attention(*nothing, block=2), moving(*nothing)):
            for found, right in zip(ways, expected, strict=True):
                torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    assert not blocked_attention(*given[:3], None, None, None)[1].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_keeps_its_dtype(dtype, tolerance):
    given = inputs(24, channels=16, dtype=dtype)
    exact = blocked_attention(*(x.double() for x in given))
    for found, right in zip(blocked_attention(*given, block=5), exact, strict=True):
        assert found.dtype == dtype and (found - right).abs().max() < tolerance * right.abs().max()


def test_blocks_never_hold_the_matrix_of_all_scores():
    given = inputs(256, channels=4, batch=1)
    with Largest() as seen:
        usual(*given)
    assert seen.numbers >= 3 * 256 * 256
    with Largest() as seen:
        blocked_attention(*given, block=16)
    assert seen.numbers == 3 * 16 * 256


# Which way ------------------------------------------------------------------------------------------------------------


def test_forward_mode_without_a_graph_takes_blocks_on_the_cpu(monkeypatch):
    given, calls = inputs(6), []
    real = blocked_attention
    monkeypatch.setattr(jvp_attention, "blocked_attention", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(jvp_attention, "fused_attention", lambda *a: pytest.fail("the kernel is not for the CPU"))
    monkeypatch.setattr(jvp_attention, "interpreted", lambda: False)
    with warnings.catch_warnings(), torch.no_grad(), forward_ad.dual_level():
        warnings.simplefilter("error")
        found = moving(*given)
    assert calls == [1]
    for a, b in zip(found, usual(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("leaf", range(6))
def test_the_plain_products_where_a_graph_is_wanted(leaf):
    given = [x.requires_grad_(i == leaf) for i, x in enumerate(inputs(4))]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, dx) for x, dx in zip(given[:3], given[3:])]
        assert dual_attention(*duals) is None
        assert forward_ad.unpack_dual(token_attention(*duals)).tangent.requires_grad
        with torch.no_grad():
            value, tangent = forward_ad.unpack_dual(dual_attention(*duals))
            assert not value.requires_grad and not tangent.requires_grad


def test_others_have_their_own_rules(monkeypatch):
    """torch.func, autocast and inputs that do not move."""
    monkeypatch.setattr(jvp_attention, "blocked_attention", lambda *a: pytest.fail("not here"))
    given = inputs(4, dtype=torch.float32)
    with torch.no_grad():
        value, _ = torch.func.jvp(lambda *x: token_attention(*x), tuple(given[:3]), tuple(given[3:]))
        torch.testing.assert_close(value, token_attention(*given[:3]))
        with forward_ad.dual_level():
            assert dual_attention(*given[:3]) is None
            with torch.autocast("cpu", torch.bfloat16):
                assert moving(*given).tangent is not None
        assert dual_attention(*(x.to("meta") for x in given[:3])) is None


# The kernel -----------------------------------------------------------------------------------------------------------


def fail(*args):
    raise RuntimeError("out of resource: shared memory\nmore")


@pytest.mark.parametrize("broken", ["missing", "launch"])
def test_without_a_working_kernel_there_is_one_note_and_the_same_result(monkeypatch, broken):
    given = inputs(6, dtype=torch.float32)
    monkeypatch.setattr(jvp_attention, "interpreted", lambda: True)  # stands in for a CUDA device
    monkeypatch.setattr(jvp_attention, "FAILED", set())
    jvp_attention._note.cache_clear()
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "common.nets.jvp_attention_kernel", None)
        monkeypatch.delattr("common.nets.jvp_attention_kernel", raising=False)
        jvp_attention.kernel.cache_clear()
    else:
        monkeypatch.setattr(jvp_attention, "unsupported", lambda *x: None)
        monkeypatch.setattr(jvp_attention, "fused_attention", fail)
    try:
        with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            found = [moving(*given) for _ in range(3)][-1]
    finally:
        jvp_attention.kernel.cache_clear()
        jvp_attention._note.cache_clear()
    texts = [str(note.message) for note in notes if "fused kernel" in str(note.message)]
    assert len(texts) == 1 and ("Triton cannot be imported" if broken == "missing" else "shared memory)") in texts[0]
    for a, b in zip(found, usual(*given), strict=True):
        torch.testing.assert_close(a, b)


def test_running_out_of_memory_is_no_reason_to_try_another_way(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(jvp_attention, "interpreted", lambda: True)
    monkeypatch.setattr(jvp_attention, "unsupported", lambda *x: None)
    monkeypatch.setattr(jvp_attention, "fused_attention", full)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(torch.OutOfMemoryError):
        moving(*inputs(4))


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_inputs_the_kernel_cannot_take():
    with_dtype = lambda dtype: inputs(4, dtype=dtype)[:3]
    assert unsupported(*with_dtype(torch.float32)) is None
    assert "not torch.float64" in unsupported(*with_dtype(torch.float64))
    q, k, v = with_dtype(torch.float32)
    assert "not torch.float32, torch.float32, torch.bfloat16" in unsupported(q, k, v.bfloat16())
    assert "up to 128 equal channels per head, not 136" in unsupported(*inputs(2, channels=136, dtype=q.dtype)[:3])
    assert "not 8 and 4" in unsupported(q, k, v[..., :4])
    assert "nothing" in unsupported(q[:, :, :0], k, v)
    long = torch.empty(1, device="meta").expand(1, 1, 2**24, 128)
    assert "32 bits" in unsupported(long, long, long)


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_the_kernel_in_tritons_interpreter():
    """Triton decides when it is first imported whether it interprets: a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    file = Path(__file__).with_name("interpreted_jvp_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=file.parents[3], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not HAS_TRITON or jvp_attention.interpreted(), reason=NO_TRITON)
@pytest.mark.parametrize(
    "capability, channels, dtype, precision",
    [(80, 64, "fp32", "tf32"), (90, 72, "bf16", "ieee"), (90, 64, "fp32", "tf32x3")],
)
def test_the_kernel_becomes_machine_code(capability, channels, dtype, precision, tmp_path, monkeypatch):
    """ptxas, which comes with Triton, needs no GPU. The interpreter takes programs that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from common.nets import jvp_attention_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    chosen = {"LENGTH": 250, **jvp_attention_kernel.constants(channels, known, precision, roomy=False)}
    options = {name: chosen.pop(name) for name in list(chosen) if not name.isupper()}
    signature = {n: f"*{dtype}" if n.endswith("_at") else "i32" for n in jvp_attention_kernel._attention.arg_names}
    signature |= {"scale": "fp32", **dict.fromkeys(chosen, "constexpr")}
    source = ASTSource(fn=jvp_attention_kernel._attention, signature=signature, constexprs=chosen)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024  # what consumer cards have


def test_a_network_has_the_same_derivative_with_any_way(monkeypatch):
    torch.manual_seed(0)
    net = DiT(img_resolution=8, in_channels=2, patch_size=2, width=32, depth=2, num_heads=2, label_dim=0).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, v = torch.randn(2, 2, 2, 8, 8, dtype=torch.float64).unbind(0)
    t, r = torch.tensor([0.9, 0.6]).double(), torch.tensor([0.2, 0.1]).double()
    found = total_derivative(net, z, t, r, (v, 1.0, 0.0))
    monkeypatch.setattr("common.nets.attention.dual_attention", lambda *x: None)
    torch.testing.assert_close(found, total_derivative(net, z, t, r, (v, 1.0, 0.0)), rtol=1e-11, atol=1e-12)
    assert found.abs().max() > 0.01
