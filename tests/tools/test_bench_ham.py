"""The benchmark of context modules compares like with like and counts what the paper counts. No timing."""

import argparse
import warnings

import pytest
import torch

from tools import bench
from tools.benchmarks import ham


def options(**changes):
    defaults = dict(
        sizes=[4, 8], only=["forward", "training"], part=["module", "core"], modules=None, fused=False, batch=1,
        channels=64, rank=4, steps=3, device="cpu",
    )  # fmt: skip
    return argparse.Namespace(**(defaults | changes))


PAPER = {"channels": 512, "rank": 64, "steps": 6}


@pytest.mark.parametrize(
    "variant, published, tolerance",
    [("textbook nmf", 17.6, 0.005), ("ham cd", 16.2, 0.005), ("attention", 292.0, 0.005)],
)
def test_formula_is_the_published_cost_at_128x128(variant, published, tolerance):
    assert ham.formula(variant, "module", 128, options(**PAPER)) / 1e9 == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("part", ["module", "core"])
def test_counted_products_are_the_formula(part):
    chosen = options(**PAPER)
    count = lambda variant: ham.counted(variant, part, 128, chosen)
    formula = lambda variant: ham.formula(variant, part, 128, chosen)
    for variant in ("attention", "textbook nmf", "ham vq"):
        assert count(variant) == formula(variant)
    n, d, r = 128 * 128, 512, 64
    assert count("ham nmf") == formula("ham nmf") - n * d * r  # first codes and first step share a product
    assert count("ham cd") == formula("ham cd") - n * r * r  # the ridge acts on the dictionary, not on the codes
    assert ham.counted("ham nmf", part, 128, options(**PAPER, batch=3)) == 3 * count("ham nmf")


def test_published_parameters():
    with torch.device("meta"):
        sizes = {v: sum(p.numel() for p in ham.build(v, "module", options(**PAPER)).parameters()) for v in ham.MODULES}
    assert sizes["attention"] == 2**20  # 1.00 M of the paper, which counts 2^20
    assert sizes["textbook nmf"] == sizes["ham nmf"] == sizes["ham cd"] == 525_824 - 1024  # without the norm


def test_textbook_and_ours_are_the_same_function():
    chosen = options()
    ours, textbook = (ham.build(v, "core", chosen).double() for v in ("ham nmf", "textbook nmf"))
    x = torch.rand(2, 64, 5, 4, dtype=torch.float64, requires_grad=True)
    bases = ours.decomposition.draw(2, 64, dtype=torch.float64)
    found, wanted = ours(x, bases[:, None]), textbook(x, bases)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_all_modules_of_a_case_take_the_same_features():
    chosen = options(sizes=[8])
    for case in ham.cases(chosen):
        for variant in ham.variants_of(case, chosen):
            step = ham.Step(variant, case, chosen)
            facts = step()
            assert facts["gmac"] > 0 and facts["cpu ms"] >= 0
            assert step.module(step.x).shape == (1, 64, 8, 8)
    assert "ham nmf bptt" not in ham.variants_of("8x8 core forward", chosen)


def test_crossover():
    assert ham.crossover({16: 4.0, 32: 16.0}, {16: 1.0, 32: 64.0}) == pytest.approx(512)
    assert ham.crossover({16: 1.0, 32: 1.0}, {16: 2.0, 32: 3.0}) == 0
    assert ham.crossover({16: 1.0, 32: 3.0}, {16: 2.0, 32: 2.0}) is None
    assert ham.crossover({}, {16: 1.0}) is None


def test_command_prints_the_table_and_draws_it(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = bench.main(["ham", "--sizes", "4", "8", "--channels", "64", "--rank", "4", "--steps", "2", "--repeats",
                           "1", "--threads", "1", "--no-memory", "--quiet", "--out", str(tmp_path),
                           "--modules", "attention", "ham nmf", "psp"])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    for word in ("4x4 forward", "8x8 training", "gmac", "formula", "ham nmf than attention, times faster: 4x4"):
        assert word in printed
    assert {path.name for path in tmp_path.iterdir()} == {"ham.csv", "ham.md", "ham.png", "ham.json"}
    assert len((tmp_path / "ham.csv").read_text().splitlines()) == 1 + 3 * 4


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--sizes", "0"], "--sizes must be >= 1, got 0"),
        (["--modules", "ham nmf bptt"], "--modules ham nmf bptt leaves nothing for '16x16 forward'. It has: attention"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert bench.main(["ham", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
