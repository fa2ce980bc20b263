"""The in-memory split and the words for what is missing."""

import numpy as np
import pytest
import torch

from common.data.source import ImageArray, check_split, find_folder
from common.errors import UserError


def array(count=6):
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 2, 2)
    return ImageArray(images, np.arange(count))


def test_take_indexes_in_one_go():
    images, labels = array().take(np.array([4, 0, 4]))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.tolist() == [4, 0, 4]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


def test_fingerprint_follows_content():
    same, other_pixel, other_label = array(), array(), array()
    other_pixel.images[0, 0, 0, 0] += 1
    other_label.labels[0] += 1
    assert array().fingerprint() == same.fingerprint()
    assert len({array().fingerprint(), other_pixel.fingerprint(), other_label.fingerprint()}) == 3


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        ImageArray(np.zeros((2, 3, 2, 2), dtype=np.float32), np.zeros(2))
    with pytest.raises(ValueError, match="3 labels"):
        ImageArray(np.zeros((2, 3, 2, 2), dtype=np.uint8), np.zeros(3))


def test_unknown_split_names_the_nearest():
    with pytest.raises(UserError, match=r"no split 'tran'\. Closest: train\. Splits: train, test\."):
        check_split("tran", ("train", "test"), "digits")


def test_missing_folder_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(UserError) as caught:
        find_folder(str(tmp_path / "gone"), ["a", "b/c"], "x.gz", "Things", "Set data.root.")
    for words in ("Things not found", str(tmp_path / "gone" / "b/c" / "x.gz"), "does not exist", "Set data.root."):
        assert words in str(caught.value)
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / "b/c/x.gz").touch()
    assert find_folder(str(tmp_path), ["a", "b/c"], "x.gz", "Things", "") == tmp_path / "b/c"
