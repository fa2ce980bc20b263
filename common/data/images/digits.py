"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 grey pictures that need no download."""

import numpy as np

from common.data.source import ImageArray, check_split

TRAIN_COUNT = 1400


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`(train_x, train_y, test_x, test_y)`, always the same rows in the same order.

    train_x (1400, 1, 8, 8) uint8 0..255, test_x (397, 1, 8, 8): the bundle holds counts 0..16, stored here as
    round(count * 255 / 16); train_y (1400,), test_y (397,) int64 classes 0..9.

    The rows are split by one fixed permutation because the bundle is ordered by writer. RandomState rather than
    default_rng: numpy promises that its stream never changes between versions, and the split must not either.

    Source: scikit-learn `load_digits`, the test part of UCI "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    counts = np.asarray(bunch.images)
    images = np.rint(counts * (255 / 16)).astype(np.uint8)[:, None]
    labels = np.asarray(bunch.target).astype(np.int64)
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:TRAIN_COUNT], order[TRAIN_COUNT:]
    return images[train], labels[train], images[test], labels[test]


class Digits:
    """The digits as a data source: grey 8x8, 10 classes, splits train (1400) and test (397); needs no root."""

    name = "digits"
    num_classes = 10
    channels = 1
    resolution = 8
    splits = ("train", "test")

    def check(self) -> None:
        """Nothing can be missing: the pictures come with scikit-learn."""

    def load(self, split: str) -> ImageArray:
        check_split(split, self.splits, self.name)
        train_x, train_y, test_x, test_y = digits_split()
        return ImageArray(train_x, train_y) if split == "train" else ImageArray(test_x, test_y)
