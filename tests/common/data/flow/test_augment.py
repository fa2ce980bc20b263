"""Augmentation of flow: the released code's outputs, and what must hold whatever is drawn."""

import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as colour

from common.data.draws import PositionDraws
from common.data.flow.augment import (
    ColourAugment,
    DenseAugment,
    SparseAugment,
    erased,
    jittered,
    resample,
    resample_sparse,
)
from common.errors import UserError

H, W = 96, 128


def draws(position, seed=0):
    return PositionDraws(seed, position, "flow augmentation")


def ramp():
    """Made of whole-number ramps, so that tests/fixtures/data/flow_augment.json can be made anew."""
    y, x = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
    image = torch.stack([(3 * x + y) % 256, (2 * y + x) % 256, (x * y) % 256]).to(torch.uint8)
    return {
        "first": image, "second": image.flip(1), "flow": torch.stack([x / 8 - y / 16, 4 - y / 8]),
        "valid": torch.ones(H, W),
    }  # fmt: skip


def moving(size=(160, 224)):
    """A smooth picture and its shift by a linear flow: first(x) = second(x + flow(x))."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    flow = torch.stack([6 + 0.02 * x - 0.03 * y, -4 + 0.01 * x + 0.02 * y])

    def picture(x, y):
        waves = [torch.sin(x / 9 + y / 14), torch.sin(y / 8 - x / 17), torch.cos(x / 11) * torch.sin(y / 12)]
        return (128 + 100 * torch.stack(waves)).round().to(torch.uint8)

    return {
        "first": picture(x + flow[0], y + flow[1]), "second": picture(x, y), "flow": flow,
        "valid": torch.ones(height, width),
    }  # fmt: skip


def photometric_error(sample, flow):
    """Mean absolute difference of the first picture and the second warped by `flow`, where that lies inside."""
    height, width = flow.shape[1:]
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    px, py = x + flow[0], y + flow[1]
    grid = torch.stack([(px + 0.5) * 2 / width - 1, (py + 0.5) * 2 / height - 1], -1)
    warped = F.grid_sample(sample["second"][None].float(), grid[None], align_corners=False)[0]
    inside = (px >= 0) & (py >= 0) & (px <= width - 1) & (py <= height - 1) & (sample["valid"] > 0)
    return float((warped - sample["first"].float()).abs().mean(0)[inside].mean())


def test_outputs_are_the_released_codes(repo):
    cases = json.loads((repo / "tests" / "fixtures" / "data" / "flow_augment.json").read_text())["cases"]
    options = dict(crop=(16, 24), min_scale=-0.4, max_scale=0.8, flip=True, photometric=False)
    for case in cases:
        kind = DenseAugment if case["kind"] == "dense" else SparseAugment
        sample = ramp()
        if case["kind"] == "sparse":
            y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
            sample["valid"] = ((x + 2 * y) % 3 == 0).float()
        made = kind(**options)(PositionDraws(7, case["position"], "golden"), sample)
        for name in ("first", "second"):
            expected = torch.tensor(case[name]).permute(2, 0, 1)
            assert (made[name][:, ::7, ::5].int() - expected).abs().max() <= 1
        expected = torch.tensor(case["flow"]).permute(2, 0, 1)
        assert torch.allclose(made["flow"][:, ::7, ::5], expected, atol=2e-4)
        if case["kind"] == "sparse":
            assert made["valid"].tolist() == case["valid"]


@pytest.mark.parametrize("kind", [DenseAugment, SparseAugment])
@pytest.mark.parametrize("position", range(12))
def test_the_augmented_flow_still_matches_the_pictures(kind, position):
    augment = kind(crop=(64, 96), min_scale=-0.4, max_scale=0.6, flip=True, photometric=False, eraser=False)
    made = augment(draws(position), moving())
    assert made["first"].shape == made["second"].shape == (3, 64, 96) and made["first"].dtype == torch.uint8
    assert made["flow"].shape == (2, 64, 96) and made["valid"].shape == (64, 96)
    assert photometric_error(made, made["flow"]) < 2.5
    assert photometric_error(made, 0 * made["flow"]) > 12


def test_flow_scales_with_the_picture_and_mirrors_negate():
    sample = {**moving(), "flow": torch.tensor([3.0, -5.0]).view(2, 1, 1).expand(2, 160, 224).contiguous()}
    signs, scales = set(), set()
    for position in range(60):
        augment = DenseAugment(crop=(64, 96), min_scale=-0.4, max_scale=0.6, photometric=False, eraser=False)
        u, v = augment(draws(position), sample)["flow"].mean((1, 2)).tolist()
        signs.add((u > 0, v > 0))
        scales.add(round(abs(u) / 3, 3))
        assert 2**-0.6 - 1e-3 < abs(u) / 3 < 2**0.8 + 1e-3 and 2**-0.6 - 1e-3 < abs(v) / 5 < 2**0.8 + 1e-3
    assert len(signs) == 4 and 1.0 in scales and len(scales) > 30
    still = DenseAugment(crop=(64, 96), min_scale=-0.4, max_scale=0.6, flip=False)
    assert all((still(draws(p), sample)["flow"][0] > 0).all() for p in range(10))


def test_sparse_pairs_are_never_stretched_and_mirrored_left_and_right_only():
    flow = torch.tensor([3.0, -5.0]).view(2, 1, 1).expand(2, 160, 224).contiguous()
    valid = (torch.rand(160, 224) < 0.2).float()
    sample = {**moving(), "flow": flow * valid, "valid": valid}
    mirrored = 0
    for position in range(30):
        made = SparseAugment(crop=(64, 96), flip=True)(draws(position), sample)
        known = made["valid"] > 0
        u, v = made["flow"][0][known], made["flow"][1][known]
        assert 0.03 < known.float().mean() < 0.4 and not made["flow"][:, ~known].any()
        assert torch.allclose(u.abs() / 3, -v / 5) and len(u.unique()) == 1
        mirrored += bool(u[0] < 0)
    assert 5 < mirrored < 25


def test_small_pairs_are_enlarged_and_each_crop_size_works():
    small = {name: value[..., :60, :70] for name, value in moving().items()}
    for kind in (DenseAugment, SparseAugment):
        for position in range(8):
            made = kind(crop=(64, 96), min_scale=-1, max_scale=-0.5)(draws(position), small)
            assert made["first"].shape == (3, 64, 96)


@pytest.mark.parametrize("kind, spare", [(DenseAugment, 8), (SparseAugment, 1)])
def test_the_least_size(kind, spare):
    flow = torch.tensor([3.0, -5.0]).view(2, 1, 1).expand(2, 60, 70).contiguous()
    small = {**{name: value[..., :60, :70] for name, value in moving().items()}, "flow": flow}
    made = kind(crop=(64, 96), min_scale=-2, max_scale=-2, flip=False, photometric=False)(draws(0), small)
    u, v = (made["flow"][i][made["valid"] > 0] for i in range(2))
    least = (96 + spare) / 70
    assert torch.allclose(u, torch.tensor(3 * least)) and torch.allclose(v, torch.tensor(-5 * least))


def test_sparse_pixels_never_move_into_the_first_row_or_column():
    flow, valid = torch.ones(2, 10, 12), torch.ones(10, 12)
    made, known = resample_sparse(flow, valid, (1.5, 1.5), (0, 0, 15, 18), (15, 18))
    assert not known[0].any() and not known[:, 0].any()
    assert known[2, 2] == 1 and known.sum() == 9 * 11 and torch.equal(made, 1.5 * known.expand(2, 15, 18))
    same, all_known = resample_sparse(flow, valid, (1.0, 1.0), (0, 0, 10, 12), (10, 12))
    assert torch.equal(same, flow) and all_known.all()


def test_dense_validity():
    sample = moving()
    sample["valid"][:, :100] = 0
    sample["flow"][0, :, 150] = 1e5
    made = DenseAugment(crop=(64, 96), photometric=False, flip=False)(draws(3), sample)
    assert set(made["valid"].unique().tolist()) == {0.0, 1.0}
    assert (made["flow"].abs().amax(0)[made["valid"] > 0] < 1000).all()


def test_depends_on_the_draws_alone():
    augment, sample = DenseAugment(crop=(64, 96)), moving()
    kept = {name: value.clone() for name, value in sample.items()}
    one, again, other = (augment(draws(p), sample) for p in (4, 4, 5))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["first"], other["first"])
    assert all(torch.equal(sample[name], kept[name]) for name in sample)  # the sample itself is left alone


def test_colours_alike_or_each_by_itself():
    image = moving()["second"]
    same = [torch.equal(*jittered(image, image, draws(p), (0.4, 0.4, 0.4, 0.1), 0.2)) for p in range(40)]
    assert 22 < sum(same) < 40
    assert all(torch.equal(*jittered(image, image, draws(p), (0.4, 0.4, 0.4, 0.1), 0)) for p in range(5))
    alike = {**moving(), "first": image}
    made = [ColourAugment(eraser=False)(draws(p), alike) for p in range(40)]
    assert 22 < sum(torch.equal(each["first"], each["second"]) for each in made) < 40
    only = [jittered(image, image, draws(p), (0.4, 0, 0, 0), 0)[0] for p in range(5)]
    means = torch.tensor([float(x.float().mean() / image.float().mean()) for x in only])
    assert means.min() > 0.58 and means.max() < 1.42 and means.std() > 0.05
    dark = colour.adjust_brightness(image, 0.6)
    assert (dark.float().mean() / image.float().mean() - 0.6).abs() < 0.02


def test_eraser_takes_rectangles_of_the_second_picture():
    image = moving()["first"]
    mean = image.float().mean((1, 2)).to(torch.uint8)
    shares = []
    for position in range(40):
        changed = (erased(image, draws(position)) != image).any(0)
        shares.append(float(changed.float().mean()))
        if changed.any():
            assert torch.equal(erased(image, draws(position))[:, changed].unique(dim=1)[:, 0], mean)
    assert 8 < sum(share == 0 for share in shares) < 32
    assert max(shares) < 2 * 99 * 99 / (160 * 224)
    made = ColourAugment(photometric=False)(draws(1), moving())
    assert torch.equal(made["first"], moving()["first"]) and torch.equal(made["flow"], moving()["flow"])


def test_resample_is_torchs_resizing_by_factors():
    image = torch.rand(3, 40, 50) * 255
    whole = F.interpolate(
        image[None], scale_factor=(1.37, 0.81), mode="bilinear", align_corners=False, recompute_scale_factor=False
    )[0]
    assert torch.allclose(resample(image, (1.37, 0.81), (5, 3, 40, 30)), whole[:, 5:45, 3:33], atol=2e-2)
    assert resample(image.to(torch.uint8), (1.37, 0.81), (5, 3, 40, 30)).dtype == torch.uint8


@pytest.mark.parametrize("kind", [DenseAugment, SparseAugment])
def test_wrong_numbers(kind):
    with pytest.raises(UserError, match=r"data\.crop must be \[height, width\]"):
        kind(crop=(64,))
    with pytest.raises(UserError, match=r"augment\.min_scale must be <= 0\.1, got 0\.5"):
        kind(crop=(64, 64), min_scale=0.5, max_scale=0.1)
    with pytest.raises(UserError, match=r"erased_side must be \[shortest, longest\)"):
        ColourAugment(erased_side=(5, 5))
