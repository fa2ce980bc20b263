"""Folders and zips of pictures: labels, resizing, and the path of a damaged picture."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from common.data.images.folder import ImageFolder
from common.errors import UserError


def picture(path, seed=0, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def classes(tmp_path):
    root = tmp_path / "pictures"
    return root, {name: picture(root / name, seed) for seed, name in enumerate(["dog/b.png", "cat/deep/a.png"])}


def test_classes_are_top_level_folders_in_order(classes):
    root, pixels = classes
    source = ImageFolder(path=str(root), resolution=8, num_classes=2)
    source.check()
    files = source.load("train")
    assert files.files == ["cat/deep/a.png", "dog/b.png"]
    images, labels = files.take(np.array([1, 0]))
    assert labels.tolist() == [1, 0]
    np.testing.assert_array_equal(images[0].numpy(), pixels["dog/b.png"].transpose(2, 0, 1))

    from torchvision.datasets import ImageFolder as Theirs

    assert [label for _, label in Theirs(str(root)).samples] == files.labels.tolist()


def test_zip_and_folder_agree_and_survive_a_worker(classes, tmp_path):
    root, _ = classes
    (root / "dataset.json").write_text(json.dumps({"labels": [["dog/b.png", 7], ["cat/deep/a.png", 3]]}))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root).as_posix())
    folder = ImageFolder(path=str(root), resolution=8, num_classes=10).load("train")
    packed = ImageFolder(path=str(tmp_path / "set.zip"), resolution=8, num_classes=10).load("train")
    assert folder.labels.tolist() == packed.labels.tolist() == [3, 7]
    packed.read(0)
    for files in (packed, pickle.loads(pickle.dumps(packed))):
        assert (files.take(np.arange(2))[0] == folder.take(np.arange(2))[0]).all()


def test_grey_and_unlabelled(tmp_path):
    pixels = picture(tmp_path / "a.png", mode="L")
    files = ImageFolder(path=str(tmp_path), resolution=8, channels=1).load("train")
    np.testing.assert_array_equal(files.read(0), pixels[None])
    assert files.labels.tolist() == [0]


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_a_damaged_picture_is_named_with_its_path(tmp_path, place):
    root = tmp_path / "set"
    picture(root / "a.png")
    picture(root / "b.png")
    whole = (root / "b.png").read_bytes()
    (root / "b.png").write_bytes(whole[: len(whole) // 2])
    path, named = root, str(root / "b.png")
    if place == "zip":
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a.png", "b.png"):
                archive.write(root / name, name)
        named = f"{path}:b.png"
    files = ImageFolder(path=str(path), resolution=8).load("train")
    files.read(0)
    with pytest.raises(UserError) as caught:
        files.take(np.array([0, 1]))
    message = str(caught.value)
    assert message.startswith("Image 1 of the data set, ") and named in message and "Replace or delete" in message
    with pytest.raises(UserError, match="cannot be read"):
        ImageFolder(path=str(path), resolution=8, verify=True).load("train")


def test_sizes_are_kept_or_fitted(tmp_path):
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[:, 10:30] = 255  # the centred square is white
    Image.fromarray(image).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match=r"wide\.png, is 40x20, not 8x8.*data\.source\.fit=center"):
        ImageFolder(path=str(tmp_path), resolution=8).load("train").read(0)
    for fit in ("center", "adm"):
        fitted = ImageFolder(path=str(tmp_path), resolution=5, fit=fit).load("train").read(0)
        assert fitted.shape == (3, 5, 5) and (fitted[:, :, 1:-1] > 250).all(), fit


def test_fingerprint_follows_the_content_and_the_reading(classes):
    root, _ = classes
    base = ImageFolder(path=str(root), resolution=8).load("train").fingerprint()
    assert base == ImageFolder(path=str(root), resolution=8).load("train").fingerprint()
    assert base != ImageFolder(path=str(root), resolution=8, channels=1).load("train").fingerprint()
    picture(root / "dog/c.png")
    assert base != ImageFolder(path=str(root), resolution=8).load("train").fingerprint()


def test_what_is_missing_or_wrong_is_said(tmp_path):
    def message(**kwargs):
        source = ImageFolder(**{"path": str(tmp_path), "resolution": 8, **kwargs})
        with pytest.raises(UserError) as caught:
            source.check()
            source.load("train")
        return str(caught.value)

    assert "does not exist. Set data.root" in message(path=str(tmp_path / "gone"))
    assert "holds no pictures" in message()
    picture(tmp_path / "a.png")
    assert "no class for a.png" in message(num_classes=2)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert "dataset.json does not give one whole-number label" in message(num_classes=2)
    (tmp_path / "dataset.json").write_text('{"labels": [["a.png", 5]]}')
    assert "num_classes to at least 6" in message(num_classes=5)
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    assert "cannot be read as a zip" in message(path=str(tmp_path / "bad.zip"))
    with pytest.raises(UserError, match="no split 'test'"):
        ImageFolder(path=str(tmp_path), resolution=8).load("test")
    for field, value in (("fit", "centre"), ("channels", 2), ("resolution", 0), ("num_classes", -1)):
        with pytest.raises(UserError, match=rf"data\.source\.{field} must be"):
            ImageFolder(**{"path": str(tmp_path), "resolution": 8, field: value})
