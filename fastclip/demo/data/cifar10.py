"""CIFAR-10 in its binary version: 60,000 colour images of 32 x 32 pixels in ten classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastclip.demo.data.classification import ClassificationData, LabelledPixels, standardise
from fastclip.demo.data.errors import DataError

SUBFOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)

NUM_CLASSES = 10
SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
"""A label, then the red, green and blue pixels, row by row."""

DOWNLOAD = "It is in cifar-10-binary.tar.gz at https://www.cs.toronto.edu/~kriz/cifar.html."


def load_cifar10(
    folder: Path, *, num_train: int = 50_000, num_test: int = 10_000, seed: int = 0
) -> ClassificationData:
    """Return CIFAR-10, each channel standardised.

    Args:
        folder: Holds data_batch_1.bin to data_batch_5.bin and test_batch.bin, or a folder
            cifar-10-batches-bin that does. A file may hold any number of records.
        num_train: Training images to take at most, drawn from all of them.
        num_test: Test images to take at most.
        seed: Seed of what is taken.

    Returns:
        Inputs of shape (n, 3, 32, 32), labels of shape (n,).

    Raises:
        DataError: a file is missing, truncated, or of another kind.

    Source:
        A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    if (folder / SUBFOLDER).is_dir():
        folder = folder / SUBFOLDER
    train = _read_files([folder / name for name in TRAIN_FILES]).sample(num_train, seed)
    test = _read_files([folder / name for name in TEST_FILES]).sample(num_test, seed)
    return standardise(train, test, NUM_CLASSES)


def _read_files(paths: Sequence[Path]) -> LabelledPixels:
    parts = [_read_file(path) for path in paths]
    return LabelledPixels(
        np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts])
    )


def _read_file(path: Path) -> LabelledPixels:
    if not path.is_file():
        python_version = path.with_suffix("")
        found = f", only {python_version.name} of the Python version" if python_version.exists() else ""
        raise DataError(f"load_cifar10: {path} is missing{found}; expected the binary version. {DOWNLOAD}")
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) == 0 or len(content) % RECORD_BYTES:
        raise DataError(
            f"load_cifar10: {path} has {len(content)} bytes, and so is truncated or of another kind; "
            f"expected a whole number of records of {RECORD_BYTES} bytes. {DOWNLOAD}"
        )
    records = content.reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= NUM_CLASSES:
        record = int((labels >= NUM_CLASSES).argmax())
        raise DataError(
            f"load_cifar10: {path} has label {labels[record]} in record {record}, and so is of another kind; "
            f"expected labels from 0 to {NUM_CLASSES - 1}. {DOWNLOAD}"
        )
    return LabelledPixels(records[:, 1:].reshape(-1, *SHAPE), labels)
