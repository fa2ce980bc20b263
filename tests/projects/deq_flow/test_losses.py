"""The loss of a flow estimate by hand."""

import torch

from projects.deq_flow.losses import flow_loss


def test_mean_is_over_all_pixels_and_both_components():
    gt = torch.zeros(1, 2, 2, 2)
    flow = gt.clone()
    flow[0, 0, 0, 0], flow[0, 1, 0, 1] = 4.0, -8.0
    valid = torch.ones(1, 2, 2)
    assert flow_loss(flow, gt, valid) == 12 / 8
    valid[0, 0, 1] = 0
    assert flow_loss(flow, gt, valid) == 4 / 8  # not 4 / 6


def test_far_truth_and_unknown_pixels_do_not_count():
    gt = torch.zeros(1, 2, 1, 3)
    gt[0, :, 0, 0] = torch.tensor([240.0, 320.0])  # 400 pixels
    gt[0, 0, 0, 1] = 399.0
    flow = (gt + 1).requires_grad_()
    valid = torch.tensor([[[1.0, 1.0, 0.49]]])
    loss = flow_loss(flow, gt, valid)
    assert loss == 2 / 6
    loss.backward()
    assert (flow.grad != 0).any(1).tolist() == [[[False, True, False]]]
    assert flow_loss(flow, gt, valid, max_flow=500) == 4 / 6
    assert flow_loss(flow, gt, valid, max_flow=1) == 0


def test_unknown_estimates_do_not_poison():
    flow = torch.full((1, 2, 1, 2), torch.nan)
    flow[..., 0] = 1
    assert flow_loss(flow, torch.zeros(1, 2, 1, 2), torch.tensor([[[1.0, 0.0]]])) == 0.5
