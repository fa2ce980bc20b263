from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.deq.correction import Correction, losses_of, positions
from common.errors import UserError


@pytest.mark.parametrize(
    "correction, expected",
    [
        (Correction(), [0.512, 0.64, 0.8, 1.0]),
        (Correction("exp", gamma=0.5), [0.125, 0.25, 0.5, 1.0]),
        (Correction("linear"), [0.325, 0.55, 0.775, 1.0]),
        (Correction("linear", gamma=1.0, bias=0.1), [0.35, 0.6, 0.85, 1.1]),
        (Correction("const"), [1.0] * 4),
        (Correction(lambda n, k: k / n), [0.0, 0.25, 0.5, 0.75]),
    ],
)
def test_weights(correction, expected):
    assert correction.weights(4) == pytest.approx(expected)


def test_the_weighted_sum_and_its_gradient():
    losses = [torch.tensor(float(k), requires_grad=True) for k in range(1, 4)]
    total = Correction()(losses)
    torch.testing.assert_close(total, torch.tensor(0.64 * 1 + 0.8 * 2 + 3))
    total.backward()
    assert [x.grad.item() for x in losses] == pytest.approx([0.64, 0.8, 1.0])
    torch.testing.assert_close(Correction()(losses[:1]), losses[0])
    per_sample = Correction("const")([torch.ones(3), 2 * torch.ones(3)])
    assert torch.equal(per_sample, torch.full((3,), 3.0))


def test_lists_are_walked_and_the_rest_is_repeated():
    predictions = [torch.full((2,), float(k)) for k in range(3)]
    target, scale = torch.ones(2), 2.0
    got = losses_of(lambda p, t, s: s * (p - t).abs().mean(), (predictions, target, scale))
    assert [x.item() for x in got] == [2.0, 0.0, 2.0]
    got = losses_of(lambda p, t: (p - t).sum(), (predictions, [target]))
    assert [x.item() for x in got] == [-2.0, 0.0, 2.0]
    assert len(losses_of(lambda p, t: (p - t).sum(), (target, target))) == 1


@given(max_iter=st.integers(0, 200), n=st.integers(1, 30))
def test_positions(max_iter, n):
    at = positions(max_iter, n)
    assert len(at) == n and at[-1] == max_iter and at == sorted(at)
    if max_iter >= n:
        gaps = {b - a for a, b in pairwise(at)}
        assert gaps <= {max_iter // n} and at[0] >= 1
        if max_iter % n == 0:
            assert at == [(k + 1) * max_iter // n for k in range(n)]
    elif max_iter:
        assert at[0] >= 1 and set(at) == set(range(1, max_iter + 1))


def test_positions_where_the_division_leaves_a_rest():
    assert positions(40, 6) == [10, 16, 22, 28, 34, 40]
    assert positions(36, 6) == [6, 12, 18, 24, 30, 36]
    assert positions(2, 4) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Correction("expo"), "Closest: exp"),
        (lambda: Correction("const", gamma=0.5), "gamma=0.5 has no effect"),
        (lambda: Correction("exp", bias=0.5), "bias=0.5 has no effect"),
        (lambda: Correction()([]), "losses is empty"),
        (lambda: losses_of(torch.add, ([1, 2], [1, 2, 3])), "hold 2, 3 states"),
        (lambda: losses_of(torch.add, ([], 1)), "states"),
        (lambda: positions(-1, 2), "max_iter must be"),
        (lambda: positions(5, 0), "n_states must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
