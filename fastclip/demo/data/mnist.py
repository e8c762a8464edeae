"""MNIST and its relatives in idx files: grey images in ten classes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastclip.demo.data.classification import ClassificationData, LabelledPixels, standardise
from fastclip.demo.data.errors import DataError

SUBFOLDER = Path("MNIST", "raw")
"""Where torchvision puts the files."""

NUM_CLASSES = 10
UNSIGNED_BYTE = 8
"""The code of the element type in the third byte of an idx file."""


def load_mnist(
    folder: Path, *, num_train: int = 60_000, num_test: int = 10_000, seed: int = 0
) -> ClassificationData:
    """Return MNIST, or a data set in its format with ten classes such as Fashion-MNIST, standardised.

    Args:
        folder: Holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each as it is or with .gz, or a folder MNIST/raw that does.
        num_train: Training images to take at most, drawn from all of them.
        num_test: Test images to take at most.
        seed: Seed of what is taken.

    Returns:
        Inputs of shape (n, 1, 28, 28), or whatever size the files have, and labels of shape (n,).

    Raises:
        DataError: a file is missing, truncated, or of another kind.

    Source:
        Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998.
    """
    if (folder / SUBFOLDER).is_dir():
        folder = folder / SUBFOLDER
    train = _read_part(folder, "train").sample(num_train, seed)
    test = _read_part(folder, "t10k").sample(num_test, seed)
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(
            f"load_mnist: the training images in {folder} are of shape {train.pixels.shape[1:]}, the test "
            f"images of shape {test.pixels.shape[1:]}; expected the same. Keep one data set in a folder."
        )
    return standardise(train, test, NUM_CLASSES)


def _read_part(folder: Path, part: str) -> LabelledPixels:
    images_path = _find(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = _read_idx(images_path, num_dims=3), _read_idx(labels_path, num_dims=1)
    if len(images) != len(labels) or images.size == 0:
        raise DataError(
            f"load_mnist: {images_path} has {len(images)} images of {images.shape[1:]} pixels and "
            f"{labels_path} has {len(labels)} labels; expected as many labels as images, and at least one."
        )
    if labels.max() >= NUM_CLASSES:
        raise DataError(
            f"load_mnist: {labels_path} has label {labels.max()}; expected labels from 0 to "
            f"{NUM_CLASSES - 1}. Take a data set with {NUM_CLASSES} classes."
        )
    return LabelledPixels(images[:, None], labels.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"load_mnist: {folder} holds neither {name} nor {name}.gz; expected one of them. Put the four files "
        "of MNIST or of Fashion-MNIST there."
    )


def _read_idx(path: Path, *, num_dims: int) -> NDArray[np.uint8]:
    """Return the array in an idx file.

    It begins with two zero bytes, the element type and the number of dimensions, then the length of each
    dimension in four bytes, the highest first; then come the elements.
    """
    content = _read_bytes(path)
    header_bytes = 4 + 4 * num_dims
    beginning = bytes((0, 0, UNSIGNED_BYTE, num_dims))
    if len(content) < header_bytes or content[:4] != beginning:
        raise DataError(
            f"load_mnist: {path} begins with {content[:4].hex(' ') or 'nothing'} and has {len(content)} "
            f"bytes, and so is truncated or of another kind; expected an idx file that begins with "
            f"{beginning.hex(' ')}. Download it again."
        )
    shape = np.frombuffer(content, dtype=">u4", count=num_dims, offset=4).tolist()
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        raise DataError(
            f"load_mnist: {path} has {len(content)} bytes (decompressed, where it is compressed), and so is "
            f"truncated or damaged; expected {expected_bytes} for its dimensions {shape}. Download it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"load_mnist: {path} cannot be decompressed ({error}), and so is truncated or of another kind; "
            "expected a gzip file. Download it again."
        ) from error
