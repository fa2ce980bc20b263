"""Paired augmentation: picture and mask stay together, draws hang on the position alone, resizing is torch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.segmentation.augment import (
    IGNORE,
    PairedAugment,
    PositionDraws,
    distort,
    resized,
    resized_mask,
    saturated,
    scaled_size,
)
from common.errors import UserError

PLAIN = dict(crop=8, scales=[1.0], flip=0.0)


def picture(height=12, width=16, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbered(height=12, width=16):
    """A picture and a mask that both hold the number of the pixel (below 250)."""
    number = torch.arange(height * width).view(height, width).to(torch.uint8)
    return number.expand(3, -1, -1).contiguous(), number


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), rows=st.integers(1, 60), columns=st.integers(1, 60),
    data=st.data(),
)  # fmt: skip
def test_a_window_of_the_resized_pair_is_torchs_resizing_cut(height, width, rows, columns, data):
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    box = (top, left, data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left)))
    cut = (slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3]))
    image = picture(height, width)
    whole = F.interpolate(image[None].double(), size=(rows, columns), mode="bilinear", align_corners=False)[0]
    assert (resized(image, (rows, columns), box).double() - whole[:, *cut]).abs().max() <= 0.5 + 1e-4
    mask = image[0]
    # torch's "nearest-exact" takes the pixel that holds the centre too; centres on a border fall as its rounding says
    nearest = F.interpolate(mask[None, None].double(), size=(rows, columns), mode="nearest-exact")[0, 0]
    tied_rows = torch.tensor([(2 * i + 1) * height % (2 * rows) == 0 for i in range(rows)])
    tied_columns = torch.tensor([(2 * i + 1) * width % (2 * columns) == 0 for i in range(columns)])
    tied = tied_rows[:, None] | tied_columns
    assert ((resized_mask(mask, (rows, columns), box) == nearest[cut]) | tied[cut]).all()


def test_nearest_neighbour_by_hand():
    mask = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    assert resized_mask(mask, (1, 8)).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert resized_mask(mask, (1, 2)).tolist() == [[1, 3]]
    assert resized_mask(mask, (1, 3)).tolist() == [[0, 2, 3]]  # centres 2/3, 2, 10/3


def test_picture_and_mask_are_cut_and_mirrored_together():
    image, mask = numbered()
    augment = PairedAugment(crop=[6, 8], scales=[1.0], flip=0.5)
    seen, mirrors = set(), 0
    for position in range(200):
        cut, classes = augment(image, mask, seed=0, position=position)
        assert cut.shape == (3, 6, 8) and classes.shape == (6, 8) and cut.dtype == classes.dtype == torch.uint8
        assert torch.equal(cut[0], classes)
        top, left = divmod(int(classes[0].min()), 16)
        mirrored = bool(classes[0, 0] > classes[0, 1])
        expected = mask[top : top + 6, left : left + 8]
        assert torch.equal(classes, expected.flip(1) if mirrored else expected)
        seen.add((top, left))
        mirrors += mirrored
    assert {top for top, _ in seen} == set(range(7)) and {left for _, left in seen} == set(range(9))
    assert len(seen) > 55 and 70 < mirrors < 130  # of 63 places and 200 coins


def test_scales_are_all_drawn_and_hit_both():
    image = torch.zeros(3, 10, 10, dtype=torch.uint8)
    image[:, :, 5:] = 200
    mask = (image[0] > 100).to(torch.uint8)
    augment = PairedAugment(crop=20, scales=[0.5, 1.0, 2.0], flip=0.0)
    sizes = []
    for position in range(60):
        cut, classes = augment(image, mask, seed=1, position=position)
        side = int((classes != IGNORE).sum()) ** 0.5
        sizes.append(side)
        inner = classes != IGNORE
        agree = (cut[0] > 100) == (classes == 1)
        assert agree[inner].float().mean() > 0.79  # all but at most one column on the border
    assert set(sizes) == {5.0, 10.0, 20.0}
    assert min(sizes.count(side) for side in (5.0, 10.0, 20.0)) >= 10


def test_padding_is_the_mean_and_void():
    image, mask = picture(5, 6), torch.ones(5, 6, dtype=torch.uint8)
    cut, classes = PairedAugment(**PLAIN)(image, mask, seed=0, position=0)
    assert torch.equal(cut[:, :5, :6], image) and torch.equal(classes[:5, :6], mask)
    assert (classes[5:] == IGNORE).all() and (classes[:, 6:] == IGNORE).all()
    assert cut[:, 7, 7].tolist() == cut[:, 0, 7].tolist() == [124, 116, 104]


def test_draws_hang_on_seed_and_position_alone():
    image, mask = numbered()
    augment = PairedAugment(crop=8)

    def draw(seed, position):
        return augment(image, mask, seed=seed, position=position)[1]

    first = [draw(0, p) for p in range(10)]
    torch.manual_seed(5)
    assert all(torch.equal(draw(0, p), first[p]) for p in reversed(range(10)))
    assert any(not torch.equal(draw(1, p), first[p]) for p in range(10))
    assert len({part.numpy().tobytes() for part in first}) > 5
    # a checkpoint of today must find the same draws years later
    words = PositionDraws(7, 11)
    assert [words.below(1000) for _ in range(4)] == list(GOLDEN)


# PositionDraws(7, 11) when it was written
GOLDEN = (568, 630, 184, 679)


def test_fit_is_mmsegs_rescaling():
    # (2048, 512): the short side becomes 512 unless the long one would exceed 2048
    assert scaled_size((683, 512), 1.0, [2048, 512]) == (683, 512)
    assert scaled_size((300, 400), 2.0, [2048, 512]) == (1024, 1365)
    assert scaled_size((100, 1000), 1.0, [2048, 512]) == (205, 2048)
    assert scaled_size((3, 4), 0.1) == (1, 1)


def test_crops_of_one_class_are_drawn_again():
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 30:] = 1
    image = picture(40, 40)
    shares = {}
    for limit in (None, 0.75):
        augment = PairedAugment(crop=10, scales=[1.0], flip=0.0, max_class_share=limit)
        cuts = [augment(image, mask, seed=0, position=p)[1] for p in range(100)]
        shares[limit] = sum(float(cut.float().mean()) in (0.0, 1.0) for cut in cuts)
    assert shares[None] > 50 and shares[0.75] < 20


def test_photometric_changes_colours_and_leaves_the_mask():
    image, mask = picture(20, 20), torch.ones(20, 20, dtype=torch.uint8)
    plain, bright = (PairedAugment(crop=16, flip=0.0, scales=[1.0], photometric=p) for p in (False, True))
    changed = 0
    for position in range(16):
        a, b = (augment(image, mask, seed=0, position=position) for augment in (plain, bright))
        assert torch.equal(a[1], b[1])
        changed += not torch.equal(a[0], b[0])
    assert changed > 10
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    for position in range(30):  # grey has no hue and no saturation
        out = distort(grey, PositionDraws(0, position))
        assert (out == out[0, 0, 0]).all() and 30 <= int(out[0, 0, 0]) <= 200


def test_saturation_is_hsvs():
    import colorsys

    image = torch.rand(3, 50, 1, generator=torch.Generator().manual_seed(0)) * 255
    for factor in (0.5, 1.0, 1.5):
        ours = saturated(image, factor)
        for pixel, out in zip(image[:, :, 0].T, ours[:, :, 0].T):
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
            expected = colorsys.hsv_to_rgb(h, min(s * factor, 1), v)
            assert out.tolist() == pytest.approx([255 * c for c in expected], abs=0.01)
    assert torch.equal(saturated(torch.zeros(3, 1, 1), 1.5), torch.zeros(3, 1, 1))


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (dict(crop=0), r"data\.augment\.crop must be"),
        (dict(scales=[]), r"data\.augment\.scales is empty"),
        (dict(scales=[1.0, -1.0]), r"data\.augment\.scales must be > 0, got -1\.0"),
        (dict(scales=[2.0, 0.5], continuous=True), r"\[lowest, highest\]"),
        (dict(fit=[512, 2048]), r"data\.augment\.fit must be \[long side, short side\]"),
        (dict(flip=1.5), r"data\.augment\.flip must be >= 0 and <= 1, got 1\.5"),
        (dict(max_class_share=0), r"data\.augment\.max_class_share"),
        (dict(fill=[1, 2]), r"data\.augment\.fill must be three numbers"),
    ],
)
def test_bad_options_are_refused(option, match):
    with pytest.raises(UserError, match=match):
        PairedAugment(**option)
