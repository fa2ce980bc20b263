import numpy as np
import torch
from scipy.interpolate import griddata

from projects.deq_flow.raft.upsample import MaskHead, convex_upsample, forward_interpolate


def test_a_constant_flow_becomes_eight_times_itself_inside():
    torch.manual_seed(0)
    flow = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(2, 2, 5, 6)
    found = convex_upsample(flow, 3 * torch.randn(2, 576, 5, 6))
    assert found.shape == (2, 2, 40, 48)
    inside = found[:, :, 8:-8, 8:-8]  # at the border some of the neighbours are zeros outside the image
    torch.testing.assert_close(inside, torch.tensor([12.0, -16.0]).view(1, 2, 1, 1).expand_as(inside))
    assert (found[:, 0] >= 0).all() and (found[:, 0] <= 12.0001).all()


def test_a_linear_flow_stays_within_its_neighbours():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    flow = torch.stack([2 * x + 20, 3 * y - x + 20])[None]
    found = convex_upsample(flow, 3 * torch.randn(1, 576, 6, 7))[0].unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
    for axis, reach in ((0, 2), (1, 4)):
        centre = 8 * flow[0, axis, 1:-1, 1:-1, None]
        assert (found[axis, 1:-1, 1:-1] - centre).abs().max() <= 8 * reach + 1e-4


def test_the_mask_chooses_neighbour_and_place():
    flow = torch.arange(18.0).view(1, 2, 3, 3)
    mask = torch.zeros(1, 9, 8, 8, 3, 3)
    mask[0, 5, 2, 7, 1, 1] = 1e4  # right neighbour, row 2, column 7 of the middle pixel's block
    found = convex_upsample(flow, mask.flatten(1, 3))
    assert found[0, :, 8 + 2, 8 + 7].tolist() == [8 * 5.0, 8 * 14.0]
    torch.testing.assert_close(found[0, :, 8, 8], 8 * flow[0].mean((1, 2)))


def test_the_mask_head_is_a_quarter_of_its_convolutions():
    torch.manual_seed(0)
    head, h = MaskHead(4, 8), torch.randn(1, 4, 3, 3)
    assert head(h).shape == (1, 576, 3, 3)
    torch.testing.assert_close(head(h), head.conv2(head.conv1(h).relu()) / 4)


def test_forward_interpolation_takes_the_flow_that_lands_nearest_in_the_same_image():
    rng = np.random.default_rng(0)
    flow = rng.normal(scale=3, size=(3, 2, 7, 9))
    flow[1, 0] += 100  # leaves the image altogether
    found = forward_interpolate(torch.from_numpy(flow).float())
    assert found.dtype == torch.float32 and not found[1].any()
    y, x = np.mgrid[:7, :9]
    for b in (0, 2):
        to_x, to_y = x + flow[b, 0], y + flow[b, 1]
        stays = (to_x > 0) & (to_x < 9) & (to_y > 0) & (to_y < 7)
        expected = [griddata((to_x[stays], to_y[stays]), f[stays], (x, y), method="nearest") for f in flow[b]]
        np.testing.assert_allclose(found[b].numpy(), np.stack(expected), rtol=1e-6)
    assert not forward_interpolate(torch.full((1, 2, 4, 4), 99.0)).any()
