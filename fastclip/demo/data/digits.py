"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split

from fastclip.demo.data.classification import ClassificationData


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
