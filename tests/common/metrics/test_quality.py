"""Inception score, precision/recall and kernel distance on cases with known answers."""

import math

import pytest
import torch

from common.errors import UserError
from common.metrics.quality import inception_score, kernel_distance, precision_recall


def test_inception_score_of_equal_predictions_is_one():
    assert inception_score(torch.randn(1, 7).expand(100, 7)) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_inception_score_of_confident_and_even_predictions_is_the_class_count():
    for logit in (60.0, float("inf")):
        logits = torch.where(torch.eye(5).repeat(20, 1) > 0, torch.tensor(0.0), torch.tensor(-logit))
        assert inception_score(logits)[0] == pytest.approx(5.0)


def test_inception_score_of_two_classes_in_closed_form():
    """p = (q, 1-q) or (1-q, q), half each: exp(ln 2 - H(q))."""
    q = 0.8
    p = torch.tensor([[q, 1 - q], [1 - q, q]]).repeat(50, 1)
    entropy = -(q * math.log(q) + (1 - q) * math.log(1 - q))
    assert inception_score(p.log() + 3.0)[0] == pytest.approx(2 * math.exp(-entropy), rel=1e-6)


def test_inception_score_splits_are_contiguous():
    one_class_per_split = torch.eye(10).repeat_interleave(10, 0) * 100
    assert inception_score(one_class_per_split)[0] == pytest.approx(1.0)
    assert inception_score(one_class_per_split, splits=1)[0] == pytest.approx(10.0)
    with pytest.raises(UserError, match="10 splits"):
        inception_score(torch.randn(9, 3))


def test_identical_sets_have_precision_and_recall_one_and_disjoint_ones_zero():
    x = torch.randn(60, 8)
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x + 1e4, x + 1e4) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_collapsed_generator_is_precise_but_covers_nothing():
    real = torch.randn(200, 2)
    fake = real.mean(0) + 1e-3 * torch.randn(50, 2)
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0 and recall < 0.05


def test_matches_a_slow_second_implementation_for_any_chunk():
    real, fake, k = torch.randn(70, 3), torch.randn(50, 3) * 0.7 + 0.7, 3

    def covered(points, centres):
        count = 0
        for p in points:
            for i, c in enumerate(centres):
                others = sorted(float((c - o).norm()) for j, o in enumerate(centres) if j != i)
                if float((p - c).norm()) <= others[k - 1]:
                    count += 1
                    break
        return count / len(points)

    expected = (covered(fake, real), covered(real, fake))
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for chunk in (1, 7, 1024):
        assert precision_recall(real, fake, neighbours=k, chunk=chunk) == pytest.approx(expected)


def test_too_few_images_for_neighbours():
    with pytest.raises(UserError, match="3 real and 9 generated"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))


def test_kernel_distance_against_the_double_sum():
    x, y = torch.randn(12, 3).double(), torch.randn(12, 3).double() + 1

    def k(a, b):
        return float((a @ b / 3 + 1) ** 3)

    n = 12
    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(k(a, b) for a in x for b in y) / n**2
    assert kernel_distance(x, y, subsets=2, size=n) == pytest.approx(within - 2 * across)
    with pytest.raises(UserError, match=">= 2 images"):
        kernel_distance(x[:1], y)
