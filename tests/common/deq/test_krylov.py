import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.deq.krylov import combine, dots, gmres

D64 = torch.float64


def systems(batch, width, seed=0, dtype=D64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, width, width, dtype=D64, generator=generator) / width**0.5
    a = a + 1.5 * torch.eye(width, dtype=D64)
    b = torch.randn(batch, width, dtype=D64, generator=generator)
    return a.to(dtype), b.to(dtype)


def times(a):
    return lambda v: (a @ v.unsqueeze(2)).squeeze(2)


def krylov_least_squares(a, b, size):
    """Dense: the minimiser of ||b - A x|| over span(b, A b, ..., A^(size-1) b), one system."""
    basis = [b / b.norm()]
    for _ in range(size - 1):
        v = a @ basis[-1]
        for q in basis * 2:
            v = v - q * (q @ v)
        basis.append(v / v.norm())
    q = torch.stack(basis, 1)
    return q @ torch.linalg.lstsq(a @ q, b[:, None], driver="gelsd").solution[:, 0]


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 4), width=st.integers(1, 10), size=st.integers(1, 10), seed=st.integers(0, 100))
def test_the_best_point_of_the_krylov_space(batch, width, size, seed):
    size = min(size, width)
    a, b = systems(batch, width, seed)
    for fixed in (True, False):
        x, left, used = gmres(times(a), b, size=size, tol=1e-14, fixed=fixed)
        expected = torch.stack([krylov_least_squares(a[i], b[i], size) for i in range(batch)])
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
        misfit = (b - times(a)(x)).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(left, misfit, rtol=1e-5, atol=1e-12)
        assert used.tolist() == [size] * batch or (left <= 1e-13).any()
    if size == width:
        torch.testing.assert_close(x, torch.linalg.solve(a, b.unsqueeze(2)).squeeze(2), rtol=1e-7, atol=1e-9)


def test_each_row_ends_for_itself_whatever_the_others_need():
    a, b = systems(4, 12)
    a[1] = 2 * torch.eye(12)  # one product
    a[2] = torch.diag(torch.tensor([1.0, 3.0] * 6, dtype=D64))  # two
    b[3] = 0  # none
    x, left, used = gmres(times(a), b, size=12, tol=1e-10)
    assert used[1:].tolist() == [1, 2, 0] and used[0] > 2 and (left <= 1e-10).all()
    torch.testing.assert_close(x, torch.linalg.solve(a, b.unsqueeze(2)).squeeze(2), rtol=1e-8, atol=1e-10)
    loose, _, few = gmres(times(a), b, size=12, tol=0.3)
    for row in range(4):
        alone, _, count = gmres(times(a[row : row + 1]), b[row : row + 1], size=12, tol=0.3)
        torch.testing.assert_close(alone[0], loose[row], rtol=1e-12, atol=1e-14)
        assert int(count) == int(few[row])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("where", ["matrix", "right"])
@pytest.mark.parametrize("fixed", [True, False])
def test_a_row_that_is_not_finite_touches_no_other(bad, where, fixed):
    a, b = systems(3, 6)
    good = gmres(times(a), b, size=6, tol=1e-10, fixed=fixed)
    (a if where == "matrix" else b)[1] = bad
    x, left, used = gmres(times(a), b, size=6, tol=1e-10, fixed=fixed)
    others = [0, 2]
    assert torch.equal(x[others], good[0][others]) and torch.equal(used[others], good[2][others])
    assert torch.equal(left[others], good[1][others]) and x.isfinite().all()


def test_singular_systems_get_a_finite_answer():
    a = torch.zeros(2, 4, 4, dtype=D64)
    a[1, 0, 0] = 1.0
    b = torch.ones(2, 4, dtype=D64)
    x, left, _ = gmres(times(a), b, size=4, tol=1e-10)
    assert x.isfinite().all() and left[0] == 1 and left[1] <= 1
    nilpotent = torch.diag(torch.ones(3, dtype=D64), 1)[None]
    x, _, _ = gmres(times(nilpotent), torch.eye(4, dtype=D64)[:1], size=4, tol=1e-10)
    assert x.isfinite().all()


def test_single_precision():
    a, b = systems(3, 20, dtype=torch.float32)
    x, left, _ = gmres(times(a), b, size=20, tol=1e-5)
    assert x.dtype == left.dtype == torch.float32 and (left <= 1e-5).all()
    torch.testing.assert_close(times(a)(x), b, rtol=1e-4, atol=1e-4)


def test_empty_batches():
    x, left, used = gmres(lambda v: v, torch.zeros(0, 3), size=3, tol=1e-3)
    assert x.shape == (0, 3) and left.shape == used.shape == (0,)


def test_products_with_a_history():
    history, v, w = torch.randn(3, 4, 5, dtype=D64), torch.randn(3, 5, dtype=D64), torch.randn(3, 4, dtype=D64)
    torch.testing.assert_close(dots(history, v), torch.einsum("bnd,bd->bn", history, v))
    torch.testing.assert_close(combine(w, history), torch.einsum("bn,bnd->bd", w, history))
