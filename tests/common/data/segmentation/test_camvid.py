"""The real CamVid, its damage and SegNet's layout."""

import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from common.data.segmentation.camvid import CamVid
from common.errors import UserError


@pytest.fixture(scope="module")
def folder(data_folder):
    return data_folder("camvid")


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of links, without SHA256SUMS, of which a test replaces files."""
    (tmp_path / "camvid").mkdir()
    for file in folder.glob("*.zip"):
        os.symlink(file, tmp_path / "camvid" / file.name)
    return tmp_path / "camvid"


def test_the_splits_are_segnets(folder):
    source = CamVid(root=str(folder.parent))
    source.check()
    sizes = {split: len(source.load(split)) for split in source.splits}
    assert sizes == {"train": 367, "val": 101, "test": 233}
    names = [name for split in source.splits for name in source.load(split).images]
    assert len(set(names)) == 701
    assert len(source.class_names) == len(set(source.palette)) == 11


def test_pixel_shares_are_the_recorded_ones(folder):
    source = CamVid(root=str(folder.parent))
    pairs = source.load("val")
    counts = sum(np.bincount(pairs.mask(i).numpy().ravel(), minlength=256) for i in range(len(pairs)))
    assert set(np.flatnonzero(counts)) == {*range(11), 255}
    image, mask = pairs.read(0)
    assert image.shape == (3, 180, 240) and mask.shape == (180, 240) and pairs.size(0) == (180, 240)
    # sky, building, road are most of every split: README
    assert 0.5 < counts[[0, 1, 3]].sum() / counts.sum() < 0.8


def test_damage_is_found(folder, copy):
    content = bytearray((folder / "val.zip").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "val.zip").unlink()
    (copy / "val.zip").write_bytes(content)
    os.symlink(folder / "SHA256SUMS", copy / "SHA256SUMS")
    with pytest.raises(UserError, match=rf"{copy / 'val.zip'} is damaged: its sha256"):
        CamVid(root=str(copy.parent)).check()
    (copy / "val.zip").write_bytes(content[:1000])
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"val\.zip cannot be read as a zip"):
        CamVid(root=str(copy.parent)).check()
    (copy / "val.zip").unlink()
    with pytest.raises(UserError, match=rf"the split file {copy / 'val.zip'} is missing"):
        CamVid(root=str(copy.parent)).check()


def test_a_picture_without_mask_is_named(copy, folder):
    (copy / "test.zip").unlink()
    with zipfile.ZipFile(folder / "test.zip") as whole, zipfile.ZipFile(copy / "test.zip", "w") as part:
        for name in whole.namelist()[:6]:
            part.writestr(name, whole.read(name))
        kept = {name.split("/")[1].split(".")[0] for name in part.namelist()}
        part.writestr("image/alone.webp", b"")
    assert kept
    with pytest.raises(UserError, match=r"test\.zip holds .*, but not its (mask|picture)"):
        CamVid(root=str(copy.parent)).load("test")


def test_segnets_folders(tmp_path):
    for split in ("train", "val", "test"):
        for part, value in (("", (1, 2, 3)), ("annot", None)):
            place = tmp_path / "CamVid" / f"{split}{part}"
            place.mkdir(parents=True)
            pixels = (
                np.full((4, 5, 3), value, np.uint8) if value else np.resize(np.array([0, 10, 11], np.uint8), (4, 5))
            )
            Image.fromarray(pixels).save(place / "a.png")
    source = CamVid(root=str(tmp_path))
    source.check()
    image, mask = source.load("val").read(0)
    assert image[:, 0, 0].tolist() == [1, 2, 3] and set(mask.flatten().tolist()) == {0, 10, 255}
    (tmp_path / "CamVid" / "valannot" / "a.png").unlink()
    with pytest.raises(UserError, match=r"the mask .*valannot/a\.png of the picture"):
        source.check()
    with pytest.raises(UserError, match=r"CamVid not found: looked for .*camvid.* and .*CamVid"):
        CamVid(root=str(tmp_path / "nowhere")).check()
