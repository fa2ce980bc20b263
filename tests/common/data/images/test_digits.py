"""The digits split is fixed for ever."""

import numpy as np

from common.data.images.digits import Digits, digits_split
from common.data.source import sha256


def test_shapes_types_and_range():
    train_x, train_y, test_x, test_y = digits_split()
    assert train_x.shape == (1400, 1, 8, 8) and test_x.shape == (397, 1, 8, 8)
    assert train_x.dtype == test_x.dtype == np.uint8
    assert train_y.dtype == test_y.dtype == np.int64
    assert train_x.min() == 0 and train_x.max() == 255
    assert set(train_y) == set(test_y) == set(range(10))


def test_pixels_are_rounded_sixteenths():
    allowed = {round(count * 255 / 16) for count in range(17)}
    assert set(np.unique(digits_split()[0]).tolist()) == allowed


def test_the_split_is_the_recorded_one():
    train_x, train_y, test_x, test_y = digits_split()
    recorded = "d5410ccfa83cfcbe8d1b2a5e01ca1cfa07f763a1c99e0d72a34edaabed5b52f9"
    assert sha256(b"".join(part.tobytes() for part in (train_x, train_y, test_x, test_y))) == recorded


def test_source_gives_the_split():
    source = Digits()
    source.check()
    train_x, _, _, test_y = digits_split()
    np.testing.assert_array_equal(source.load("train").images.numpy(), train_x)
    np.testing.assert_array_equal(source.load("test").labels.numpy(), test_y)
