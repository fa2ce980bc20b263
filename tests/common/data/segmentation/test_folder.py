"""A folder of one's own pictures with masks: index, palette and colour masks, splits, and what is wrong with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.segmentation.folder import SegmentationFolder, read_classes
from common.errors import UserError

COLOURS = [(10, 20, 30), (200, 0, 0), (0, 90, 250)]


def classes_of(number):
    return np.random.default_rng(number).integers(0, 3, (6, 8))


def make(root, count=10, style="index", ignored=False):
    """A folder of `count` pictures in `root`; the first pixel of each mask is to be ignored if wanted."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number in range(count):
        Image.fromarray(np.full((6, 8, 3), number, np.uint8)).save(root / "images" / f"p{number:02d}.jpg")
        classes = classes_of(number)
        if style == "colour":
            pixels = np.array([*COLOURS, (9, 9, 9)], np.uint8)[classes]
            if ignored:
                pixels[0, 0] = (9, 9, 9)
            mask = Image.fromarray(pixels)
        else:
            values = classes.astype(np.uint8)
            if ignored:
                values[0, 0] = 255
            mask = Image.fromarray(values)
            if style == "palette":
                mask.putpalette([value for colour in COLOURS for value in colour] + 759 * [0])
        mask.save(root / "masks" / f"p{number:02d}.png")
    return root


def listed(root, *lines):
    (root / "classes.txt").write_text("# mine\n" + "\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("style", ["index", "palette", "colour"])
def test_masks_of_every_kind_give_the_same_classes(style, ignored, tmp_path):
    make(tmp_path, style=style, ignored=ignored)
    colours = [f" = {r} {g}, {b}" if style == "colour" else "" for r, g, b in COLOURS]
    listed(tmp_path, *(name + colour for name, colour in zip(("wall", "cat's paw", "sky"), colours, strict=True)))
    source = SegmentationFolder(root=str(tmp_path), ignore=[9, 9, 9] if style == "colour" else 255)
    source.check()
    assert source.class_names == ("wall", "cat's paw", "sky") and len(set(source.palette)) == 3
    if style == "colour":
        assert list(source.palette) == COLOURS
    train, val = source.load("train"), source.load("val")
    assert (len(train), len(val), len(source.load("test"))) == (8, 2, 2)
    assert not set(train.images) & set(val.images) and val.images == source.load("test").images
    for index in range(8):
        image, mask = train.read(index)
        expected = torch.from_numpy(classes_of(int(train.images[index][-6:-4])).astype(np.uint8))
        if ignored:
            expected[0, 0] = 255
        assert torch.equal(mask, expected) and image.shape == (3, 6, 8)


def test_numbers_of_ones_own_and_folders_of_splits(tmp_path):
    for split, count in (("train", 4), ("val", 3)):
        make(tmp_path / split, count)
    listed(tmp_path, "sky = 2", "wall = 0", "cat = 1")
    source = SegmentationFolder(root=str(tmp_path), ignore=None)
    assert [len(source.load(split)) for split in source.splits] == [4, 3, 3]
    mask = source.load("val").mask(0).numpy()
    assert np.array_equal(np.array([2, 0, 1])[mask], classes_of(0))
    make(tmp_path / "test", 2)
    assert [len(source.load(split)) for split in source.splits] == [4, 3, 2]


def test_what_is_wrong_is_said_with_the_file(tmp_path):
    def refusal(split="train", **options):
        with pytest.raises(UserError) as caught:
            pairs = SegmentationFolder(root=str(tmp_path), **options).load(split)
            for index in range(len(pairs)):
                pairs.read(index)
        return str(caught.value)

    assert "images is not a folder" in refusal()
    make(tmp_path, 4)
    assert "classes.txt is missing. Write one class a line" in refusal()
    listed(tmp_path, "a", "b")
    assert "holds the value 2 in row" in refusal() and "which is no class" in refusal()
    assert "is the number of the class b" in refusal(ignore=1)
    listed(tmp_path, "a = 0 0 0", "b = 1 1 1", "c = 3 3 3")
    assert "holds the colour 2 2 2 in row" in refusal()
    assert "is the colour of a class" in refusal(ignore=[1, 1, 1])
    listed(tmp_path, "a", "b", "c")
    assert "lists none" in refusal(ignore=[1, 1, 1])
    (tmp_path / "masks/p01.png").unlink()
    assert "p01.jpg has no mask p01" in refusal()
    for options in ({"ignore": 256}, {"ignore": -1}, {"ignore": [1, 2]}):
        assert "data.source.ignore must be" in refusal(**options)
    assert "data.source.held_out must be > 0 and < 1" in refusal(held_out=1.0)


@pytest.mark.parametrize(
    "lines, words",
    [
        (["a", "b = x"], "Line 3 of .* is no class: 'b = x'"),
        (["a = 1 2"], "Line 2 of .* is no class"),
        (["a = 1", "b = 256"], "Line 3"),
        (["= 4"], "Line 2"),
        (["a", "a"], "gives the name a to two classes"),
        (["a = 1", "b = 1"], "gives the number or colour 1 to two"),
        (["a = 1", "b = 1 2 3"], "mixes numbers and colours"),
        ([], "lists 0 classes"),
    ],
)
def test_lines_that_are_no_class(lines, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_classes(listed(tmp_path, *lines) / "classes.txt")
