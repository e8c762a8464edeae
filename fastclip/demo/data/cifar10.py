"""CIFAR-10: 60,000 colour images of 32 x 32 pixels in ten classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastclip.demo.data.cifar10_files import (
    DOWNLOAD,
    NUM_CLASSES,
    read_binary,
    read_class_names,
    read_python,
)
from fastclip.demo.data.classification import ClassificationData, LabelledPixels, standardise
from fastclip.demo.data.errors import DataError

TRAIN_STEMS = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_STEM = "test_batch"
CLASS_NAMES_FILE = "batches.meta"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Version:
    """One of the two forms in which the images are handed out.

    Attributes:
        name: What it is called.
        subfolder: The folder of its archive.
        suffix: Of its files.
        read: Reads one.
    """

    name: str
    subfolder: str
    suffix: str
    read: Callable[[Path], LabelledPixels]

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the path of each file by its stem."""
        return {stem: folder / f"{stem}{self.suffix}" for stem in (*TRAIN_STEMS, TEST_STEM)}


VERSIONS = (
    _Version("binary", "cifar-10-batches-bin", ".bin", read_binary),
    _Version("Python", "cifar-10-batches-py", "", read_python),
)


def load_cifar10(
    folder: Path, *, num_train: int = 50_000, num_test: int = 10_000, seed: int = 0
) -> ClassificationData:
    """Return CIFAR-10 in its binary or its Python version, each channel standardised.

    Args:
        folder: Holds data_batch_1 to data_batch_5 and test_batch, with .bin in the binary version and without
            in the Python version, which torchvision leaves; or a folder cifar-10-batches-bin or
            cifar-10-batches-py that does. A file may hold any number of images. Where both versions are,
            those in the folder itself are read, and of these the binary one. Pickles are read without running
            what they name.
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
    version, place = _find(folder)
    files = version.files(place)
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise DataError(
            f"load_cifar10: {', '.join(missing)} is missing from {place}; expected all "
            f"{len(files)} files of the {version.name} version. {DOWNLOAD}"
        )
    parts = {stem: version.read(path) for stem, path in files.items()}
    train = LabelledPixels(
        np.concatenate([parts[stem].pixels for stem in TRAIN_STEMS]),
        np.concatenate([parts[stem].labels for stem in TRAIN_STEMS]),
    )
    names = place / CLASS_NAMES_FILE
    return standardise(
        train.sample(num_train, seed),
        parts[TEST_STEM].sample(num_test, seed),
        NUM_CLASSES,
        classes=read_class_names(names) if names.is_file() else CLASSES,
    )


def _find(folder: Path) -> tuple[_Version, Path]:
    """Return the version that lies in the folder or in that of its archive, and where."""
    places = [(version, folder) for version in VERSIONS]
    places += [(version, folder / version.subfolder) for version in VERSIONS]
    for version, place in places:
        if any(path.is_file() for path in version.files(place).values()):
            return version, place
    raise DataError(
        f"load_cifar10: {folder} holds neither {TRAIN_STEMS[0]}.bin nor {TRAIN_STEMS[0]}, nor a folder "
        f"{' or '.join(version.subfolder for version in VERSIONS)} that does; expected the files of the "
        f"binary or of the Python version. {DOWNLOAD}"
    )
