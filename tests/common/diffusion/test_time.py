import math

import pytest
import torch

from common.diffusion import time
from common.errors import UserError

SAMPLERS = {
    "lognormal": time.LogNormal(),
    "truncated": time.TruncatedLogNormal(),
    "logit": time.LogitNormal(),
    "uniform": time.Uniform(),
    "loguniform": time.LogUniform(),
    "karras": time.KarrasGridUniform(),
    "vp": time.VPSigma(),
    "grid": time.GridSigma(levels=(3.0, 2.0, 1.0)),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_shape_seed_and_global_state(sampler):
    a, b = sampler(7, generator(1)), sampler(7, generator(1))
    assert a.shape == (7,) and a.dtype == torch.float32 and torch.equal(a, b) and bool((a > 0).all())
    assert not torch.equal(a, sampler(7, generator(2)))
    torch.manual_seed(3)
    first = sampler(7)
    torch.manual_seed(3)
    assert torch.equal(first, sampler(7))


def test_lognormal_is_literally_the_published_expression():
    assert torch.equal(
        time.LogNormal(mean=-1.1, std=2.0)(100, generator()),
        (torch.randn(100, generator=generator()) * 2.0 - 1.1).exp(),
    )


def test_moments():
    n = 200_000
    log = time.LogNormal(mean=-1.2, std=1.2)(n, generator()).log()
    assert abs(log.mean() + 1.2) < 0.01 and abs(log.std() - 1.2) < 0.01
    logit = time.LogitNormal(mean=-0.4, std=1.0)(n, generator())
    assert abs(logit.mean() - 0.418) < 0.003
    assert abs(time.Uniform(low=1, high=3)(n, generator()).mean() - 2) < 0.01
    log = time.LogUniform(low=0.02, high=100)(n, generator()).log()
    assert abs(log.mean() - (math.log(0.02) + math.log(100)) / 2) < 0.02
    ends = time.KarrasGridUniform(low=0.0, high=0.8)(n, generator())
    top = (0.002 ** (1 / 7) + 0.8 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert ends.min() >= 0.002 * 0.999 and ends.max() <= top * 1.001 and ends.max() > 0.98 * top
    vp = time.VPSigma()(n, generator())
    assert 1e-4 < vp.min() < 0.05 and 150 < vp.max() < 152.2


def test_truncated_lognormal_is_the_conditioned_one():
    whole = time.LogNormal(mean=-1.1, std=2.0)(400_000, generator())
    kept = whole[(whole > 0.5) & (whole < 5)].log()
    direct = time.TruncatedLogNormal(mean=-1.1, std=2.0, low=0.5, high=5.0)(100_000, generator(1))
    assert direct.min() >= 0.5 and direct.max() <= 5
    assert abs(direct.log().mean() - kept.mean()) < 0.01 and abs(direct.log().std() - kept.std()) < 0.01
    assert bool((time.TruncatedLogNormal(low=0.0)(1000) > 0).all())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind, mean", [(time.OrderThenMask, 0.53), (time.MaskThenOrder, 0.418)])
def test_the_two_orderings_differ(kind, mean, exact):
    """Samples with r = t have mean t 0.53 when masked after ordering, 0.418 (that of the base) when masked before."""
    sampler = kind(base=time.LogitNormal(mean=-0.4, std=1.0), equal=0.75, rows="first" if exact else "random")
    t, r = sampler(200_000, generator())
    assert bool((r <= t).all())
    same = t == r
    assert abs(same.float().mean() - 0.75) < (1e-9 if exact else 0.005)
    assert abs(t[same].mean() - mean) < 0.006
    assert abs(t[~same].mean() - 0.53) < 0.01
    assert bool(same[:150_000].all()) == exact


def test_spread_gives_every_stretch_of_the_batch_its_share():
    for equal in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        t, r = time.OrderThenMask(base=time.Uniform(), equal=equal, rows="spread")(240, generator())
        same = (t == r).reshape(12, 20).sum(1)
        assert int(same.sum()) == round(240 * equal) and int(same.max() - same.min()) <= 1


# E t, E r, P(t = r): of py-meanflow's two samplers at ratio 0.75 (meanflow.md, section 8), and of pMF's published ones
STATISTICS = [
    (time.OrderThenMask, (-2.0, 2.0), (-2.0, 2.0), {}, (0.353, 0.160, 0.25)),
    (time.MaskThenOrder, (-0.6, 1.6), (-4.0, 1.6), {"swap": False}, (0.398, 0.130, 0.2995)),
]


@pytest.mark.parametrize("kind, first, second, more, expected", STATISTICS)
def test_statistics_of_the_published_pairs(kind, first, second, more, expected):
    base, other = (time.LogitNormal(mean=mean, std=std) for mean, std in (first, second))
    t, r = kind(base=base, second=other, equal=0.25, **more)(1_000_000, generator())
    found = (float(t.mean()), float(r.mean()), float((t == r).float().mean()))
    assert found == pytest.approx(expected, abs=0.002)


def test_times_of_pmf():
    """Mask then order at LN(0.8, 0.8): mean t 0.713 (pmf.md, section 6); samples with r = t keep the base's mean."""
    base = time.LogitNormal(mean=0.8, std=0.8)
    t, r = time.MaskThenOrder(base=base, equal=0.5, rows="first")(400_000, generator())
    same = t == r
    assert abs(same.float().mean() - 0.5) < 1e-4 and bool((r <= t).all())
    assert abs(t.mean() - 0.713) < 0.002
    assert abs(t[same].mean() - base(400_000, generator(1)).mean()) < 0.002
    # H: a tenth of the PAIRS is uniform, both of its times at once
    low = time.MaskThenOrder(base=time.Uniform(low=2, high=3), equal=0.0, uniform=0.1)
    t, r = low(400_000, generator())
    uniform = t < 1
    assert abs(uniform.float().mean() - 0.1) < 0.002 and bool(((r < 1) == uniform).all())
    assert abs(t[uniform].mean() - 2 / 3) < 0.005 and abs(r[uniform].mean() - 1 / 3) < 0.005


@pytest.mark.parametrize(
    "beta, quantiles", [(1.0, [1, 8**0.25, 8**0.5, 8**0.75, 8]), (2.0, [1, 32 / 25, 16 / 9, 32 / 11, 8])]
)
def test_quantiles_of_the_guidance_scale(beta, quantiles):
    """Closed forms; draws of the official sampler gave 1, 1.67, 2.81, 4.74, 8 and 1, 1.28, 1.77, 2.89, 8."""
    sampler = time.PowerOmega(beta=beta)
    at = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert sampler.quantile(at).tolist() == pytest.approx(quantiles, rel=1e-12) and sampler.largest == 8
    drawn = sampler(200_000, generator())
    assert drawn.min() >= 1 and drawn.max() <= 8.0001
    assert torch.quantile(drawn, torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx(quantiles[1:4], abs=0.03)


def test_guidance_interval_and_label_drop():
    low, high = time.GuidanceInterval()(100_000, generator())
    assert low.min() >= 0 and low.max() < 0.5 <= high.min() and high.max() <= 1
    assert abs(low.mean() - 0.25) < 0.002 and abs(high.mean() - 0.75) < 0.002
    low, high = time.GuidanceInterval(whole=True)(5, generator())
    assert low.tolist() == [0.0] * 5 and high.tolist() == [1.0] * 5
    each = time.LabelDrop(p=0.1)(100_000, generator())
    assert abs(each.float().mean() - 0.1) < 0.003 and each[50_000:].sum() > 0
    first = time.LabelDrop(p=0.1, rows="first")(100_000, generator())
    assert first.sum() == each.sum() and bool(first[: int(first.sum())].all())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: time.LogNormal(std=-1.0), "std must be >= 0, got -1.0"),
        (lambda: time.LogNormal(mean=float("nan")), "mean must be a number"),
        (lambda: time.LogitNormal(std="1"), "std must be >= 0"),
        (lambda: time.Uniform(low=1, high=1), "high must be > 1"),
        (lambda: time.LogUniform(low=-0.1), "negative sigma: low must be > 0"),
        (lambda: time.KarrasGridUniform(high=1.5), "high must be > 0 and <= 1"),
        (lambda: time.GridSigma(levels=()), "levels must hold at least one"),
        (lambda: time.GridSigma(levels=(1.0, 0.0)), "levels must be > 0"),
        (lambda: time.OrderThenMask(base=time.Uniform(), equal=1.5), "equal must be >= 0 and <= 1"),
        (lambda: time.TruncatedLogNormal(low=3.0, high=2.0), "high must be > 3"),
        (lambda: time.MaskThenOrder(base=time.Uniform(), rows="frist"), "rows must be one of random, first, spread"),
        (lambda: time.OrderThenMask(base=time.Uniform(), uniform=2), "uniform must be >= 0 and <= 1"),
        (lambda: time.PowerOmega(s_max=-1), "s_max must be >= 0"),
        (lambda: time.LabelDrop(rows="spread"), "rows must be one of random, first, got"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
