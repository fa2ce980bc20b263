"""A user's own pictures: which files are taken, under what names, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.tasks.pictures import find_pictures, read_picture, write_classes


def save(path, array=None):
    Image.fromarray(np.zeros((2, 3, 3), np.uint8) if array is None else array).save(path)


def test_names_of_a_folder_and_of_one_file(tmp_path):
    for name in ("b.png", "a.JPG", "c.png", "c.bmp"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert list(find_pictures(tmp_path)) == ["a", "b", "c_bmp", "c_png"]
    assert find_pictures(tmp_path / "b.png") == {"b": tmp_path / "b.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"There is no picture in .*empty. Put files of one of .bmp"):
        find_pictures(tmp_path / "empty")


def test_pictures_are_upright_and_have_three_colours(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    save(tmp_path / "grey.png", pixels)
    assert torch.equal(read_picture(tmp_path / "grey.png"), torch.from_numpy(pixels).expand(3, 2, 3))
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png")[0].numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x.png cannot be read .*Remove it, or save it anew"):
        read_picture(tmp_path / "x.png")


def test_class_numbers_survive(tmp_path):
    classes = torch.tensor([[0, 1], [149, 2]])
    path = write_classes(tmp_path / "new" / "c.png", classes, np.arange(450).reshape(150, 3) % 256)
    assert np.array_equal(np.array(Image.open(path)), classes.numpy())
