"""How wrong optical flow is: end-point error, pixel thresholds, Fl-all."""

import torch
from torch import Tensor

THRESHOLDS = (1, 3, 5)  # pixels


def end_point_error(flow: Tensor, gt: Tensor) -> Tensor:
    """Length of the difference in pixels, (B, H, W), of two flows (B, 2, H, W)."""
    return (flow - gt).square().sum(1).sqrt()


def flow_metrics(flow: Tensor, gt: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (sum, count), tensors without dimension, to be added up over batches and divided in the end:

    epe            end-point error in pixels, mean over the valid pixels of all pictures (Sintel, FlyingChairs)
    epe_per_image  mean over pictures of the mean over their valid pixels (KITTI)
    1px, 3px, 5px  percent of the valid pixels with an error BELOW that (higher is better)
    fl_all         percent of the valid pixels with an error above 3 pixels and above 5 % of the true length (KITTI)

    flow, gt  (B, 2, H, W) pixels;  valid  (B, H, W), known where >= 0.5. A picture without one counts nowhere.
    Definitions: KITTI 2015 devkit, and the evaluation of DEQ-Flow (arXiv 2204.08442, released code).
    """
    known = valid >= 0.5
    error = end_point_error(flow.float(), gt.float())
    length = gt.float().square().sum(1).sqrt()
    wrong = (error > 3) & (error > 0.05 * length)
    error_sum = torch.where(known, error, 0).flatten(1).sum(1, dtype=torch.float64)  # nan outside would stay with *
    pixels = known.flatten(1).sum(1)
    count = pixels.sum().double()
    found = {
        "epe": (error_sum.sum(), count),
        "epe_per_image": ((error_sum / pixels.clamp(min=1)).sum(), (pixels > 0).sum().double()),
    }
    for threshold in THRESHOLDS:
        found[f"{threshold}px"] = (100 * (known & (error < threshold)).sum().double(), count)
    found["fl_all"] = (100 * (known & wrong).sum().double(), count)
    return found
