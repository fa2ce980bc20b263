"""Generated pairs: the ground truth is exact, the sample a function of (seed, number)."""

import pytest
import torch
import torch.nn.functional as F

from common.data.flow.synth import SynthFlow
from common.errors import UserError


@pytest.fixture(scope="module")
def pairs():
    return SynthFlow(size=(96, 128)).load("train")


def errors(first, second, flow, seen):
    """Mean absolute difference of the pictures over the pixels `seen`: second warped by the flow, and as it is."""
    height, width = flow.shape[1:]
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    grid = torch.stack([(x + flow[0] + 0.5) * 2 / width - 1, (y + flow[1] + 0.5) * 2 / height - 1], -1)
    warped = F.grid_sample(second[None].float(), grid[None], align_corners=False, padding_mode="border")[0]
    return [float((other - first.float()).abs().mean(0)[seen].mean()) for other in (warped, second.float())]


def test_ground_truth_is_exact(pairs):
    true, none, half = [], [], []
    for index in range(25):
        pair = pairs.read(index)
        seen = pair["occluded"] == 0
        assert 0.4 < seen.float().mean() <= 1
        assert pair["first"].dtype == torch.uint8 and pair["first"].shape == (3, 96, 128)
        assert pair["valid"].all() and pair["flow"].dtype == torch.float32
        warped, still = errors(pair["first"], pair["second"], pair["flow"], seen)
        true.append(warped)
        none.append(still)
        half.append(errors(pair["first"], pair["second"], pair["flow"] + 0.5, seen)[0])
    true, none, half = (torch.tensor(values) for values in (true, none, half))
    assert true.mean() < 2 and none.mean() > 8 * true.mean()
    assert (half > true).all() and half.mean() > 1.8 * true.mean()  # half a pixel off is seen


def test_flow_of_a_pure_shift_is_that_shift():
    pairs = SynthFlow(size=(32, 48), shift=9, smooth=0, rotation=0, zoom=0, shear=0, layers=0).load("train")
    y, x = torch.meshgrid(torch.arange(32).float(), torch.arange(48).float(), indexing="ij")
    signs = set()
    for index in range(30):
        pair = pairs.read(index)
        u, v = pair["flow"][:, 0, 0]
        assert torch.equal(pair["flow"], torch.stack([u, v]).view(2, 1, 1).expand(2, 32, 48))
        outside = (x + u < 0) | (x + u > 47) | (y + v < 0) | (y + v > 31)
        assert torch.equal(pair["occluded"] > 0, outside)
        signs.add((bool(u > 1), bool(v > 1)))
    assert len(signs) == 4


def test_hidden_pixels_do_look_different():
    pairs = SynthFlow(size=(96, 128), layers=3, layer_shift=15, smooth=0).load("train")
    hidden_error, seen_error = [], []
    for index in range(20):
        pair = pairs.read(index)
        y, x = torch.meshgrid(torch.arange(96).float(), torch.arange(128).float(), indexing="ij")
        px, py = x + pair["flow"][0], y + pair["flow"][1]
        inside = (px >= 0) & (py >= 0) & (px <= 127) & (py <= 95)
        hidden = (pair["occluded"] > 0) & inside
        if hidden.float().mean() > 0.02:
            hidden_error.append(errors(pair["first"], pair["second"], pair["flow"], hidden)[0])
            seen_error.append(errors(pair["first"], pair["second"], pair["flow"], pair["occluded"] == 0)[0])
    assert len(hidden_error) > 5
    assert torch.tensor(hidden_error).mean() > 8 * torch.tensor(seen_error).mean()


def test_depends_on_seed_and_number_alone(pairs):
    again = SynthFlow(size=(96, 128)).load("train")
    later, earlier = again.read(11), again.read(3)
    for index, pair in ((11, later), (3, earlier)):
        assert all(torch.equal(pair[name], pairs.read(index)[name]) for name in pair)
    assert not torch.equal(earlier["flow"], later["flow"])
    assert not torch.equal(SynthFlow(seed=1).load("train").read(3)["flow"], earlier["flow"])
    held_out = SynthFlow().load("held_out")
    assert not torch.equal(held_out.read(3)["flow"], earlier["flow"])
    assert pairs.read(10**12)["first"].shape == (3, 96, 128)


def test_splits_and_their_facts(pairs):
    source = SynthFlow(pairs=7, held_out_pairs=5)
    train, held_out = source.load("train"), source.load("held_out")
    assert (train.endless, len(train), held_out.endless, len(held_out)) == (True, 7, False, 5)
    assert not set(train.photographs.names) & set(held_out.photographs.names)
    assert train.size(0) == (96, 128)
    assert train.fingerprint() == SynthFlow(pairs=7, held_out_pairs=5).load("train").fingerprint()
    assert train.fingerprint() != SynthFlow(pairs=7, held_out_pairs=5, shift=6).load("train").fingerprint()
    source.check("train")
    with pytest.raises(UserError, match="no split 'test'"):
        source.load("test")


def test_long_motion_is_bounded():
    pairs = SynthFlow(size=(32, 48), shift=300, max_flow=20).load("train")
    longest = [float(pairs.read(index)["flow"].square().sum(0).max().sqrt()) for index in range(10)]
    assert max(longest) <= 20.001 and max(longest) > 19.9


def test_a_panning_camera(pairs):
    film = pairs.sequence(2, 5)
    assert film["frames"].shape == (5, 3, 96, 128) and film["flow"].shape == (4, 2, 96, 128)
    assert film["occluded"].shape == (4, 96, 128)
    for t in range(4):
        seen = film["occluded"][t] == 0
        warped, still = errors(film["frames"][t], film["frames"][t + 1], film["flow"][t], seen)
        assert warped < still / 4 and seen.float().mean() > 0.4
    medians = film["flow"].flatten(2).median(2).values  # that of the background
    assert (medians[1:] - medians[:-1]).norm(dim=1).max() < 0.5 * medians.norm(dim=1).min()  # slow change: warm starts
    assert torch.equal(film["frames"], pairs.sequence(2, 5)["frames"])
    assert torch.equal(film["frames"][:3], pairs.sequence(2, 3)["frames"])
    with pytest.raises(UserError, match="frames must be a whole number >= 2, got 1"):
        pairs.sequence(0, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": (8, 128)}, r"source\.size must be \[height, width\], both >= 16"),
        ({"smooth": 5.0}, r"source\.smooth must be <= 3\.2, got 5\.0.*Set source\.spacing=50"),
        ({"shift": -1.0}, r"source\.shift must be >= 0"),
        ({"layers": -1}, r"source\.layers must be a whole number >= 0"),
        ({"max_flow": 0.0}, r"source\.max_flow must be > 0"),
        ({"layer_radius": (0.4, 0.2)}, r"source\.layer_radius must be \[least, most\]"),
        ({"pairs": 0}, r"source\.pairs must be a whole number >= 1"),
        ({"held_out": 1.0}, r"source\.held_out must be >= 0 and < 1"),
    ],
)
def test_wrong_numbers(options, message):
    with pytest.raises(UserError, match=message):
        SynthFlow(**options)
