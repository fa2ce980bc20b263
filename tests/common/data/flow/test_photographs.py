"""Photographs from scikit-image, folders and zips."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.flow.photographs import BUNDLED, BUNDLED_HELD_OUT, Photographs
from common.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(20):
        Image.fromarray(np.full((40, 60), number * 10, np.uint8)).save(tmp_path / "a" / f"{number:02d}.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    return tmp_path


def test_scikit_images_pictures_need_no_download():
    for split, names in (("train", BUNDLED), ("held_out", BUNDLED_HELD_OUT)):
        pictures = Photographs().of(split)
        assert len(pictures) == len(names)
        for number in range(len(names)):
            image, shrunk = pictures.level(number, 1.0)
            assert image.dtype == torch.float32 and image.shape[0] == 3 and shrunk == 1
            assert 250 < max(image.shape) <= 1024 and image.max() > 100


def test_folders_are_shared_by_the_splits(folder):
    source = Photographs(folders=[str(folder / "a")], bundled=False, held_out=0.25)
    train, held_out = source.names("train"), source.names("held_out")
    assert len(train) == 15 and len(held_out) == 5 and not set(train) & set(held_out)
    assert [name for _, name in held_out] == ["03.png", "07.png", "11.png", "15.png", "19.png"]
    assert source.of("held_out").level(1, 1.0)[0].unique().tolist() == [70.0]
    both = Photographs(folders=[str(folder / "a")]).of("train")
    assert len(both) == 18 + len(BUNDLED)


def test_zips_hold_the_same(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for path in sorted((folder / "a").iterdir()):
            archive.write(path, path.name)
    zipped = Photographs(folders=[str(tmp_path / "b.zip")], bundled=False).of("train")
    loose = Photographs(folders=[str(folder / "a")], bundled=False).of("train")
    assert [name for _, name in zipped.names] == [name for _, name in loose.names]
    assert torch.equal(zipped.level(4, 1.0)[0], loose.level(4, 1.0)[0])


def test_coarse_steps_take_a_smaller_picture():
    pictures = Photographs().of("train")
    full, half = pictures.level(0, 0.5)[0], pictures.level(0, 2.0)
    assert half[1] == 2 and half[0].shape[1] == full.shape[1] // 2
    assert torch.allclose(half[0][:, 0, 0], full[:, :2, :2].mean((1, 2)))
    assert pictures.level(0, 4.0)[1] == 4


def test_what_is_wrong_is_said(folder):
    with pytest.raises(UserError, match=r"folders: .*nowhere is neither a folder nor a zip"):
        Photographs(folders=[str(folder / "nowhere")]).names("train")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no pictures"):
        Photographs(folders=[str(folder / "empty")]).names("train")
    with pytest.raises(UserError, match=r"no photographs for held_out.*raise source\.held_out"):
        Photographs(folders=[str(folder / "a")], bundled=False, held_out=0).names("held_out")
    with pytest.raises(UserError, match=r"source\.folders must be a list, got 'x'\. Set source\.folders=\[x\]"):
        Photographs(folders="x")
    (folder / "a" / "00.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"photograph .*00\.png cannot be read"):
        Photographs(folders=[str(folder / "a")], bundled=False).of("train").level(0, 1.0)
    (folder / "b.zip").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"b\.zip cannot be read as a zip"):
        Photographs(folders=[str(folder / "b.zip")]).names("train")
