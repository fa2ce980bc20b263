"""The flow benchmark's variants do what their names say, and its remarks are the ratios asked for. No timing."""

import argparse

import pytest
import torch

from common.errors import UserError
from tools.benchmarks import flow


def options(**changes):
    return argparse.Namespace(
        **({"only": list(flow.CASES), "size": [128, 128], "device": "cpu", "tiny": True} | changes)
    )


def test_every_variant_runs_in_its_cases():
    assert flow.variants_of("training", options())[0] == "unroll_36"
    for case in ("training", "lookup"):
        for variant in flow.variants_of(case, options()):
            if variant not in ("unroll_36", "unroll_12"):  # the same code at more steps
                assert flow.make(variant, options())(case, 0) == {}
    assert flow.make(flow.DENSE, options())("inference", 0) == {}
    assert set(flow.variants(options())) == {*flow.TRAINING, flow.THEIRS, flow.DENSE, flow.ON_DEMAND}


def test_both_lookups_give_one_flow_after_all_steps():
    first, second = flow.pair(options())
    nets = [flow.network(name, options()) for name in (flow.DENSE, flow.ON_DEMAND)]
    with torch.no_grad():
        dense, on_demand = (net(first, second) for net in nets)
    assert nets[0].deq.solution.calls == flow.STEPS
    torch.testing.assert_close(dense, on_demand, rtol=0, atol=1e-4)


def test_remarks_are_the_ratios_asked_for():
    base = {"threads": 1}
    peaks = {
        "unroll_36": (6.0, 2500),
        "unroll_12": (2.0, 1400),
        "deq": (3.0, 1000),
        "deq_kept": (2.9, 1100),
        "one_step": (1.0, 800),
    }
    rows = [
        {**base, "case": "training", "variant": name, "step s": taken, "peak MiB": peak}
        for name, (taken, peak) in peaks.items()
    ]
    for name, taken, ratio in ((flow.THEIRS, 2.0, 1.0), (flow.DENSE, 1.0, 0.5), (flow.ON_DEMAND, 4.0, 2.0)):
        rows.append({**base, "case": "inference", "variant": name, "step s": taken, "ratio": ratio, "peak MiB": 1})
    rows.append({**base, "case": "lookup", "variant": flow.ON_DEMAND, "step s": 1.0, "ratio": 3.0, "peak MiB": 1})
    assert flow.remarks(rows) == [
        "1 thread: a step of deq takes 0.50 of unroll_36's seconds and 1.50 of unroll_12's (asked: at most .6 of "
        "unroll_36's)",
        "1 thread: memory net of encoders and one step, in that of deq (200 MiB): deq_kept 1.50, unroll_12 "
        "3.00, unroll_36 8.50 (asked of unroll_12 and unroll_36: 3, 8)",
        "1 thread: torchvision raft_large: 0.50 pairs/s",
        "1 thread: dense: 1.00 pairs/s, 0.50 of raft_large's time (asked: at most 1)",
        "1 thread: on_demand: 0.25 pairs/s",
        "1 thread: a lookup on demand takes 3.0 times as long as a dense one",
    ]


def test_bad_options():
    with pytest.raises(UserError, match="--size must be multiples of 8 of at least 128"):
        flow.cases(options(size=[100, 128]))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
            flow.cases(options(device="cuda"))
