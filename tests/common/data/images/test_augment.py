"""EDM augmentation: exact where pixels only move, honest labels, no change where nothing was drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.images.augment import MARGIN, SYM6, CropFlip, EdmAugment, RandomResizedCrop, resample
from common.errors import UserError

OFF = dict(xflip=0, yflip=0, scale=0, rotate_frac=0, aniso=0, translate_frac=0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=8, channels=3, size=16, seed=5):
    return torch.rand(count, channels, size, size, generator=rng(seed)) * 2 - 1


def inner(x, border=MARGIN):
    return x[..., border:-border, border:-border]


def affine(linear, offset=(0.0, 0.0), count=8):
    matrix = torch.eye(3)
    matrix[:2, :2], matrix[:2, 2] = torch.tensor(linear), torch.tensor(offset)
    return matrix.expand(count, 3, 3)


def test_the_filter_is_orthonormal_to_its_even_shifts():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    assert abs(taps.sum() - math.sqrt(2)) < 1e-9
    for shift in range(0, len(SYM6), 2):
        assert abs(taps[shift:] @ taps[: len(SYM6) - shift] - float(shift == 0)) < 1e-9


def test_p_zero_is_the_identity_with_zero_labels():
    x = images()
    y, labels = EdmAugment(p=0)(x, rng())
    assert torch.equal(x, y)
    assert labels.shape == (8, 9) and labels.dtype == torch.float32 and not labels.any()


def test_the_papers_choice_has_nine_labels_and_flips_half():
    augment = EdmAugment()
    assert augment.label_dim == 9
    _, labels = augment(images(4000, 1, 8), rng())
    assert 0.46 < labels[:, 0].mean() < 0.54  # xflip: always allowed, a fair coin
    assert 0.04 < labels[:, 1].mean() < 0.08  # yflip: 0.12 / 2
    for column in (2, 3, 5, 7):  # zoom, rotation, stretch, shift: 0.12 each
        assert 0.10 < labels[:, column].ne(0).float().mean() < 0.14


@pytest.mark.parametrize(("name", "axis"), [("xflip", 3), ("yflip", 2)])
def test_flips_are_exact(name, axis):
    x = images(32)
    y, labels = EdmAugment(**{**OFF, "p": 1, name: 1})(x, rng())
    flipped = labels[:, 0] == 1
    assert 0 < flipped.sum() < 32
    assert torch.equal(y[flipped], x[flipped].flip(axis)) and torch.equal(y[~flipped], x[~flipped])


def test_quarter_turns_are_exact():
    x = images(64)
    y, labels = EdmAugment(**OFF, p=1, rotate_int=1)(x, rng())
    turns = {(0.0, 0.0): 0, (1.0, 0.0): 1, (1.0, 1.0): 2, (0.0, 1.0): 3}
    seen = set()
    for image, turned, label in zip(x, y, labels):
        number = turns[tuple(label.tolist())]
        seen.add(number)
        assert torch.equal(turned, torch.rot90(image, number, (1, 2))), number
    assert seen == {0, 1, 2, 3}


def test_whole_pixel_shifts_are_exact():
    x = images(64)
    y, labels = EdmAugment(**OFF, p=1, translate_int=1, translate_int_max=0.25)(x, rng())
    shifts = (labels * 4).round().long()
    assert shifts.abs().max() == 4
    for image, moved, (dx, dy) in zip(x, y, shifts.tolist()):
        # to the right by dx and up by dy
        expected = image.roll((-dy, dx), (1, 2))
        assert torch.equal(inner(moved, 4), inner(expected, 4))


def test_resampling_by_the_identity_gives_the_image_back():
    x = images()
    assert torch.allclose(resample(x, affine([[1.0, 0.0], [0.0, 1.0]])), x, atol=2e-5)


def test_resampling_knows_its_directions():
    x = F.interpolate(images(size=4), scale_factor=4, mode="bicubic")  # smooth: the filter is not quite symmetric
    turned = resample(x, affine([[0.0, -1.0], [1.0, 0.0]]))
    distance = [inner(turned - torch.rot90(x, number, (2, 3))).abs().mean() for number in range(4)]
    assert distance[1] < 0.03 and min(distance[0], distance[2], distance[3]) > 0.2
    x = images()
    shifted = resample(x, affine([[1.0, 0.0], [0.0, 1.0]], offset=(2.0, -3.0)))
    assert torch.allclose(inner(shifted), inner(x.roll((3, -2), (2, 3))), atol=2e-5)


def test_a_smooth_picture_is_zoomed_to_what_the_formula_says():
    size, zoom = 32, 1.25
    axis = torch.arange(size) - (size - 1) / 2
    wave = lambda scale: (torch.cos(0.3 * axis / scale)[:, None] * torch.sin(0.2 * axis / scale))[None, None]
    zoomed = resample(wave(1.0), affine([[1 / zoom, 0.0], [0.0, 1 / zoom]], count=1))
    assert torch.allclose(inner(zoomed), inner(wave(zoom)), atol=0.02)


def test_untouched_images_pass_bit_for_bit():
    x = images(64)
    y, labels = EdmAugment(**{**OFF, "p": 0.3, "scale": 1, "translate_frac": 1})(x, rng())
    still = (labels == 0).all(dim=1)
    assert 0 < still.sum() < 64
    assert torch.equal(y[still], x[still])
    assert ((y[~still] - x[~still]).flatten(1).abs().amax(dim=1) > 0).all()


def test_labels_state_the_warp():
    x = images(16)
    for name, to_matrix in (
        ("scale", lambda l: torch.diag(torch.exp2(torch.stack([-0.2 * l[0], -0.2 * l[0], torch.tensor(0.0)])))),
        ("rotate_frac", lambda l: torch.stack([l[0] + 1, -l[1], l[0] * 0, l[1], l[0] + 1, l[0] * 0, *torch.eye(3)[2]])),
    ):
        y, labels = EdmAugment(**{**OFF, "p": 1, name: 1})(x, rng())
        inverse = torch.stack([to_matrix(label).reshape(3, 3) for label in labels])
        assert torch.allclose(y, resample(x, inverse), atol=2e-5), name


def test_colour_closed_forms():
    x = images(16)
    column = lambda values: values[:, None, None, None]
    y, labels = EdmAugment(**OFF, p=1, brightness=1)(x, rng())
    assert torch.allclose(y, x + 0.2 * column(labels[:, 0]), atol=1e-6)
    y, labels = EdmAugment(**OFF, p=1, contrast=1)(x, rng())
    assert torch.allclose(y, x * column(torch.exp2(0.5 * labels[:, 0])), atol=1e-5)
    grey = x.mean(dim=1, keepdim=True)
    y, labels = EdmAugment(**OFF, p=1, lumaflip=1)(x, rng())
    assert torch.allclose(y, x - 2 * grey * column(labels[:, 0]), atol=1e-6)
    y, labels = EdmAugment(**OFF, p=1, saturation=1)(x, rng())
    assert torch.allclose(y, grey + (x - grey) * column(torch.exp2(labels[:, 0])), atol=1e-5)
    y, labels = EdmAugment(**OFF, p=1, hue=1)(x, rng())
    assert torch.allclose(y.mean(1), x.mean(1), atol=1e-6)  # a hue rotation keeps the luma and the colour's strength
    assert torch.allclose(y.square().sum(1), x.square().sum(1), atol=1e-5)
    assert torch.allclose((labels[:, 0] + 1) ** 2 + labels[:, 1] ** 2, torch.ones(16))


def test_grey_images_take_colour_changes():
    x = images(8, channels=1)
    y, labels = EdmAugment(**OFF, p=1, brightness=1, contrast=1)(x, rng())
    gain = torch.exp2(0.5 * labels[:, 1])[:, None, None, None]
    assert torch.allclose(y, (x + 0.2 * labels[:, 0, None, None, None]) * gain, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(world=st.integers(1, 4), seed=st.integers(0, 1000))
def test_processes_share_one_draw(world, seed):
    x = images(4 * world, 1, 8)
    augment = EdmAugment(p=0.5, rotate_int=1, translate_int=1)
    joint, labels = augment(x, rng(seed))
    parts = [augment(part, rng(seed), rank=r, world_size=world) for r, part in enumerate(x.chunk(world))]
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert torch.allclose(torch.cat([part for part, _ in parts]), joint, atol=2e-5)


def test_same_generator_same_result_and_global_stream_untouched():
    before = torch.get_rng_state()
    first, second = (EdmAugment()(images(), rng(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(before, torch.get_rng_state())


def test_no_transformation_gives_an_empty_label():
    x = images()
    y, labels = EdmAugment(**OFF)(x)
    assert torch.equal(x, y) and labels.shape == (8, 0) and EdmAugment(**OFF).label_dim == 0


def test_negative_probability_is_refused():
    with pytest.raises(UserError, match=r"augment\.p must be >= 0, got -0\.1"):
        EdmAugment(p=-0.1)
    with pytest.raises(UserError, match=r"augment\.scale must be >= 0"):
        EdmAugment(scale=float("nan"))


# Classifiers ----------------------------------------------------------------------------------------------------------


def test_crop_flip_gives_every_shift_and_mirror_image_and_nothing_else():
    x = images(1, 3, 6)
    padded = F.pad(x, [2] * 4, value=-1.0)
    windows = {}
    for top in range(5):
        for left in range(5):
            window = padded[0, :, top : top + 6, left : left + 6]
            windows[window.numpy().tobytes()] = (top, left, False)
            windows[window.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    assert len(windows) == 50
    y, labels = CropFlip(padding=2)(x.expand(2000, -1, -1, -1), rng())
    assert labels.shape == (2000, 0) and y.shape == (2000, 3, 6, 6)
    seen = [windows[image.contiguous().numpy().tobytes()] for image in y]  # KeyError: not one of them
    assert len(set(seen)) == 50
    assert 0.45 < sum(mirrored for _, _, mirrored in seen) / 2000 < 0.55


def test_crop_flip_switched_off_is_the_identity():
    x = images()
    y, _ = CropFlip(padding=0, flip=0)(x, rng())
    assert torch.equal(x, y)
    z, _ = CropFlip(padding=0, flip=1)(x, rng())
    assert torch.equal(x.flip(3), z)


@pytest.mark.parametrize("augment", [CropFlip(), RandomResizedCrop(size=12)], ids=["crop_flip", "resized"])
def test_two_processes_crop_as_one(augment):
    x = images(8)
    whole, _ = augment(x, rng(3))
    halves = [augment(x[4 * r : 4 * r + 4], rng(3), rank=r, world_size=2)[0] for r in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, augment(x, rng(4))[0])


def test_resized_crop_of_everything_is_a_plain_resize():
    x = images(4, 3, 8)
    y, labels = RandomResizedCrop(size=16, area=(1, 1), ratio=(1, 1), flip=0)(x, rng())
    assert labels.shape == (4, 0)
    torch.testing.assert_close(y, F.interpolate(x, size=16, mode="bilinear", align_corners=False))
    z, _ = RandomResizedCrop(size=16, area=(1, 1), ratio=(1, 1), flip=1)(x, rng())
    torch.testing.assert_close(z, y.flip(3))


def test_resized_crop_keeps_area_ratio_and_place():
    """On pictures of their own coordinates a crop shows the box it was cut from."""
    size, count = 64, 3000
    centres = (torch.arange(size) + 0.5) / size
    x = torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])[None].expand(count, -1, -1, -1)
    y, _ = RandomResizedCrop(size=32, area=(0.1, 0.6), ratio=(0.8, 1.25), flip=0)(x, rng())
    # away from the border, where sampling is clamped, neighbouring pixels differ by the side of the box / 32
    width = (y[:, 0, 16, 20] - y[:, 0, 16, 11]) * 32 / 9
    height = (y[:, 1, 20, 16] - y[:, 1, 11, 16]) * 32 / 9
    area, ratio = width * height, width / height
    assert area.min() > 0.099 and area.max() < 0.601 and 0.33 < area.mean() < 0.37
    assert ratio.min() > 0.79 and ratio.max() < 1.26
    assert 0.08 < ratio.log().std() < 0.15  # log-uniform on +-0.223: 0.129
    left = (y[:, 0, 16, 15] + y[:, 0, 16, 16] - width) / 2
    assert left.min() > -1e-3 and (left + width).max() < 1 + 1e-3
    assert 0.4 < (left / (1 - width)).mean() < 0.6


def test_resized_crop_takes_the_whole_picture_when_no_box_fits():
    x = images(3, 1, 8)
    y, _ = RandomResizedCrop(size=8, area=(1, 1), ratio=(2, 2), flip=0)(x, rng())
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(padding=-1), "augment.padding must be a whole number >= 0, got -1"),
        (lambda: CropFlip(flip=1.5), r"augment.flip must be >= 0 and <= 1, got 1.5"),
        (lambda: RandomResizedCrop(size=0), "augment.size must be a whole number >= 1, got 0"),
        (lambda: RandomResizedCrop(size=8, area=(0.5, 0.1)), "augment.area must be two rising numbers"),
        (lambda: RandomResizedCrop(size=8, ratio=(0, 1)), "augment.ratio must be two rising numbers above 0"),
    ],
)
def test_wrong_crops_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
