"""Known colours of the Middlebury wheel."""

import pytest
import torch

from common.data.flow.colours import colour_wheel, flow_to_rgb


def test_the_wheel():
    wheel = colour_wheel()
    assert wheel.shape == (55, 3)
    corners = {
        0: (255, 0, 0),
        15: (255, 255, 0),
        21: (0, 255, 0),
        25: (0, 255, 255),
        36: (0, 0, 255),
        49: (255, 0, 255),
    }
    for index, colour in corners.items():
        assert wheel[index].tolist() == list(colour)
    assert wheel[14].tolist() == [255, 238, 0] and wheel[54].tolist() == [255, 0, 43]
    assert wheel.min() == 0 and wheel.max() == 255


# at full length: place on the wheel is (angle of (-u, -v) / pi + 1) / 2 * 54, between two entries of it
@pytest.mark.parametrize(
    "vector, colour",
    [((1, 0), (255, 0, 0)), ((0, 1), (255, 229, 0)), ((-1, 0), (0, 209, 255)), ((0, -1), (88, 0, 255))],
)
def test_directions(vector, colour):
    flow = torch.zeros(2, 2, 2)
    flow[:, 0, 0] = torch.tensor(vector, dtype=torch.float32) * 3
    rgb = flow_to_rgb(flow)
    assert rgb.dtype == torch.uint8 and rgb.shape == (3, 2, 2)
    assert rgb[:, 1, 1].tolist() == [255, 255, 255]
    assert (rgb[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= 1


def test_length_is_saturation_and_beyond_is_darker():
    flow = torch.zeros(2, 1, 3)
    flow[0, 0] = torch.tensor([2.0, 4.0, 8.0])
    rgb = flow_to_rgb(flow, max_flow=4)
    assert rgb[:, 0].T.tolist() == [[255, 127, 127], [255, 0, 0], [191, 0, 0]]


def test_pictures_are_scaled_one_by_one_and_unknown_is_black():
    flow = torch.randn(2, 3, 2, 4, 5)
    flow[0, 1] *= 100
    rgb = flow_to_rgb(flow)
    assert rgb.shape == (2, 3, 3, 4, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(rgb[i, j], flow_to_rgb(flow[i, j]))
    flow[0, 0, 0, 1, 1] = torch.nan
    assert flow_to_rgb(flow)[0, 0, :, 1, 1].tolist() == [0, 0, 0]
