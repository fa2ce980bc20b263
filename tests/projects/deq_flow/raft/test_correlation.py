"""The lookup against direct dot products and against torch's own bilinear sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from projects.deq_flow.raft.correlation import AllPairs, OnDemand, window
from projects.deq_flow.raft.network import grid

B, D, H, W = 2, 6, 9, 13


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(B, D, H, W, dtype=torch.float64), torch.randn(B, D, H, W, dtype=torch.float64)


def moved(scale=3.0, dtype=torch.float64):
    return grid(B, H, W, dtype=dtype) + scale * torch.randn(B, 2, H, W, dtype=dtype)


def test_at_whole_coordinates_the_samples_are_dot_products_x_slow(maps):
    first, second = maps
    coords = grid(B, H, W, dtype=torch.float64) + torch.randint(-4, 5, (B, 2, H, W))
    lookup = AllPairs(levels=1, radius=2)
    found = lookup(lookup.prepare(first, second), coords).unflatten(1, (5, 5))
    for i, j, b, y, x in ((0, 0, 0, 4, 6), (3, 1, 1, 2, 5), (4, 0, 0, 7, 3), (2, 2, 1, 5, 8), (1, 4, 0, 0, 0)):
        column, row = (coords[b, :, y, x] + torch.tensor([i - 2, j - 2])).long().tolist()
        inside = 0 <= column < W and 0 <= row < H
        expected = first[b, :, y, x] @ second[b, :, row, column] / math.sqrt(D) if inside else 0.0
        assert found[b, i, j, y, x] == pytest.approx(float(expected), abs=1e-12)


def test_without_motion_the_centre_channel_is_the_self_correlation(maps):
    first, _ = maps
    lookup = AllPairs(levels=2, radius=4)
    found = lookup(lookup.prepare(first, first), grid(B, H, W, dtype=torch.float64))
    torch.testing.assert_close(found[:, 40], first.square().sum(1) / math.sqrt(D))


def test_the_levels_are_means_of_the_volume(maps):
    first, second = maps
    volume = torch.einsum("bdp,bdx->bpx", first.flatten(2), second.flatten(2)) / math.sqrt(D)
    for level, found in enumerate(AllPairs(levels=4).prepare(first, second)):
        expected = F.avg_pool2d(volume.unflatten(2, (H, W)), 2**level)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_between_pixels_and_outside_it_samples_as_torch_does(maps, scale):
    volume = torch.randn(B, H * W, H, W, dtype=torch.float64)
    coords = moved(scale).flatten(2)
    offset = torch.arange(-3.0, 4.0, dtype=torch.float64)
    delta = torch.stack(torch.meshgrid(offset, offset, indexing="ij"))  # x slow
    points = coords.permute(0, 2, 1)[..., None, None] + delta  # (B, P, 2, 7, 7)
    size = torch.tensor([W - 1, H - 1], dtype=torch.float64)
    where = (2 * points.movedim(2, -1) / size - 1).flatten(0, 1)
    expected = F.grid_sample(volume.flatten(0, 1).unsqueeze(1), where, align_corners=True)
    torch.testing.assert_close(window(volume, coords, 3), expected.view(B, H * W, 49).transpose(1, 2))


def test_a_level_of_one_pixel_and_points_far_away_give_zeros_not_nan():
    volume = torch.ones(1, 3, 1, 1)
    points = torch.tensor([[[0.25, 1e30, -1e9], [0.0, 0.0, 0.0]]])
    found = window(volume, points, 1)
    assert found.abs().sum(1).tolist() == [[1.0, 0.0, 0.0]] and found[0, 4, 0] == 0.75


def test_gradients_to_volume_and_coordinates():
    torch.manual_seed(1)
    volume = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(1, 2, 3, dtype=torch.float64) * 0.8 + 0.1 + torch.tensor([0.0, 2.0, 4.0])).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, p: window(v, p, 1), (volume, points))


def test_tangents_of_the_coordinates(maps):
    lookup = AllPairs(levels=2, radius=1)
    pyramid = lookup.prepare(*maps)
    coords, direction = moved(), torch.randn(B, 2, H, W, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda c: lookup(pyramid, c), (coords,), (direction,))
    step = 1e-7
    expected = (lookup(pyramid, coords + step * direction) - lookup(pyramid, coords - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_on_demand_gives_the_same_numbers_and_gradients(maps, rows):
    coords = moved().requires_grad_()
    weight = torch.randn(B, 2 * 25, H, W, dtype=torch.float64)
    results = []
    for lookup in (AllPairs(levels=2, radius=2), OnDemand(levels=2, radius=2, chunk=rows * B * H * W)):
        leaves = [t.clone().requires_grad_() for t in maps]
        found = lookup(lookup.prepare(*leaves), coords)
        results.append([found, *torch.autograd.grad((found * weight).sum(), [*leaves, coords])])
    for dense, demanded in zip(*results, strict=True):
        torch.testing.assert_close(dense, demanded)


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_on_demand_never_holds_the_volume():
    torch.manual_seed(0)
    first, second = (torch.randn(1, 4, 24, 32, requires_grad=True) for _ in range(2))
    coords = grid(1, 24, 32) + 0.3
    sizes = {}
    for name, lookup in (("dense", AllPairs(2, 1)), ("demand", OnDemand(2, 1, chunk=2**14))):
        with Largest() as seen:
            lookup(lookup.prepare(first, second), coords).sum().backward()
        sizes[name] = seen.size
    assert sizes["dense"] == (24 * 32) ** 2
    assert sizes["demand"] <= 2**14 < (24 * 32) ** 2 / 30


@pytest.mark.parametrize("lookup", [AllPairs(2, 2), OnDemand(2, 2)], ids=["dense", "on_demand"])
def test_under_autocast_the_numbers_are_those_of_float32(maps, lookup):
    first, second = (t.float() for t in maps)
    coords = moved(dtype=torch.float32)
    plain = lookup(lookup.prepare(first, second), coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = lookup(lookup.prepare(first, second), coords)
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


@pytest.mark.parametrize("lookup", [AllPairs(2, 2), OnDemand(2, 2)], ids=["dense", "on_demand"])
def test_compiles_into_one_graph(maps, lookup):
    first, second = (t.float().requires_grad_() for t in maps)
    coords = moved(dtype=torch.float32)

    def whole(f1, f2, c):
        return lookup(lookup.prepare(f1, f2), c)

    torch._dynamo.reset()
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)(first, second, coords)
    torch.testing.assert_close(compiled, whole(first, second, coords))
    assert compiled.requires_grad
