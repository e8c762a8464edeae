"""Images in one folder per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.demo.data.classification import (
    ClassificationData,
    LabelledPixels,
    Pixels,
    sample_rows,
    standardise,
)
from fastclip.demo.data.errors import DataError, told
from fastclip.demo.data.folders import hold_out, is_hidden, shown, test_folder
from fastclip.demo.data.image_files import UnreadableImageError, find_reason
from fastclip.demo.data.image_files import read_image as _read_image

SIZE = 32


def load_image_folder(
    folder: Path,
    *,
    num_train: int = 50_000,
    num_test: int = 10_000,
    size: int = SIZE,
    skip_unreadable: bool = False,
    seed: int = 0,
) -> ClassificationData:
    """Return the images of a folder with a subfolder per class, each channel standardised.

    Args:
        folder: Holds a folder per class, or a folder `train` and one of `test`, `val`, `valid` and
            `validation` that do. Without a test folder a fifth of each class is held out. Only images may
            lie in the class folders; hidden files, and files beside the class folders, are passed over.
        num_train: Training images to take at most, drawn from all of them; only these are decoded, once.
        num_test: Test images to take at most.
        size: Height and width to which every image is resized.
        skip_unreadable: Leave out what is no image, is broken, or is a folder in a class folder, and list it
            in `skipped`: the result is that of a folder from which it was moved away. Files that are not
            taken are judged by their name, or by their header where the name is that of no image.
        seed: Seed of what is held out and taken.

    Returns:
        Colour images of shape (n, 3, size, size), labels of shape (n,); the classes are numbered in the
        order of their folders' names.

    Raises:
        DataError: size is below 1; folders are missing; a class has too few images that can be read; or,
            unless they are skipped, there are unreadable entries: all are found, and the first ten named.
    """
    if size < 1:
        raise DataError(f"load_image_folder: size={size}; expected a whole number of at least 1.")
    listed = _list_parts(folder)
    read = _Images(size)
    unreadable = [sentence for part in listed for sentence in part.unreadable]
    while True:
        train, test = listed if len(listed) == 2 else _split(listed[0], seed)
        train, test = train.sample(num_train, seed), test.sample(num_test, seed)
        broken = read.decode([*train.paths, *test.paths])
        unreadable += broken.values()
        if unreadable and not skip_unreadable:
            raise DataError(
                f"load_image_folder: {folder} has {told(unreadable)}; expected images only. Move away what "
                "is none and copy anew what is broken, or leave all of it out: skip_unreadable=True, in the "
                "demo --skip-unreadable."
            )
        if not broken:
            break
        listed = [part.without(broken) for part in listed]
    return standardise(
        read.labelled(train),
        read.labelled(test),
        len(train.classes),
        classes=train.classes,
        skipped=tuple(unreadable),
    )


@dataclass(frozen=True)
class _Listed:
    """Images found and not yet read.

    Attributes:
        folder: Where the class folders are.
        paths: Of the images.
        labels: The class of each.
        classes: The names of the classes.
        unreadable: What else lies in the class folders, each with the reason.
    """

    folder: Path
    paths: list[Path]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    unreadable: list[str]

    def sample(self, count: int, seed: int) -> _Listed:
        """Return at most `count` images, drawn without replacement."""
        return self.take(sample_rows(len(self.paths), count, seed))

    def take(self, rows: NDArray[np.intp]) -> _Listed:
        """Return the images in these rows."""
        return replace(self, paths=[self.paths[row] for row in rows], labels=self.labels[rows])

    def without(self, broken: Mapping[Path, str]) -> _Listed:
        """Return the images that are not among these.

        Raises:
            DataError: a class is left with none.
        """
        kept = self.take(np.flatnonzero([path not in broken for path in self.paths]))
        lost = sorted(set(self.labels.tolist()) - set(kept.labels.tolist()))
        if lost:
            place = self.folder / self.classes[lost[0]]
            found = [sentence for path, sentence in broken.items() if path.parent == place]
            raise DataError(
                f"load_image_folder: {place} is left with no image: it has {told(found)}; expected at "
                "least one that can be read. Copy them anew, or move the class away."
            )
        return kept


class _Images:
    """Decodes each image once, however often it is asked for.

    Args:
        size: Height and width to which every image is resized.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pixels: dict[Path, Pixels] = {}

    def decode(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Decode what has not been decoded yet; return those that cannot be, each with a sentence."""
        broken = {}
        for path in paths:
            if path not in self._pixels:
                try:
                    self._pixels[path] = _read_image(path, self._size)
                except UnreadableImageError as error:
                    broken[path] = f"{shown(path)} ({error})"
        return broken

    def labelled(self, listed: _Listed) -> LabelledPixels:
        """Return the pixels of images that have been decoded."""
        pixels: NDArray[Any] = np.stack([self._pixels[path] for path in listed.paths])
        return LabelledPixels(pixels.transpose(0, 3, 1, 2).copy(), listed.labels)


def _list_parts(folder: Path) -> list[_Listed]:
    """Return the images for training and those for testing, or all of them where they are in one folder."""
    if not (folder / "train").is_dir():
        return [_list_images(folder)]
    train, test = _list_images(folder / "train"), _list_images(test_folder(folder, "load_image_folder"))
    if test.classes != train.classes:
        raise DataError(
            f"load_image_folder: {test.folder} has the classes {', '.join(test.classes)}, "
            f"{train.folder} has {', '.join(train.classes)}; expected the same."
        )
    return [train, test]


def _list_images(folder: Path) -> _Listed:
    if not folder.is_dir():
        raise DataError(f"load_image_folder: {folder} is not a folder; expected one with a folder per class.")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path))
    if len(class_folders) < 2:
        raise DataError(
            f"load_image_folder: {folder} has {len(class_folders)} folders; expected one per class, at least "
            "two."
        )
    paths: list[Path] = []
    labels: list[int] = []
    unreadable: list[str] = []
    for label, class_folder in enumerate(class_folders):
        reasons = {p: find_reason(p) for p in sorted(class_folder.iterdir()) if not is_hidden(p)}
        found = [path for path, reason in reasons.items() if reason is None]
        others = [f"{shown(path)} ({reason})" for path, reason in reasons.items() if reason is not None]
        if not found:
            holds = f"has {told(others)}" if others else "is empty"
            raise DataError(f"load_image_folder: {class_folder} {holds}; expected at least one image.")
        paths += found
        labels += [label] * len(found)
        unreadable += others
    classes = tuple(path.name for path in class_folders)
    return _Listed(folder, paths, np.asarray(labels, dtype=np.int64), classes, unreadable)


def _split(listed: _Listed, seed: int) -> tuple[_Listed, _Listed]:
    """Hold a fifth of each class out."""
    counts = np.bincount(listed.labels)
    if counts.min() < 2:
        raise DataError(
            f"load_image_folder: {listed.folder / listed.classes[counts.argmin()]} has one image; expected "
            "at least two, one to train on and one to test on."
        )
    train, test = hold_out(listed.labels.tolist(), seed)
    return listed.take(np.array(train)), listed.take(np.array(test))
