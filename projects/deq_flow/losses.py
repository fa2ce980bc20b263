"""The loss of one flow estimate; states are weighted by `common.deq.correction.Correction`."""

from torch import Tensor

MAX_FLOW = 400.0  # pixels


def flow_loss(flow: Tensor, gt: Tensor, valid: Tensor, max_flow: float = MAX_FLOW) -> Tensor:
    """Mean over ALL pixels and both components of valid |flow - gt|, in pixels.

    flow, gt  (B, 2, H, W) pixels
    valid     (B, H, W), known where >= 0.5; pixels with ground truth of `max_flow` pixels or more do not count either

    Pixels that do not count are 0 in the mean, not left out of it: sparse ground truth gives small losses, as in the
    released code of DEQ-Flow (arXiv 2204.08442) and of RAFT (arXiv 2003.12039) before it.
    """
    counts = (valid >= 0.5) & (gt.square().sum(1) < max_flow**2)
    return (flow - gt).abs().masked_fill(~counts[:, None], 0).mean()
