"""Images in one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from sklearn.model_selection import train_test_split

from fastclip.demo.data.classification import (
    ClassificationData,
    LabelledPixels,
    Pixels,
    sample_rows,
    standardise,
)
from fastclip.demo.data.errors import DataError

TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_SHARE = 0.2
SIZE = 32


def load_image_folder(
    folder: Path, *, num_train: int = 50_000, num_test: int = 10_000, size: int = SIZE, seed: int = 0
) -> ClassificationData:
    """Return the images of a folder with a subfolder per class, each channel standardised.

    Args:
        folder: Holds a folder per class, or a folder `train` and one of `test`, `val`, `valid` and
            `validation` that do. Without a test folder a fifth of each class is held out. Only images may
            lie in the class folders; hidden files are passed over.
        num_train: Training images to take at most, drawn from all of them; only these are read.
        num_test: Test images to take at most.
        size: Height and width to which every image is resized.
        seed: Seed of what is held out and taken.

    Returns:
        Colour images of shape (n, 3, size, size), labels of shape (n,); the classes are numbered in the
        order of their folders' names.

    Raises:
        DataError: folders or images are missing, or a file is truncated or no image.
    """
    if (folder / "train").is_dir():
        train_paths, train_labels, classes = _list_images(folder / "train")
        test_folder = _test_folder(folder)
        test_paths, test_labels, test_classes = _list_images(test_folder)
        if test_classes != classes:
            raise DataError(
                f"load_image_folder: {test_folder} has the classes {', '.join(test_classes)}, "
                f"{folder / 'train'} has {', '.join(classes)}; expected the same."
            )
    else:
        paths, labels, classes = _list_images(folder)
        _check_splittable(folder, labels, classes)
        num_held_out = max(round(TEST_SHARE * len(paths)), len(classes))
        train_paths, test_paths, train_labels, test_labels = train_test_split(
            paths, labels, test_size=num_held_out, stratify=labels, random_state=seed
        )
    train_rows = sample_rows(len(train_paths), num_train, seed)
    test_rows = sample_rows(len(test_paths), num_test, seed)
    return standardise(
        LabelledPixels(_read([train_paths[row] for row in train_rows], size), train_labels[train_rows]),
        LabelledPixels(_read([test_paths[row] for row in test_rows], size), test_labels[test_rows]),
        len(classes),
    )


def _test_folder(folder: Path) -> Path:
    for name in TEST_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(
        f"load_image_folder: {folder} has a folder train and none of {', '.join(TEST_FOLDERS)}; expected one "
        "of them beside it."
    )


def _list_images(folder: Path) -> tuple[list[Path], NDArray[np.int64], list[str]]:
    """Return the paths in a folder, their labels, and the names of the classes."""
    if not folder.is_dir():
        raise DataError(f"load_image_folder: {folder} is not a folder; expected one with a folder per class.")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))
    if len(class_folders) < 2:
        raise DataError(
            f"load_image_folder: {folder} has {len(class_folders)} folders; expected one per class, at least "
            "two."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = sorted(path for path in class_folder.iterdir() if not _is_hidden(path))
        if not found:
            raise DataError(f"load_image_folder: {class_folder} is empty; expected at least one image.")
        paths += found
        labels += [label] * len(found)
    return paths, np.asarray(labels, dtype=np.int64), [path.name for path in class_folders]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _check_splittable(folder: Path, labels: NDArray[np.int64], classes: list[str]) -> None:
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise DataError(
            f"load_image_folder: {folder / classes[counts.argmin()]} has one image; expected at least "
            "two, one to train on and one to test on."
        )


def _read(paths: list[Path], size: int) -> Pixels:
    """Return the pixels of the images, shape (n, 3, size, size)."""
    images: list[NDArray[Any]] = [_read_image(path, size) for path in paths]
    return np.stack(images).transpose(0, 3, 1, 2).copy()


def _read_image(path: Path, size: int) -> Pixels:
    """Return one image, shape (size, size, 3), from 0 to 255; float32 if it has more levels."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                return _read_deep(image, path, size)
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except UnidentifiedImageError as error:
        raise DataError(
            f"load_image_folder: {path} is no image that Pillow knows; expected images only. Move it away."
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise DataError(
            f"load_image_folder: {path} cannot be read ({error}), and may be truncated; expected a "
            "whole image. Copy it anew, or move it away."
        ) from error


def _read_deep(image: Image.Image, path: Path, size: int) -> NDArray[np.float32]:
    """Return a grey image of 16 or 32 bits, or of floating-point numbers, which Pillow would cut off at 255.

    Integers are of 16 bits unless all are below 256; floating-point numbers run to 1, or to 255 if one is
    above.
    """
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I"):
        top = 255 if image.mode == "I" and image.format != "PNG" and values.max() <= 255 else 65535
    else:
        top = 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= top):  # or nan
        raise DataError(
            f"load_image_folder: {path} has values from {values.min():g} to {values.max():g}; expected 0 to "
            "65535 in an integer image, 0 to 1 or 0 to 255 in a floating-point one. Rescale it."
        )
    resized = Image.fromarray(values * (255 / top)).resize((size, size), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(resized)[..., None], 3, axis=-1)
