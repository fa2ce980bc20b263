"""Overlays: colours where they belong, void darkened, sheets of pictures of several sizes, the legend."""

import numpy as np
import torch
from PIL import Image

from common.tasks.overlays import GAP, LINE, OPACITY, painted, write_overlays

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def test_colours_lie_over_the_image_and_void_is_darkened():
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    out = painted(image, torch.tensor([[0, 2, 255]]), torch.tensor(PALETTE, dtype=torch.uint8))
    strong, weak = round(255 * OPACITY + 100 * (1 - OPACITY)), round(100 * (1 - OPACITY))
    assert out[:, 0].T.tolist() == [[strong, weak, weak], [weak, weak, strong], [40, 40, 40]]


def test_a_sheet_with_truth_and_legend(tmp_path):
    images = [torch.full((3, 30, 240), 200, dtype=torch.uint8), torch.zeros(3, 10, 60, dtype=torch.uint8)]
    truths = [torch.zeros(30, 240, dtype=torch.uint8), torch.full((10, 60), 255, dtype=torch.uint8)]
    predicted = [torch.zeros(30, 240, dtype=torch.int64), torch.ones(10, 60, dtype=torch.int64)]
    path = write_overlays(tmp_path / "x.png", images, predicted, truths, palette=PALETTE, names=("aa", "bb", "cc"))
    sheet = np.array(Image.open(path))
    assert sheet.shape[1] == 3 * (240 + GAP) + GAP  # the second picture is enlarged fourfold
    top = LINE + GAP
    assert (sheet[top : top + 30, GAP : GAP + 240] == 200).all()
    assert (sheet[top : top + 30, 2 * GAP + 240 : 2 * GAP + 480] == painted(
        images[0], truths[0], torch.tensor(PALETTE, dtype=torch.uint8)
    )[:, 0, 0].numpy()).all()  # fmt: skip
    below = sheet[top + 30 + GAP + 40 :].reshape(-1, 3).tolist()
    assert [255, 0, 0] in below and [0, 255, 0] in below and [0, 0, 255] not in below


def test_predictions_alone_and_wide_pictures_are_reduced(tmp_path):
    image = torch.zeros(3, 100, 1000, dtype=torch.uint8)
    path = write_overlays(
        tmp_path / "x.png", [image], [torch.zeros(100, 1000, dtype=torch.int64)], None, palette=PALETTE, names="abc"
    )
    width, height = Image.open(path).size
    assert width == 2 * (480 + GAP) + GAP and height < 48 + LINE + GAP + 40
