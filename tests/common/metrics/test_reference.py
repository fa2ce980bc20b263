"""Reference images and their cached statistics."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.metrics.features import Pixels
from common.metrics.fid import GaussianStatistics
from common.metrics.reference import (
    FolderImages,
    SplitImages,
    StatisticsFile,
    TensorImages,
    compute_statistics,
    first,
    reference_hash,
    reference_statistics,
)


def some_images(n, seed=0, channels=1, size=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=g).to(torch.uint8)


class CountingPixels(Pixels):
    calls = 0

    def __call__(self, images):
        self.calls += 1
        return super().__call__(images)


@pytest.fixture
def reference():
    return TensorImages(images=some_images(20), name="toy/train")


def test_first_cuts_and_stops_reading():
    read = []

    def batches():
        for k in range(5):
            read.append(k)
            yield torch.full((4, 1), k)

    assert [len(b) for b in first(batches(), 6)] == [4, 2] and read == [0, 1]
    assert sum(len(b) for b in first(batches(), None)) == 20


def test_statistics_are_computed_once_and_carry_their_record(reference, tmp_path):
    extractor = CountingPixels(channels=1, resolution=3)
    one = reference_statistics(reference, extractor, cache_dir=tmp_path, batch_size=7)
    assert extractor.calls == 3
    two = reference_statistics(reference, extractor, cache_dir=tmp_path, batch_size=5)
    assert extractor.calls == 3
    assert torch.equal(one.scatter, two.scatter) and one.record == two.record
    features = reference._images.double().flatten(1) / 127.5 - 1
    torch.testing.assert_close(one.cov(), torch.cov(features.T), rtol=1e-6, atol=1e-8)
    assert one.record["n"] == 20 and one.record["dataset"] == "toy/train"
    assert one.record["extractor"] == "pixels" and one.record["extractor_hash"] == extractor.hash
    (path,) = tmp_path.iterdir()
    for part in ("toy-train", reference.fingerprint, extractor.hash, "edm"):
        assert part in path.name


def test_other_data_or_rounding_gets_another_file(reference, tmp_path):
    extractor = Pixels(channels=1, resolution=3)
    reference_statistics(reference, extractor, cache_dir=tmp_path)
    reference_statistics(reference, extractor, cache_dir=tmp_path, rounding="floor255")
    other = TensorImages(images=some_images(20, seed=1), name="toy/train")
    reference_statistics(other, extractor, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert reference_hash(other, extractor, "edm") != reference_hash(reference, extractor, "edm")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped"])
def test_damaged_cache_is_computed_again_with_a_warning(reference, tmp_path, damage):
    extractor = CountingPixels(channels=1, resolution=3)
    good = reference_statistics(reference, extractor, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:200])
    elif damage == "flipped":
        data[300] ^= 0x10
        path.write_bytes(data)
    else:  # intact in itself, but of other images
        compute_statistics(TensorImages(images=some_images(9), name="x"), extractor).save(path)
    calls = extractor.calls
    with pytest.warns(UserWarning, match="again"):
        again = reference_statistics(reference, extractor, cache_dir=tmp_path)
    assert extractor.calls == calls + 1
    assert torch.equal(again.scatter, good.scatter)
    assert GaussianStatistics.load(path).digest() == good.digest()


def test_split_of_a_data_module():
    images = some_images(10)
    asked = []

    def fingerprint(split):
        asked.append(split)
        return "abc"

    data = types.SimpleNamespace(
        name="toy", fingerprint=fingerprint, reference_images=lambda split, batch_size: images.split(batch_size)
    )
    whole, part = SplitImages(data=data), SplitImages(data=data, split="test", limit=7)
    assert not asked  # making one must not touch the data
    assert (whole.name, whole.fingerprint) == ("toy/train", "abc")
    assert part.name == "toy/test[:7]" and part.fingerprint not in ("abc", SplitImages(data=data, limit=6).fingerprint)
    assert torch.equal(torch.cat(list(part.images(4))), images[:7])
    with pytest.raises(UserError, match=r"limit must be a whole number >= 1, got 0"):
        SplitImages(data=data, limit=0)


def test_the_real_data_module_fits():
    from common.data.images.digits import Digits, digits_split
    from common.data.images.module import ImageDataModule

    reference = SplitImages(data=ImageDataModule(source=Digits()), split="test")
    assert reference.name == "digits/test" and len(reference.fingerprint) == 16
    assert torch.equal(torch.cat(list(reference.images(100))), torch.as_tensor(digits_split()[2]))


def write_pictures(folder, n=5, size=4):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    for k in range(n):
        Image.fromarray(pixels[k]).save(folder / f"{k:03d}.png")
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def test_folder_in_order_with_a_fingerprint_of_the_pixels(tmp_path):
    pixels = write_pictures(tmp_path / "made")
    reference = FolderImages(path=tmp_path / "made")
    assert torch.equal(torch.cat(list(reference.images(2))), pixels) and reference.name == "made"
    assert torch.equal(torch.cat(list(FolderImages(path=tmp_path / "made", limit=3).images(2))), pixels[:3])
    before = reference.fingerprint
    assert FolderImages(path=tmp_path / "made", limit=3).fingerprint != before
    changed = Image.open(tmp_path / "made" / "002.png")
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(tmp_path / "made" / "002.png")
    assert FolderImages(path=tmp_path / "made").fingerprint != before


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"Pictures of folder not found: .*nowhere does not exist"):
        FolderImages(path=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no pictures"):
        FolderImages(path=tmp_path / "empty")
    write_pictures(tmp_path / "made")
    (tmp_path / "made" / "003.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"003\.png"):
        list(FolderImages(path=tmp_path / "made").images(2))
    (tmp_path / "made" / "000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"000\.png, cannot be read \(it is no picture"):
        FolderImages(path=tmp_path / "made")


def test_statistics_in_a_file_stand_for_the_images(reference, tmp_path):
    """Those of tools.fid_ref exactly; mu and sigma to rounding, whatever the divisor."""
    pixels = Pixels(channels=1, resolution=3)
    own = compute_statistics(reference, pixels)
    own.save(tmp_path / "own.npz")
    file = StatisticsFile(path=tmp_path / "own.npz")
    found = reference_statistics(file, pixels, cache_dir=tmp_path / "cache")
    assert found.n == 20 and torch.equal(found.scatter, own.scatter) and not (tmp_path / "cache").exists()
    assert file.name == "own.npz" and len(file.fingerprint) == 16
    np.savez(tmp_path / "published.npz", mu=own.mean.numpy(), sigma=own.cov(1).numpy())
    found = reference_statistics(StatisticsFile(path=tmp_path / "published.npz"), pixels, cache_dir=tmp_path)
    np.savez(tmp_path / "prefixed.npz", ref_mu=own.mean.numpy(), ref_sigma=own.cov(1).numpy())
    same = StatisticsFile(path=tmp_path / "prefixed.npz").statistics(pixels, "edm")
    assert torch.equal(same.scatter, found.scatter)
    for ddof in (0, 1):
        torch.testing.assert_close(found.cov(ddof), own.cov(1), rtol=1e-9, atol=0)
    assert torch.equal(found.mean, own.mean) and found.record["n"] is None


def test_statistics_that_do_not_fit_are_refused(reference, tmp_path):
    pixels = Pixels(channels=1, resolution=3)
    compute_statistics(reference, pixels).save(tmp_path / "own.npz")
    file = StatisticsFile(path=tmp_path / "own.npz")
    with pytest.raises(UserError, match="measured with rounding edm, this evaluation has floor255"):
        file.statistics(pixels, "floor255")
    with pytest.raises(UserError, match="measured with extractor_hash"):
        file.statistics(Pixels(channels=1, resolution=4), "edm")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="features of width 5, but those of pixels have 9"):
        StatisticsFile(path=tmp_path / "wide.npz").statistics(pixels, "edm")
    with pytest.raises(UserError, match="precision and recall need images"):
        file.images(10)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"cut\.npz is no"):
        StatisticsFile(path=tmp_path / "cut.npz").statistics(pixels, "edm")
    with pytest.raises(UserError, match=r"no reference statistics at .*gone\.npz"):
        StatisticsFile(path=tmp_path / "gone.npz")
