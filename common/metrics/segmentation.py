"""How well masks are predicted: mean intersection over union and pixel accuracy, from one confusion matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from common.data.segmentation.augment import IGNORE


def confusion_matrix(prediction: Tensor, mask: Tensor, num_classes: int, ignore: int = IGNORE) -> Tensor:
    """int64 (C, C) on the masks' device: pixels by true class (row) and predicted class (column).

    prediction  classes (B, H, W), or logits (B, C, H, W)
    mask        (B, H, W), classes and `ignore`: pixels without a class count nowhere

    Matrices of batches and processes are added up. By torchmetrics, without its validation, which reads every mask back
    to the host; `common.data.segmentation.module` has checked the masks.
    """
    return multiclass_confusion_matrix(prediction, mask, num_classes, ignore_index=ignore, validate_args=False)


def class_iou(matrix: Tensor) -> Tensor:
    """float64 (C,) in percent: pixels that are and were called the class / pixels that are or were; NaN for neither."""
    matrix = matrix.double()
    right = matrix.diagonal()
    return 100 * right / (matrix.sum(0) + matrix.sum(1) - right)


def segmentation_scores(matrix: Tensor, names: Sequence[str] | None = None) -> dict[str, float]:
    """From a confusion matrix (C, C), counts or any multiple of them; in percent of the pixels with a class:

    miou            mean of `class_iou` over the classes that occur
    pixel_accuracy  pixels called what they are
    class_accuracy  mean over the classes in the truth of the same, within the class
    iou_<name>      `class_iou` of each class that occurs, when `names` are given; blanks become underscores

    A class neither in the truth nor predicted is left out of the mean, as by the authors' code and mmsegmentation; the
    PASCAL VOC devkit divides 0 by 0 there, but on its sets every class occurs. A class that is only predicted counts 0.
    NaN where nothing was counted.
    """
    matrix = matrix.double()
    right, truth, iou = matrix.diagonal(), matrix.sum(1), class_iou(matrix)
    found = {
        "miou": float(iou.nanmean()),
        "pixel_accuracy": float(100 * right.sum() / matrix.sum()),
        "class_accuracy": float((100 * right / truth).nanmean()),
    }
    for name, value in zip(names or (), iou if names else (), strict=True):
        if not torch.isnan(value):
            found[f"iou_{name.replace(' ', '_')}"] = float(value)
    return found
