"""Labelled inputs as tensors, and how pixels become them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.demo.data.errors import DataError
from fastclip.demo.models.image_shape import ImageShape

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
"""From 0 to 255; float32 where a file has more levels."""


@dataclass(frozen=True)
class ClassificationData:
    """Labelled images, parted into those to train on and those to test on.

    Attributes:
        train_inputs: float32, shape (n, channels, height, width).
        train_labels: int64 class of each image, 0 to num_classes - 1.
        test_inputs: like train_inputs, held out.
        test_labels: like train_labels, held out.
        num_classes: number of classes.
        classes: what they are called, in the order of their numbers; empty where they have no names.
        skipped: what was left out of the folder by the caller's choice, one sentence each.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width of an image."""
        channels, height, width = self.train_inputs.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class LabelledPixels:
    """Images as they come out of a file.

    Attributes:
        pixels: shape (n, channels, height, width).
        labels: int64, shape (n,).
    """

    pixels: Pixels
    labels: NDArray[np.int64]

    def sample(self, count: int, seed: int) -> LabelledPixels:
        """Return at most `count` images, drawn without replacement."""
        rows = sample_rows(len(self.labels), count, seed)
        return LabelledPixels(self.pixels[rows], self.labels[rows])


def sample_rows(num_rows: int, count: int, seed: int) -> NDArray[np.intp]:
    """Return at most `count` of the row numbers below num_rows, drawn without replacement.

    Raises:
        DataError: count is below 1.
    """
    if count < 1:
        raise DataError(f"sample_rows: {count} samples of {num_rows} are asked for; expected at least 1.")
    return np.random.default_rng(seed).permutation(num_rows)[:count].astype(np.intp)


def standardise(
    train: LabelledPixels,
    test: LabelledPixels,
    num_classes: int,
    *,
    classes: tuple[str, ...] = (),
    skipped: tuple[str, ...] = (),
) -> ClassificationData:
    """Return images whose channels have mean 0 and deviation 1 over the training images."""
    train_inputs, test_inputs = (torch.from_numpy(part.pixels).float() for part in (train, test))
    deviation, mean = torch.std_mean(train_inputs, dim=(0, 2, 3), correction=0, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1.0)  # a channel of one colour
    return ClassificationData(
        train_inputs=(train_inputs - mean) / deviation,
        train_labels=torch.from_numpy(train.labels),
        test_inputs=(test_inputs - mean) / deviation,
        test_labels=torch.from_numpy(test.labels),
        num_classes=num_classes,
        classes=classes,
        skipped=skipped,
    )
