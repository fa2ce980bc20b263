import math
import pickle

import pytest
import torch

from common.errors import UserError
from common.optim.schedules import Constant, Cosine, Drop, InverseSqrt, OneCycleLinear, Poly

ALL = [
    Constant(warmup=10),
    InverseSqrt(reference=50),
    Cosine(total=100, warmup=10),
    Poly(total=100, power=0.9),
    Drop(at=60),
    OneCycleLinear(total=100),
]


def test_warmup_counts_steps_or_images():
    steps, images = Constant(warmup=10), Constant(warmup=1280, per_step=128)
    for step in range(30):
        assert steps(step) == images(step) == min(step / 10, 1)
    assert Constant()(0) == 1


def test_inverse_sqrt_is_edm2s():
    schedule = InverseSqrt(reference=35_000 * 2048, warmup=10e6, per_step=2048)
    for step in (0, 100, 10_000, 200_000):
        images = step * 2048
        expected = min(images / 10e6, 1) / math.sqrt(max(step / 35_000, 1))
        assert schedule(step) == pytest.approx(expected)
    assert InverseSqrt(reference=2000)(1000) == 1 and InverseSqrt(reference=2000)(8000) == 0.5


def test_cosine_and_poly_ends():
    cosine, line = Cosine(total=100, warmup=20, final=0.1), Poly(total=100, final=0.5)
    assert cosine(0) == 0 and cosine(20) == 1 and cosine(60) == pytest.approx(0.55)
    assert cosine(100) == cosine(500) == pytest.approx(0.1)
    early = Cosine(total=100, warmup=20, start=0)  # the cosine runs beneath the warm-up
    assert early(20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 5))) and early(50) == pytest.approx(0.5)
    assert early(10) == pytest.approx(0.25 * (1 + math.cos(math.pi / 10))) and early(100) == pytest.approx(0)
    assert [line(s) for s in (0, 50, 100, 101)] == [1.0, 0.75, 0.5, 0.5]
    assert Poly(total=10, power=2)(5) == 0.25


def test_poly_in_stairs():
    stairs, line = Poly(total=100, power=0.9, every=10), Poly(total=100, power=0.9)
    assert [stairs(s) for s in (0, 9, 10, 19, 95, 100)] == [line(s) for s in (0, 0, 10, 10, 90, 100)]
    ramped = Poly(total=100, warmup=20, every=10)
    assert ramped(15) == 0.75, "the warm-up stays a line"


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_pickles_and_drives_lambda_lr(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    driver = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(12):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * schedule(step))
        optimizer.step()
        driver.step()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Constant(warmup=-1), "warmup must be >= 0"),
        (lambda: InverseSqrt(reference=0), "reference must be > 0"),
        (lambda: Cosine(total=0), "total must be > 0"),
        (lambda: Poly(total=-1), "total must be > 0"),
        (lambda: Poly(total=10, every=0), "every must be >"),
        (lambda: OneCycleLinear(total=0), "total must be > 0"),
        (lambda: OneCycleLinear(total=50, share=0.005), r"share=0\.005 leaves no step"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_drop_falls_once():
    assert [Drop(at=200)(s) for s in (0, 199, 200, 10_000)] == [1.0, 1.0, 0.5, 0.5]
    assert Drop(at=256, factor=0.1, per_step=128)(2) == 0.1 and Drop(at=50, warmup=100)(60) == pytest.approx(0.3)


@pytest.mark.parametrize("total", [50, 1000])
def test_one_cycle_is_torchs(total):
    """RAFT's call: OneCycleLR(optimizer, lr, total + 100, pct_start=0.05, anneal_strategy="linear")."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-4)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-4, total + 100, pct_start=0.05, cycle_momentum=False, anneal_strategy="linear"
    )
    ours = OneCycleLinear(total=total)
    for step in range(total + 99):
        assert 4e-4 * ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert ours(10**6) == pytest.approx(4e-6)
