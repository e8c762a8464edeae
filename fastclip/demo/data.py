"""Real inputs that need no download, as tensors ready to train on."""

from __future__ import annotations

from dataclasses import dataclass

import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class ClassificationData:
    """Labelled inputs, parted into those to train on and those to test on.

    Attributes:
        train_inputs: float32, one row per example.
        train_labels: int64 class of each row, 0 to num_classes - 1.
        test_inputs: like train_inputs, held out.
        test_labels: like train_labels, held out.
        num_classes: number of classes.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int


def load_digits(*, test_size: float = 0.2, seed: int = 0) -> ClassificationData:
    """Return scikit-learn's handwritten digits, 1797 grey images of 8 x 8 pixels.

    Args:
        test_size: Share of the images held out, each class in proportion.
        seed: Seed of the split.

    Returns:
        Inputs of shape (n, 1, 8, 8) between 0 and 1, labels of shape (n,).

    Source:
        E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (pixels / 16.0).astype("float32").reshape(-1, 1, 8, 8)
    train_inputs, test_inputs, train_labels, test_labels = train_test_split(
        images, labels, test_size=test_size, stratify=labels, random_state=seed
    )
    return ClassificationData(
        train_inputs=torch.from_numpy(train_inputs),
        train_labels=torch.from_numpy(train_labels).long(),
        test_inputs=torch.from_numpy(test_inputs),
        test_labels=torch.from_numpy(test_labels).long(),
        num_classes=10,
    )
