"""The benchmark of forward-mode attention: its variants are the same mathematics, and a CPU measures no kernel."""

import argparse

import pytest
import torch

from common.errors import UserError
from common.nets import jvp_attention
from tools.benchmarks import jvp_attention as bench

OPTIONS = argparse.Namespace(
    tokens=[48, 16], batch=2, heads=2, channels=8, dtype="fp32", tf32=False, device="cpu", threads=[1]
)


def change(**options) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(OPTIONS), **options})


def test_the_variants_compute_the_same():
    given = bench.draw(OPTIONS, 48, 0)
    assert given[0].shape == (2, 2, 48, 8) and not torch.equal(given[0], bench.draw(OPTIONS, 48, 1)[0])
    assert not given[0].is_contiguous() and given[0].stride(3) == 1
    with torch.no_grad():
        found = bench.by_rules(*given), jvp_attention.blocked_attention(*given, block=7)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_steps_on_a_cpu_never_take_the_kernel(monkeypatch):
    monkeypatch.setattr(jvp_attention, "fused_attention", lambda *a: pytest.fail("no CUDA here"))
    assert bench.variants(OPTIONS) == [bench.MATH, bench.BLOCKS]
    assert bench.cases(OPTIONS) == ["16 tokens", "48 tokens"]
    for variant in bench.variants(OPTIONS):
        step = bench.make(variant, OPTIONS)
        facts = step("48 tokens", 0)
        assert facts["gflop"] == pytest.approx(12e-9 * 2 * 2 * 48**2 * 8) and set(facts) == {"gflop", "cpu ms"}


def test_on_cuda_the_kernel_is_a_variant():
    assert bench.variants(change(device="cuda")) == [bench.MATH, bench.BLOCKS, bench.FUSED]


def test_remarks_say_what_was_measured():
    base = {"case": "16 tokens", "threads": 1}
    rows = [
        {**base, "variant": bench.MATH, "cpu ms": 6.0, "peak MiB": 90},
        {**base, "variant": bench.BLOCKS, "cpu ms": 4.0, "peak MiB": 30},
    ]
    assert bench.remarks(rows) == [
        "16 tokens, blocks: 1.50x as fast as math, 30 MiB against 90.",
        "The fused kernel needs CUDA: nothing here was measured with it.",
    ]
    rows = [
        {**base, "variant": bench.MATH, "gpu ms": 6.0, "gpu MiB": 90.0},
        {**base, "variant": bench.FUSED, "gpu ms": 2.0, "gpu MiB": 3.0},
    ]
    assert bench.remarks(rows) == ["16 tokens, fused: 3.00x as fast as math, 3 MiB against 90."]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        bench.cases(change(device="cuda"))


def test_bad_options():
    with pytest.raises(UserError, match="--tokens must be >= 1, got 0"):
        bench.cases(change(tokens=[0]))
    with pytest.raises(UserError, match="--heads must be >= 1, got 0"):
        bench.cases(change(heads=0))
