"""Frechet distance: closed forms, streaming, gradient, files."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.metrics.fid import GaussianStatistics, frechet_distance, frechet_distance_tensor


def stats(features):
    return GaussianStatistics(dim=features.shape[1]).update(features)


def exact(mean, cov, n=1000):
    """Statistics with exactly this mean and (ddof=1) covariance."""
    s = GaussianStatistics(dim=len(mean))
    s.n, s.mean, s.scatter = n, mean.double(), cov.double() * (n - 1)
    return s


def random_cov(dim, seed, rank=None):
    a = torch.randn(dim, rank or 2 * dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / a.shape[1]


def sqrtm_distance(a, b):
    """The formula as it stands in the paper, by scipy."""
    s1, s2 = a.cov().numpy(), b.cov().numpy()
    cross = scipy.linalg.sqrtm(s1 @ s2)
    return float((a.mean - b.mean).square().sum() + np.trace(s1 + s2 - 2 * np.real(cross)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_diagonal_closed_form(dim, seed):
    g = torch.Generator().manual_seed(seed)
    m1, m2 = torch.randn(2, dim, generator=g, dtype=torch.float64)
    s1, s2 = torch.rand(2, dim, generator=g, dtype=torch.float64) * 3
    expected = float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    a, b = exact(m1, torch.diag(s1**2)), exact(m2, torch.diag(s2**2))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dim", [3, 16, 64])
def test_matches_scipy_sqrtm(dim):
    a = exact(torch.randn(dim), random_cov(dim, 1))
    b = exact(torch.randn(dim), random_cov(dim, 2))
    assert frechet_distance(a, b) == pytest.approx(sqrtm_distance(a, b), rel=1e-6, abs=1e-6)


def test_symmetric_and_zero_on_itself():
    a, b = exact(torch.randn(32), random_cov(32, 1)), exact(torch.randn(32), random_cov(32, 2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 0.1
    assert abs(frechet_distance(a, a)) < 1e-11


def test_singular_covariances_are_exact():
    """Disjoint supports: the cross term vanishes, so the distance is the sum of the traces, to the last digits."""
    first, second = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    first[:5], second[5:9] = 4.0, 9.0
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    zero = torch.zeros(40)
    a, b = exact(zero, q @ torch.diag(first) @ q.T), exact(zero, q @ torch.diag(second) @ q.T)
    assert frechet_distance(a, b) == pytest.approx(20 + 36, rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-10


def test_few_samples_warn_or_are_refused():
    a, b = stats(torch.randn(20, 32)), stats(torch.randn(200, 32))
    with pytest.warns(UserWarning, match="20 images give a singular covariance"):
        frechet_distance(a, b)
    with pytest.raises(UserError, match=r"found 20 images, but expected at least 100"):
        frechet_distance(a, b, minimum=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(b, stats(torch.randn(33, 32)))


def test_widths_must_match():
    with pytest.raises(UserError, match="width 3 and 4"):
        frechet_distance(stats(torch.randn(9, 3)), stats(torch.randn(9, 4)))


# Streaming ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_streaming_and_merge_order_do_not_matter(sizes, random):
    sizes = [*sizes, 3]
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(len(sizes)), dtype=torch.float64) + 1e4
    whole, streamed = stats(x), GaussianStatistics(dim=5)
    parts = []
    for batch in x.split(sizes):
        streamed.update(batch)
        parts.append(stats(batch))
    while len(parts) > 1:  # merge as ranks might: any two, in any order
        random.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    for other in (streamed, parts[0]):
        assert other.n == len(x)
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(other.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_far_from_zero_no_digits_are_lost():
    """Sum of squares minus squared sum, even in float64, would be off by 1e-2 here."""
    x = torch.randn(500, 3, dtype=torch.float64)
    s = GaussianStatistics(dim=3)
    for batch in (x + 1e7).split(100):
        s.update(batch)
    torch.testing.assert_close(s.cov(), torch.cov(x.T), rtol=1e-6, atol=1e-7)


def test_divisor():
    x = torch.randn(10, 4, dtype=torch.float64)
    s = stats(x)
    torch.testing.assert_close(s.cov(), torch.cov(x.T, correction=1))
    torch.testing.assert_close(s.cov(0), torch.cov(x.T, correction=0))
    other = stats(torch.randn(10, 4) * 3)
    # without a mean gap FD is linear in the covariances, so 1/N and 1/(N-1) differ by exactly that factor
    other.mean = s.mean
    assert frechet_distance(s, other, ddof=0) == pytest.approx(0.9 * frechet_distance(s, other), rel=1e-10)
    with pytest.raises(UserError, match="ddof must be one of 0, 1"):
        s.cov(2)
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        stats(x[:1]).cov()


def test_bad_features_are_refused_and_change_nothing():
    s = stats(torch.randn(10, 4))
    before = s.digest()
    for bad in (torch.randn(3, 5), torch.randn(4), torch.full((2, 4), float("inf"))):
        with pytest.raises(UserError):
            s.update(bad)
    assert s.digest() == before


# Gradient -------------------------------------------------------------------------------------------------------------


def distance_of(features, reference):
    mean = features.mean(0)
    return frechet_distance_tensor(mean, torch.cov(features.T), reference.mean, reference.cov())


def test_tensor_form_equals_the_metric():
    a, b = stats(torch.randn(50, 6) * 2 + 1), stats(torch.randn(60, 6))
    value = frechet_distance_tensor(a.mean, a.cov(), b.mean, b.cov())
    assert float(value) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_gradient_is_the_closed_form():
    """2(mu-mu_r)/N + 2/(N-1) (f-mu)(I - R (R S R)^(-1/2) R), R = Sr^(1/2)."""
    n = 40
    f = (torch.randn(n, 6, dtype=torch.float64) * 2 + 1).requires_grad_()
    reference = stats(torch.randn(60, 6) @ torch.randn(6, 6))
    distance_of(f, reference).backward()

    with torch.no_grad():
        s, sr = torch.cov(f.T).numpy(), reference.cov().numpy()
        r = np.real(scipy.linalg.sqrtm(sr))
        inner = torch.from_numpy(r @ np.linalg.inv(np.real(scipy.linalg.sqrtm(r @ s @ r))) @ r)
        gap = f - f.mean(0)
        expected = 2 * (f.mean(0) - reference.mean) / n + 2 / (n - 1) * gap @ (torch.eye(6) - inner)
    torch.testing.assert_close(f.grad, expected, rtol=1e-8, atol=1e-10)


def test_gradient_by_finite_differences_with_repeated_eigenvalues():
    reference = exact(torch.zeros(3), torch.eye(3))
    f = torch.randn(12, 3, dtype=torch.float64)
    f = (f - f.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(f.T)).T) * 2  # covariance 4 I
    torch.testing.assert_close(torch.cov(f.T), 4 * torch.eye(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: distance_of(x, reference), f.requires_grad_(), atol=1e-6)


def test_gradient_of_fewer_samples_than_dimensions_is_finite():
    f = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    distance_of(f, stats(torch.randn(50, 10))).backward()
    assert torch.isfinite(f.grad).all() and f.grad.abs().max() > 0


def test_gradient_of_a_collapsed_batch_only_moves_the_mean():
    """All covariance eigenvalues are exactly zero: the square root has no slope there, and no nan may come out."""
    reference = stats(torch.randn(50, 3))
    f = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    distance_of(f, reference).backward()
    torch.testing.assert_close(f.grad, (2 * (torch.ones(3) - reference.mean) / 4).expand(4, 3))


# Files ----------------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_bit(tmp_path):
    s = stats(torch.randn(20, 4))
    s.record = {"extractor": "resnet56", "n": 20}
    s.save(tmp_path / "deep" / "a.npz")
    again = GaussianStatistics.load(tmp_path / "deep" / "a.npz")
    assert (again.n, again.record) == (20, s.record)
    assert torch.equal(again.mean, s.mean) and torch.equal(again.scatter, s.scatter)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.npz"]


def test_missing_truncated_and_altered_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match=r"tools\.fid_ref"):
        GaussianStatistics.load(path)
    s = stats(torch.randn(20, 4))
    s.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.npz is not a readable statistics file"):
        GaussianStatistics.load(path)
    with np.load(_write(path, data)) as file:
        content = dict(file)
    content["mean"] = content["mean"] + 1e-9
    np.savez(path, **content)  # a well-formed file that holds other numbers
    with pytest.raises(UserError, match="checksum"):
        GaussianStatistics.load(path)


def _write(path, data):
    path.write_bytes(data)
    return path
