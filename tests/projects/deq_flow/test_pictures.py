"""Pictures of flow explain themselves: the colour wheel and the scales in pixels are on them."""

import numpy as np
import torch
from PIL import Image

from common.data.flow.colours import flow_to_rgb
from projects.deq_flow.pictures import LINE, WHEEL, Row, wheel_picture, with_wheel, write_pairs


def test_the_wheel_shows_the_colour_of_each_direction():
    wheel = wheel_picture(41)
    for u, v in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        direct = flow_to_rgb(torch.tensor([float(u), float(v)]).view(2, 1, 1), 1.0)[:, 0, 0]
        assert torch.equal(wheel[:, 20 + 20 * v, 20 + 20 * u], direct)
    assert wheel[:, 20, 20].tolist() == wheel[:, 0, 0].tolist() == [255, 255, 255]


def test_a_frame_carries_the_wheel_in_its_corner_and_keeps_the_rest():
    colours = flow_to_rgb(torch.ones(2, 100, 160), 3.0)
    stamped = with_wheel(colours, 3.0)
    assert stamped.shape == colours.shape and torch.equal(stamped[:, -20:, -20:], wheel_picture(20))
    assert torch.equal(stamped[:, :-20], colours[:, :-20]), "only the corner changes"
    assert not torch.equal(stamped[:, -LINE:, -50:-20], colours[:, -LINE:, -50:-20]), "the length in pixels"
    assert with_wheel(colours[:, :16, :16], 3.0).shape == (3, 16, 16)


def test_a_table_of_pairs_ends_with_the_key(tmp_path):
    flow = torch.ones(2, 24, 32)
    row = Row(frame=torch.zeros(3, 24, 32, dtype=torch.uint8), estimate=flow, flow=flow, valid=torch.ones(24, 32))
    picture = Image.open(write_pairs(tmp_path / "a.png", [row])).convert("RGB")
    key = np.asarray(picture)[-WHEEL - 4 : -4, 4 : 4 + WHEEL]
    assert np.array_equal(key, wheel_picture(WHEEL).permute(1, 2, 0).numpy())
