"""A curve in a plane of a larger space: the isometry is exact, points depend on their number, restarts continue."""

import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from projects.pmf.embedded_plane import EmbeddedCurve, curve, isometry


@pytest.mark.parametrize("dimension", [2, 16, 512])
def test_the_isometry_keeps_every_length_and_leaves_nothing_off_the_plane(dimension):
    plane = isometry(dimension, 3)
    torch.testing.assert_close(plane.T.double() @ plane.double(), torch.eye(2).double(), rtol=0, atol=1e-6)
    data = EmbeddedCurve(dimension=dimension, plane_seed=3)
    assert torch.equal(data.plane, plane) and torch.equal(plane, isometry(dimension, 3))
    flat, embedded = data.flat("test", 0, 50), data.points("test", 0, 50)["image"].flatten(1)
    torch.testing.assert_close(torch.pdist(embedded), torch.pdist(flat), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedded @ plane, flat, rtol=1e-5, atol=1e-6)
    off = embedded - (embedded @ plane) @ plane.T
    assert off.norm(dim=1).max() < 1e-5
    assert dimension == 2 or not torch.equal(plane, isometry(dimension, 4))


def test_planes_are_uniform():
    """E[A A^T] = 2/D I over seeds."""
    mean = sum(isometry(4, seed) @ isometry(4, seed).T for seed in range(400)) / 400
    torch.testing.assert_close(mean, torch.eye(4) / 2, rtol=0, atol=0.06)
    first = torch.stack([isometry(3, seed)[:, 0] for seed in range(400)])
    assert first.mean(0).abs().max() < 0.1  # no preferred direction


@pytest.mark.parametrize("kind", ["swiss_roll", "spiral"])
def test_coordinates_have_mean_0_and_deviation_1(kind):
    points = EmbeddedCurve(dimension=2, curve=kind).flat("train", 0, 40_000)
    assert points.mean(0).abs().max() < 0.02 and (points.std(0) - 1).abs().max() < 0.02
    assert points.norm(dim=1).max() < 3


def test_the_swiss_roll_is_a_roll():
    """radius = angle, before mean and deviation are taken: one and a half turns."""
    u = np.linspace(0, 1, 5)
    angle = 1.5 * math.pi * (1 + 2 * u)
    raw = np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1)
    found = curve(u, "swiss_roll")
    scale = np.ptp(raw, axis=0) / np.ptp(found, axis=0)
    np.testing.assert_allclose((found - found[0]) * scale, raw - raw[0], atol=1e-9)


def test_noise_stays_in_the_plane():
    plain, noisy = (EmbeddedCurve(dimension=8, noise=noise).flat("train", 5, 20_000) for noise in (0.0, 0.3))
    e = (noisy - plain) / 0.3
    assert e.mean(0).abs().max() < 0.03 and (e.std(0) - 1).abs().max() < 0.03
    assert abs(float((e[:, 0] * e[:, 1]).mean())) < 0.03


def test_points_depend_on_seed_split_and_number_alone():
    data = EmbeddedCurve(dimension=8, seed=7)
    whole = data.points("train", 0, 20)
    part = data.points("train", 12, 5)
    assert torch.equal(data.flat("train", 0, 20)[12:17], data.flat("train", 12, 5))
    # two kernels for 20 and for 5 rows: two products and a sum of |p| |A row| <= 3 each, 2 x 2 x 2^-24 x 3 = 7e-7
    torch.testing.assert_close(whole["image"][12:17], part["image"], rtol=0, atol=7.2e-7)
    assert part["position"].tolist() == [12, 13, 14, 15, 16]
    for other in (data.flat("test", 0, 20), EmbeddedCurve(dimension=8, seed=8).flat("train", 0, 20)):
        assert not torch.equal(other, data.flat("train", 0, 20))
    assert whole["image"].shape == (20, 8, 1, 1) and whole["image"].dtype == torch.float32
    assert data.fingerprint("test") != EmbeddedCurve(dimension=9, seed=7).fingerprint("test")


def test_a_restart_goes_on_at_the_next_point():
    data = EmbeddedCurve(dimension=4, batch_size=6)
    straight = [batch["position"].tolist() for batch, _ in zip(data.train_dataloader(), range(3))]
    assert straight[1] == list(range(6, 12))
    again = EmbeddedCurve(dimension=4, batch_size=6)
    again.load_state_dict({**data.state_dict(), "images_seen": 12})
    assert next(iter(again.train_dataloader()))["position"].tolist() == straight[2]


def test_evaluation_has_every_point_once_with_others_beside():
    data = EmbeddedCurve(dimension=4, eval_batch_size=8, test_count=20)
    batches = list(data.eval_batches("test"))
    assert [len(b["position"]) for b in batches] == [8, 8, 4]
    assert torch.cat([b["position"] for b in batches]).tolist() == list(range(20))
    others = torch.cat([b["other"] for b in batches])
    torch.testing.assert_close(others, data.points("test", 20, 20)["image"])
    assert torch.equal(batches[0]["plane"], data.plane)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dimension": 1}, "data.dimension must be a whole number >= 2, got 1"),
        ({"curve": "swiss_rol"}, "data.curve must be one of swiss_roll, spiral, got 'swiss_rol'. Closest: swiss_roll"),
        ({"noise": -1.0}, "data.noise must be >= 0"),
        ({"eval_batch_size": 1}, "data.eval_batch_size must be a whole number >= 2"),
        ({"test_count": 0}, "data.test_count must be a whole number >= 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        EmbeddedCurve(**options)


def test_the_configuration_is_the_signature(repo):
    from inspect import signature

    from omegaconf import OmegaConf

    data = OmegaConf.to_container(OmegaConf.load(repo / "conf" / "data" / "embedded_curve.yaml"))
    defaults = {name: parameter.default for name, parameter in signature(EmbeddedCurve).parameters.items()}
    assert set(data) - {"_target_"} == set(defaults)
    assert all(data[name] == value for name, value in defaults.items() if name != "seed")
