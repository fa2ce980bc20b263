"""The MeanFlow benchmark compares like with like: the usual step and ours are the same mathematics. No timing."""

import argparse

import pytest
import torch

from common.errors import UserError
from common.losses.meanflow import MeanFlowLoss
from tools.benchmarks import meanflow

OPTIONS = argparse.Namespace(
    batch=4, nets=["unet", "dit"], shares=[25, 75], all_rows=True, device="cpu", autocast=None, tiny=True
)


@pytest.mark.parametrize("name", meanflow.NETS)
def test_the_usual_step_and_ours_give_the_same_loss_and_gradients(name):
    net = meanflow.build(name, tiny=True).double().eval()  # without dropout, whose draws differ
    x, e, t, r, labels = (k.double() for k in meanflow.draw(net, 4, 75, 0))
    assert int((r < t).sum()) == 3
    conditions = {"class_labels": labels} if net.label_dim else {}
    found = []
    for loss in (
        meanflow.usual(net, x, e, t, r, conditions),
        MeanFlowLoss(power=0.75)(net, x, t, r, e, **conditions).loss.mean(),
    ):
        net.zero_grad()
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters()}))
    torch.testing.assert_close(*(loss for loss, _ in found), rtol=1e-10, atol=0)
    for name in found[0][1]:
        torch.testing.assert_close(found[0][1][name], found[1][1][name], rtol=1e-8, atol=1e-12)


def test_every_variant_steps_in_every_case_and_moves_its_weights():
    for variant in meanflow.variants(OPTIONS):
        step = meanflow.make(variant, OPTIONS)
        for case, rows in zip(meanflow.cases(OPTIONS), (1, 3, 1, 3)):
            assert step(case, 0)["rows"] == (0 if variant == meanflow.FLOW else rows)
    one = meanflow.Step(meanflow.OURS, "dit", OPTIONS)
    before = [p.detach().clone() for p in one.net.parameters()]
    one(75, 0)
    assert all(p.isfinite().all() for p in one.net.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, one.net.parameters()))


def test_remarks_and_bad_options():
    base = {"case": "dit 25 %", "threads": 1}
    rows = [
        {**base, "variant": v, "ratio": k} for v, k in ((meanflow.FLOW, 1), (meanflow.USUAL, 2.4), (meanflow.OURS, 1.2))
    ]
    assert meanflow.remarks(rows) == ["dit 25 %, 1 thread: 1.20x a flow-matching step, against 2.40x the usual way."]
    with pytest.raises(UserError, match="--shares are per cent, 0 to 100, got 120"):
        meanflow.cases(argparse.Namespace(**{**vars(OPTIONS), "shares": [120]}))
