"""Confusion matrix and scores against hand counts and a slow second implementation."""

import math

import pytest
import torch

from common.metrics.segmentation import class_iou, confusion_matrix, segmentation_scores


def test_a_case_by_hand():
    truth = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]])
    predicted = torch.tensor([[[0, 0, 1, 1], [1, 0, 0, 1]]])
    matrix = confusion_matrix(predicted, truth, 3)
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    found = segmentation_scores(matrix, ["sky", "road sign", "car"])
    # each class: 2 right, 1 missed, 1 false: 2 / 4; class 2 occurs nowhere and is left out
    assert found == {
        "miou": pytest.approx(50), "pixel_accuracy": pytest.approx(400 / 6), "class_accuracy": pytest.approx(200 / 3),
        "iou_sky": pytest.approx(50), "iou_road_sign": pytest.approx(50),
    }  # fmt: skip


def test_class_accuracy_divides_by_the_pixels_of_the_true_class():
    found = segmentation_scores(torch.tensor([[8, 2], [1, 9]]))  # rows are the truth: 8 of 10 and 9 of 10
    assert found["class_accuracy"] == pytest.approx(85, abs=1e-9)
    assert found["miou"] == pytest.approx(100 * (8 / 11 + 9 / 12) / 2)


def test_a_class_that_is_only_predicted_counts_zero():
    found = segmentation_scores(confusion_matrix(torch.tensor([[0, 2]]), torch.tensor([[0, 0]]), 4))
    assert found["miou"] == pytest.approx((50 + 0) / 2) and found["class_accuracy"] == pytest.approx(50)


def slow(predicted, truth, classes):
    ious = []
    for c in range(classes):
        pairs = [(int(s), int(t)) for s, t in zip(predicted.flatten(), truth.flatten()) if t != 255]
        union = sum(s == c or t == c for s, t in pairs)
        if union:
            ious.append(100 * sum(s == c and t == c for s, t in pairs) / union)
    return sum(ious) / len(ious)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_version_and_adds_up_over_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 6, (4, 7, 9), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
    logits = torch.randn(4, 7, 7, 9, generator=generator)
    matrix = confusion_matrix(logits, truth, 7)
    assert segmentation_scores(matrix)["miou"] == pytest.approx(slow(logits.argmax(1), truth, 7))
    parts = sum(confusion_matrix(logits[i : i + 1].argmax(1), truth[i : i + 1], 7) for i in range(4))
    assert torch.equal(parts, matrix)
    # means of sums over batches give the same: scores are ratios
    assert segmentation_scores(matrix.double() / 4) == pytest.approx(segmentation_scores(matrix))


def test_perfect_and_nothing():
    truth = torch.arange(5).view(1, 1, 5)
    assert segmentation_scores(confusion_matrix(truth, truth, 5))["miou"] == 100
    nothing = confusion_matrix(truth, torch.full((1, 1, 5), 255), 5)
    assert nothing.sum() == 0 and math.isnan(segmentation_scores(nothing)["miou"])
    assert class_iou(nothing).isnan().all()
