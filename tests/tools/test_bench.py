"""The benchmark compares like with like, and words that make a run faster change nothing but rounding. No timing."""

import argparse

import pytest
import torch

from common.runtime.training.memory import MIB, resident
from tools import bench
from tools.benchmarks import ect

OPTIONS = argparse.Namespace(batch=4, stages=[0, 4], contiguous=True, autocast="bf16", compile="eager", tiny=True)


def ours(*words: str, backend: str | None = None) -> ect.OurStep:
    return ect.our_step(*ect.TINY, *words, batch=4, backend=backend)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def error(found: dict, wanted: dict) -> float:
    """Largest difference of any tensor relative to that tensor's largest entry."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).detach().abs().max() / wanted[n].detach().abs().max()) for n in wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Published and ours are the same mathematics


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_published_and_ours_give_the_same_loss_and_gradients(stage):
    module = ect.build(ect.compose(*ect.TINY)).double()
    published = ect.PublishedDenoiser(module.net.raw).double().train()
    y, eps = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1, torch.randn(4, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.02, 0.3, 3.0, 40.0], dtype=torch.float64)
    assert stage == 4 or 0 < (module.loss.t_to_r(t, stage) > 0).sum() < 4  # a mixed batch

    torch.manual_seed(5)
    expected = ect.published_loss(published, y, t.reshape(-1, 1, 1, 1), eps, stage=stage)
    expected.mean().backward()
    torch.manual_seed(5)  # on a CPU the masks come from the same stream as dropout itself
    loss = module.loss(module.net, y, t, eps, stage=stage, dropout_masks=module.net.draw_dropout(y))
    loss.mean().backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert error(gradients(module.net), gradients(published)) < 1e-5


def test_every_step_starts_from_the_same_weights_and_moves_them():
    baseline, own = (ect.make(variant, OPTIONS) for variant in (ect.PUBLISHED, ect.OURS))
    before = {name: p.detach().clone() for name, p in own.module.net.named_parameters()}
    assert error(dict(baseline.net.named_parameters()), before) == 0
    for step, net in ((baseline, baseline.net), (own, own.module.net)):
        step("stage 4", 0)
        assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
        assert all(p.isfinite().all() for p in net.parameters())
    kept = own.averages.averages["ema"]
    for name, value in baseline.average.named_parameters():
        moved = dict(baseline.net.named_parameters())[name]
        torch.testing.assert_close(value, before[name].lerp(moved, 1 - ect.DECAY))
        moved = own.module.get_parameter(f"net.{name}")
        torch.testing.assert_close(kept[f"net.{name}"], before[name].lerp(moved, 1 - ect.DECAY))


def test_teacher_rows_are_counted_and_only_those_are_run():
    step = ours()
    seen = []
    step.module.net.register_forward_hook(lambda net, args, out: seen.append(len(args[0])))
    for case in ("stage 0", "stage 4"):
        for repeat in range(4):
            seen.clear()
            rows = step(case, repeat)["teacher rows"]
            assert sum(seen) == 4 + rows
    assert rows == 4


def test_times_are_spread_over_their_distribution():
    rows = []
    for seed in range(400):
        t = ect.Spread(-1.1, 2.0)(8, generator=torch.Generator().manual_seed(seed))
        assert t.dtype == torch.float32 and (t.diff() > 0).all()
        rows.append(int((ect.published_r(t, 0) > 0).sum()))
    assert set(rows) == {1, 2}
    assert abs(sum(rows) / len(rows) - 8 * (1 - 0.811)) < 0.1  # the share of r = 0 in stage 0


# ---------------------------------------------------------------------------------------------------------------------
# Words that only make a run faster


@pytest.fixture(scope="module")
def reference() -> ect.OurStep:
    torch.manual_seed(0)
    step = ours()
    step("stage 4", 3)
    return step


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        (["speed.channels_last=false"], None),
        (["project.optimizer.foreach=false"], None),
        (["project.optimizer.foreach=true"], None),
        (["speed.compile=true", "project.optimizer.foreach=false"], "aot_eager"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_a_step_with_fast_words_differs_by_rounding_only(reference, words, backend):
    torch._dynamo.reset()
    step = ours(*words, backend=backend)
    step("stage 4", 3)
    assert error(gradients(step.module.net), gradients(reference.module.net)) < 2e-4
    # The first steps of RAdam are lr * gradient: a weight moves by at most 1e-4 here.
    for found, wanted in zip(step.module.parameters(), reference.module.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    kept, wanted = step.averages.averages["ema"], reference.averages.averages["ema"]
    for name in wanted:
        torch.testing.assert_close(kept[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_fused_optimiser_makes_the_same_step():
    adam = "optimizer@project.optimizer=adam"
    plain, fused = ours(adam, "project.optimizer.foreach=false"), ours(adam, "project.optimizer.fused=true")
    for step in (plain, fused):
        step("stage 4", 3)
    for found, wanted in zip(fused.module.parameters(), plain.module.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_autocast_rounds_to_bfloat16_and_no_more():
    # In stage 0: later the loss is a small difference of two passes, which magnifies any rounding.
    steps = ours("trainer.precision=bf16-mixed"), ours()
    for step in steps:
        step("stage 0", 3)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in steps[0].module.parameters())
    found, wanted = (torch.cat([g.flatten() for g in gradients(s.module.net).values()]) for s in steps)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.99
    assert (found - wanted).norm() > 1e-4 * wanted.norm(), "autocast is not active"


@pytest.mark.parametrize("words", [["speed.channels_last=true"], ["trainer=cpu"]], ids=["asked", "default on a CPU"])
def test_channels_last_is_kept_through_the_step(words):
    step = ours(*words)
    layouts = []
    for block in (m for m in step.module.net.modules() if hasattr(m, "conv0")):
        block.register_forward_hook(
            lambda m, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    step("stage 4", 0)
    assert layouts and all(layouts)
    weight = next(p for p in step.module.parameters() if p.dim() == 4 and p.shape[-1] == 3)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_prints_the_table_and_writes_it(tmp_path, capsys):
    code = bench.main(["ect", "--tiny", "--batch", "2", "--threads", "1", "--stages", "0", "--repeats", "2",
                       "--contiguous", "--no-memory", "--out", str(tmp_path)])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    for word in ("stage 0", "published", "ours contiguous", "ratio", "quartiles", "teacher rows"):
        assert word in printed
    table = (tmp_path / "ect.csv").read_text().splitlines()
    assert len(table) == 4 and table[1].startswith("stage 0,1,published,")
    assert {path.name for path in tmp_path.iterdir()} == {"ect.csv", "ect.md", "ect.png", "ect.json"}


def test_peak_memory_is_that_of_a_fresh_process(repo):
    found = bench.memory_of(["ect", "--tiny", "--threads", "1", "--batch", "2"], ect.OURS, "stage 0")
    assert 0 < found < 2000


def test_memory_sees_what_a_step_holds():
    block = 64 * MIB

    def step(case, repeat):
        return bytearray(block)[::4096]  # written to, so it is resident

    free = resident(peak=True) - resident(peak=False)  # earlier tests may have held more than this one
    assert bench.measure_memory(step, "any") >= min(64, free) * 0.9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["etc"], "Benchmark 'etc' does not exist. Closest: ect. Benchmarks:"),
        (["ect", "--stages", "9"], "--stages must be between 0 and 7, got 9"),
        (["ect", "--batch", "0"], "--batch must be >= 1, got 0"),
        (["ect", "--repeats", "0"], "--repeats must be >= 1, got 0"),
        (["ect", "--threads", "0"], "--threads must be >= 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {sentence}") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_wall_ratios_are_taken_round_by_round_and_cpu_ratios_of_totals():
    records = {
        "old": [{"wall": 1.0, "cpu": 1.0, "rows": 8.0}, {"wall": 10.0, "cpu": 3.0, "rows": 8.0}],
        "new": [{"wall": 0.5, "cpu": 1.0, "rows": 1.0}, {"wall": 5.0, "cpu": 1.0, "rows": 2.0}],
    }
    old, new = bench.summarise(records)
    assert (old["ratio"], new["ratio"], new["cpu ratio"], new["rows"]) == (1, 0.5, 0.5, 1.5)
    assert new["quartiles"] == "0.500 - 0.500"


def test_variants_take_turns():
    order = []
    steps = {name: lambda case, repeat, name=name: order.append((name, repeat)) or {} for name in "ab"}
    records = bench.interleave(steps, "any", 2, say=lambda *_, **__: None)
    assert order[2:] == [("b", 0), ("a", 0), ("a", 1), ("b", 1)]
    assert {name: len(r) for name, r in records.items()} == {"a": 2, "b": 2}
