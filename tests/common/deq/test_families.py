"""Solvers on the map families of tools.fixed_points, beside the textbook algorithms run on the same maps."""

import math

import pytest
import torch

from common.deq.solve import solve
from common.deq.solvers import Anderson
from tools.fixed_points import FAMILIES, measure

SEEDS = (0, 1)
UNSOLVED = ("mdeq", "mdeq plain")  # no solver reaches the tolerance: the smallest residual is compared


def median(name, solver):
    """Over all samples of the maps: evaluations to the tolerance, or the smallest residual where none gets there."""
    runs = [measure(FAMILIES[name](seed), solver) for seed in SEEDS]
    return float(torch.cat([run[name in UNSOLVED] for run in runs]).median())


@pytest.mark.parametrize("name", FAMILIES)
def test_anderson_is_as_good_as_the_better_textbook_method(name):
    """Within 20 % on every family: maps that are not normal are where plain iteration is the better one."""
    best = min(median(name, textbook) for textbook in ("picard", "anderson", "anderson, relative ridge"))
    assert median(name, Anderson()) <= 1.2 * best < math.inf


@pytest.mark.parametrize("safeguard", [math.inf, 10.0])
@pytest.mark.parametrize("factor", [11.0, 50.0, 1e4])
def test_a_map_that_flips_and_expands_is_solved_by_its_secant(factor, safeguard):
    b = torch.linspace(-2, 2, 128).reshape(32, 4)
    for fn, exact in ((lambda z: -factor * z + b, b / (1 + factor)), (lambda z: -factor * z + factor + 1, 1.0)):
        found = solve(fn, torch.zeros(32, 4), solver=Anderson(max_iter=60, safeguard=safeguard))
        assert found.converged.all() and int(found.steps.max()) <= 12, found.message
        torch.testing.assert_close(found.z, exact * torch.ones(32, 4), rtol=2e-3, atol=2e-3 * float(b.max()) / factor)
