"""The variants of the flow benchmarks do what their names say; remarks and metrics are the ratios. No timing."""

import argparse

import pytest
import torch

from common.errors import UserError
from tools.benchmarks import flow, flow_memory


def options(**changes):
    return argparse.Namespace(
        **({"only": list(flow.CASES), "size": [128, 128], "device": "cpu", "tiny": True} | changes)
    )


def test_every_variant_runs_in_its_cases():
    for variant in flow.variants_of("lookup", options()):
        assert flow.make(variant, options())("lookup", 0) == {}
    assert flow.make(flow.DENSE, options())("inference", 0) == {}
    assert set(flow.variants(options())) == {flow.THEIRS, flow.DENSE, flow.ON_DEMAND}


@pytest.mark.parametrize("variant", ["one_step", "unroll_12", "deq", "deq_kept", "deq_3_steps", "unroll_36"])
def test_a_variant_of_the_training_step_has_the_states_it_names(variant):
    """On a tiny network; every parameter gets a gradient."""
    states = {"one_step": 1, "deq": 6, "deq_kept": 6, "deq_3_steps": 2, "unroll_12": 12, "unroll_36": 36}[variant]
    steps = {"one_step": 1, "unroll_12": 12}.get(variant, 36)
    net = flow_memory.build(variant, **flow.TINY, levels=2).train()
    assert len(net.outputs(*torch.rand(2, 1, 3, 32, 48))) == states and net.deq.solution.calls == steps
    flow_memory.training_step(net, 32, 48)()
    assert all(p.grad is not None for p in net.parameters())


def test_the_benchmark_takes_a_training_step():
    assert flow_memory.variants(options())[0] == "unroll_36" and flow_memory.cases(options()) == ["training"]
    assert flow_memory.make("one_step", options())("training", 0) == {}


def test_both_lookups_give_one_flow_after_all_steps():
    first, second = flow.pair(options())
    nets = [flow.network(name, options()) for name in (flow.DENSE, flow.ON_DEMAND)]
    with torch.no_grad():
        dense, on_demand = (net(first, second) for net in nets)
    assert nets[0].deq.solution.calls == flow.STEPS
    torch.testing.assert_close(dense, on_demand, rtol=0, atol=1e-4)


def rows_of(peaks, **more):
    base = {"threads": 1, "case": "training"}
    return [{**base, "variant": name, "step s": s, "peak MiB": m, **more} for name, (s, m) in peaks.items()]


PEAKS = {"unroll_36": (6.0, 2500), "unroll_12": (2.0, 1400), "deq": (3.0, 1000), "deq_kept": (2.9, 1100),
         "one_step": (1.0, 800)}  # fmt: skip


def test_metrics_are_memory_beyond_one_step_and_seconds():
    rows = rows_of(PEAKS) + rows_of(PEAKS, threads=2)
    found = flow_memory.metrics(rows)
    assert found["deq_net_mib"] == 200 and found["unroll_36_net_mib"] == 1700 and found["one_step_mib"] == 800
    assert found["unroll_12_step_s"] == 2.0 and "one_step_net_mib" not in found
    first, second = flow_memory.remarks(rows)
    assert first == "a step of deq takes 0.50 of unroll_36's seconds and 1.50 of unroll_12's"
    assert "(200 MiB): deq_kept 1.50, unroll_12 3.00, unroll_36 8.50 (" in second
    without = [{key: value for key, value in row.items() if key != "peak MiB"} for row in rows]
    assert "deq_mib" not in flow_memory.metrics(without) and len(flow_memory.remarks(without)) == 1


def test_remarks_are_pairs_per_second_and_ratios():
    base = {"threads": 1, "peak MiB": 1}
    rows = [
        {**base, "case": "inference", "variant": name, "step s": taken, "ratio": ratio}
        for name, taken, ratio in ((flow.THEIRS, 2.0, 1.0), (flow.DENSE, 1.0, 0.5), (flow.ON_DEMAND, 4.0, 2.0))
    ]
    rows.append({**base, "case": "lookup", "variant": flow.ON_DEMAND, "step s": 1.0, "ratio": 3.0})
    assert flow.remarks(rows) == [
        "1 thread: torchvision raft_large: 0.50 pairs/s",
        "1 thread: dense: 1.00 pairs/s, 0.50 of raft_large's time",
        "1 thread: on_demand: 0.25 pairs/s",
        "1 thread: a lookup on demand takes 3.0 times as long as a dense one",
    ]


def test_bad_options():
    with pytest.raises(UserError, match="--size must be multiples of 8 of at least 128"):
        flow.cases(options(size=[100, 128]))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
            flow.cases(options(device="cuda"))
