"""Errors of flow on hand-made arrays, by both conventions."""

import pytest
import torch

from projects.deq_flow.metrics import end_point_error, flow_metrics


def value(found, name):
    total, count = found[name]
    return float(total / count)


@pytest.fixture
def made():
    """Picture 1: errors 0, 2, 4, 10 at length 100, the last two on truth of length 100 and 10; picture 2: one pixel
    known, off by 0.5."""
    gt = torch.zeros(2, 2, 1, 4)
    gt[0, 0, 0] = torch.tensor([100.0, 100.0, 100.0, 10.0])
    flow = gt.clone()
    flow[0, 1, 0] += torch.tensor([0.0, 2.0, 4.0, 10.0])
    flow[1, 0, 0] = torch.tensor([0.5, 50.0, torch.nan, torch.inf])
    valid = torch.ones(2, 1, 4)
    valid[1, 0, 1:] = 0
    return flow, gt, valid


def test_end_point_error():
    gt = torch.zeros(1, 2, 2, 2)
    flow = gt.clone()
    flow[0, :, 0, 1] = torch.tensor([3.0, -4.0])
    assert end_point_error(flow, gt).tolist() == [[[0, 5], [0, 0]]]


def test_both_means_by_hand(made):
    found = flow_metrics(*made)
    assert value(found, "epe") == pytest.approx(16.5 / 5)
    assert value(found, "epe_per_image") == pytest.approx((4 + 0.5) / 2)
    assert [value(found, name) for name in ("1px", "3px", "5px")] == pytest.approx([40, 60, 80])
    # off by 4 of 100 is within 5 %, off by 10 of 10 is not
    assert value(found, "fl_all") == pytest.approx(20)


def test_thresholds_are_strict_and_both_of_fl_all_must_fail():
    gt = torch.tensor([20.0, 60.0, 60.0, 100.0]).view(1, 1, 1, 4) * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    flow = gt + torch.tensor([1.0, 3.0, 3.1, 4.9]).view(1, 1, 1, 4) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    found = flow_metrics(flow, gt, torch.ones(1, 1, 4))
    # 1.0 is not below 1; only 3.1 is above 3 and above 5 % of 60
    assert [value(found, name) for name in ("1px", "3px", "5px", "fl_all")] == pytest.approx([0, 25, 100, 25])


def test_batches_add_up_and_a_picture_without_truth_counts_nowhere(made):
    flow, gt, valid = made
    whole = flow_metrics(flow, gt, valid)
    parts = [flow_metrics(flow[i : i + 1], gt[i : i + 1], valid[i : i + 1]) for i in range(2)]
    parts.append(flow_metrics(flow[:1], gt[:1], 0 * valid[:1]))
    for name, (total, count) in whole.items():
        assert float(sum(part[name][0] for part in parts)) == pytest.approx(float(total))
        assert float(sum(part[name][1] for part in parts)) == float(count)
