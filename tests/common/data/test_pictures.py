"""The one reader of pictures: depth, orientation, what is skipped, and what a damaged file is called."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.data.flow.files import image_size, read_image
from common.data.flow.frames import Frames
from common.data.flow.photographs import Photographs, read_photograph
from common.data.images.folder import ImageFolder
from common.data.pictures import (
    is_picture,
    list_pictures,
    picture_size,
    read_frames,
    read_picture,
    read_values,
)
from common.data.segmentation.pairs import Pairs, label_table
from common.errors import UserError
from common.metrics.reference import FolderImages
from common.tasks.pictures import find_pictures
from common.tasks.pictures import read_picture as read_input
from projects.torchdeq.signals import Frames as SignalFrames
from projects.torchdeq.signals import ImageFile

RAMP = (0, 65, 131, 197)  # 16-bit 0, 16705, 33667, 50629, divided by 257
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def pixels_of(path, **options):
    return np.asarray(read_picture(path, what="it", **options))


def every_reader(path):
    """(name, uint8 (H, W) of one channel) of everything that reads pictures of a user."""
    folder, name = path.parent, path.name
    mask = folder / "mask.dat"  # no picture by its name
    height, width = pixels_of(path).shape[:2]
    Image.fromarray(np.zeros((height, width), np.uint8)).save(mask, format="PNG")
    pairs = Pairs(name="own", images=[str(path)], masks=[str(mask)], table=label_table([0]))
    signals = [ImageFile(path=str(path)).load(), SignalFrames(path=str(folder)).load()]
    values = [((signal.values.reshape(height, width, 3) + 1) * 127.5).round().to(torch.uint8) for signal in signals]
    return {
        "training": ImageFolder(path=str(folder), resolution=height).load("train").read(0)[0],
        "fid_ref": next(FolderImages(path=folder).images(1))[0, 0],
        "flow": read_image(path)[0],
        "clip": Frames(folder).read()[0, 0],
        "photographs": read_photograph(folder, name)[..., 0],
        "segmentation": pairs.read(0)[0][0],
        "sample.input": read_input(path)[0],
        "signal": values[0][..., 0],
        "signal clip": values[1][..., 0],
    }


@pytest.mark.parametrize("name", ["ramp_16bit.png", "ramp_16bit.tif", "ramp_exif6.jpg"])
def test_every_reader_gives_the_same_upright_eight_bit_picture(name, data_root, tmp_path):
    (tmp_path / name).write_bytes((data_root / "cases" / name).read_bytes())
    for reader, pixels in every_reader(tmp_path / name).items():
        pixels = np.asarray(pixels)
        ramp = pixels[8, ::8] if "16bit" in name else pixels[::8, 8]
        assert np.abs(ramp.astype(int) - RAMP).max() <= (0 if "16bit" in name else 2), (reader, ramp)


@given(value=st.integers(0, 65535))
def test_sixteen_bits_are_scaled_by_257_and_rounded(value):
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint16)).save(file, format="PNG")
    read = pixels_of(file.getvalue(), channels=1)
    assert read[0, 0] == round(value / 257)
    assert (read_values(file.getvalue(), what="it") == value).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_holds_for_pixels_and_sizes_of_all_formats(format, orientation):
    pixels = np.zeros((16, 24), np.uint8)
    pixels[:8, :8] = 255  # one corner
    picture = Image.fromarray(pixels).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, format, exif=exif)
    # rows then columns of the EXIF standard: where row 0 and column 0 of the stored picture lie in the upright one
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.T, 6: pixels.T[:, ::-1], 7: pixels.T[::-1, ::-1], 8: pixels.T[::-1],
    }[orientation]  # fmt: skip
    read = pixels_of(file.getvalue())[..., 0]
    assert read.shape == upright.shape and (np.abs(read.astype(int) - upright) < 40).all()
    assert picture_size(file.getvalue(), what="it") == upright.shape


def test_palettes_bits_and_deep_masks_keep_their_numbers(tmp_path):
    numbers = np.array([[0, 1], [1, 0]], np.uint8)
    palette = Image.fromarray(numbers)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(numbers.astype(bool)).save(tmp_path / "bits.png")
    for name in ("palette.png", "bits.png"):
        assert np.array_equal(read_values(tmp_path / name, what="it"), numbers), name


def test_hidden_files_and_folders_are_skipped_everywhere(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(tmp_path / "set" / name)
    whole = (tmp_path / "set/a.png").read_bytes()
    for name in (".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "._a.png", "deep/.cache/x.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"no picture")
    folder = tmp_path / "set"
    (folder / "notes.txt").write_text("")
    assert list(list_pictures(folder)) == ["a.png", "b.png"]
    assert ImageFolder(path=str(folder), resolution=4).load("train").files == ["a.png", "b.png"]
    assert list(find_pictures(folder)) == ["a", "b"]
    assert Frames(folder).sequences == {"set": 2}
    assert len(SignalFrames(path=str(folder)).load().values) == 2
    assert [name for _, name in Photographs(folders=[str(folder)], bundled=False, held_out=0).names("train")] == [
        "a.png", "b.png",
    ]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("x/a.png", "__MACOSX/x/._a.png", "x/.hidden/b.png"):
            archive.writestr(name, whole)
    assert ImageFolder(path=str(tmp_path / "set.zip"), resolution=4).load("train").files == ["x/a.png"]
    assert is_picture("a/B.JPG") and not is_picture("a/b.txt") and not is_picture("a/.b/c.png")


def test_classes_are_no_hidden_folders(tmp_path):
    for name in ("cat/a.png", "dog/a.png", ".ipynb_checkpoints/a.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name)
    assert ImageFolder(path=str(tmp_path), resolution=4, num_classes=2).load("train").labels.tolist() == [0, 1]


def test_links_are_followed_once_and_broken_ones_are_one_sentence(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert list(list_pictures(tmp_path)) == ["a.png"]
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    message = r"b\.png cannot be read \(it is a link to a file that is gone\)\. Repair or delete it"
    for reader in (
        lambda: ImageFolder(path=str(tmp_path), resolution=4).load("train"),
        lambda: Frames(tmp_path),
        lambda: find_pictures(tmp_path),
    ):
        with pytest.raises(UserError, match=message):
            reader()


@pytest.mark.parametrize("reader", [read_image, image_size, read_input, lambda path: read_frames(path, what="it")])
def test_what_a_file_is_instead_is_said_without_object_addresses(reader, tmp_path):
    for content, wanted in (
        (POINTER, 'it is a git-lfs pointer, not the file itself; fetch that with git lfs pull --include="x.png"'),
        (b"text", "it is no picture, or its head is damaged"),
    ):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError) as caught:
            reader(tmp_path / "x.png")
        assert wanted in str(caught.value) and "object at" not in str(caught.value) and "0x" not in str(caught.value)


def test_depths_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif cannot be read \(it has 32 bits per pixel"):
        read_input(tmp_path / "float.tif")
