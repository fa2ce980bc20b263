"""What stands on the digit canvases, and what the masks say about it."""

import numpy as np
import pytest
import torch

from common.data.images.digits import digits_split
from common.data.segmentation.augment import PairedAugment
from common.data.segmentation.digit_canvas import EVEN, INK, ODD, TWIN, DigitCanvas, make_canvas
from common.data.segmentation.module import SegmentationDataModule
from common.errors import UserError


def data(**options) -> SegmentationDataModule:
    augment = PairedAugment(crop=32, scales=(1.0,), flip=0.0)
    return SegmentationDataModule(source=DigitCanvas(**options), augment=augment, batch_size=4, eval_batch_size=8)


def pieces(image: np.ndarray) -> list[tuple[np.ndarray, tuple[slice, slice]]]:
    """The digits of a canvas: the 8x8 squares that are, pixel by pixel, a digit of the bundle."""
    train_x, train_y, test_x, test_y = digits_split()
    known = {x[0].tobytes(): int(y) for x, y in zip([*train_x, *test_x], [*train_y, *test_y])}
    found = []
    for top in range(25):
        for left in range(25):
            box = np.s_[top : top + 8, left : left + 8]
            number = known.get(np.ascontiguousarray(image[box]).tobytes())
            if number is not None:
                found.append((number, box))
    return found


@pytest.mark.parametrize("split", ["train", "test"])
def test_seven_digits_one_number_twice_and_the_mask_says_so(split):
    for index in range(5):
        image, mask = make_canvas(split, 0, index)
        found = pieces(image)
        numbers = [number for number, _ in found]
        assert len(numbers) == 7 and len(set(numbers)) == 6
        expected = np.zeros_like(mask)
        for number, box in found:
            label = TWIN if numbers.count(number) == 2 else (ODD if number % 2 else EVEN)
            expected[box] = np.where(image[box] >= INK, label, 0)
        np.testing.assert_array_equal(mask, expected)


def test_the_splits_take_different_digits():
    train_x, _, test_x, _ = digits_split()
    own = {x[0].tobytes() for x in train_x}
    other = {x[0].tobytes() for x in test_x} - own
    for index in range(10):
        image, _ = make_canvas("train", 0, index)
        for _, box in pieces(image):
            assert np.ascontiguousarray(image[box]).tobytes() not in other


def test_a_canvas_depends_on_split_seed_and_number_alone():
    first = make_canvas("train", 0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, make_canvas("train", 0, 3)))
    for other in (("test", 0, 3), ("train", 1, 3), ("train", 0, 4)):
        assert not np.array_equal(first[0], make_canvas(*other)[0])
    prints = {data(seed=seed).fingerprint(split) for seed in (0, 1) for split in ("train", "test")}
    assert len(prints) == 4


def test_batches_keep_the_data_contract():
    module = data(train_count=6, test_count=10)
    module.check()
    module.setup("fit")
    assert module.num_classes == 4 == len(module.palette) and module.splits == ("train", "test")
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (4, 32, 32) and batch["mask"].dtype == torch.int64
    assert (
        batch["image"].min() == -1
        and batch["image"].max() == 1
        and set(batch["mask"].unique().tolist()) == {0, 1, 2, 3}
    )
    sizes = [len(part["mask"]) for part in module.eval_batches("test")]
    assert sorted(sizes) == [2, 8]


@pytest.mark.parametrize("field", ["train_count", "test_count"])
def test_counts_out_of_range(field):
    with pytest.raises(UserError, match=f"data.source.{field} must be a whole number >= 1, got 0"):
        DigitCanvas(**{field: 0})
