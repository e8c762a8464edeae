"""What folders with a folder or a file per class have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from fastclip.demo.data.errors import DataError

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Names of a folder of what is held out, beside a folder `train`."""

TEST_SHARE = 0.2
"""What is held out of each class where there is no such folder."""


def test_folder(folder: Path, caller: str) -> Path:
    """Return the folder of what is held out.

    Raises:
        DataError: there is none.
    """
    for name in TEST_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(
        f"{caller}: {folder} has a folder train and none of {', '.join(TEST_FOLDERS)}; expected one of them "
        "beside it."
    )


def hold_out(labels: Sequence[Any], seed: int) -> tuple[list[int], list[int]]:
    """Return the rows to train on and those held out, a fifth of each class and one at least."""
    num_held_out = max(round(TEST_SHARE * len(labels)), len(set(labels)))
    train, test = train_test_split(
        range(len(labels)), test_size=num_held_out, stratify=labels, random_state=seed
    )
    return train, test


def shown(path: Path) -> str:
    """Return a path that can be printed, also where its name is in no known encoding."""
    return os.fsencode(path).decode(errors="replace")


def is_hidden(path: Path) -> bool:
    """Tell whether a file manager would not show it."""
    return path.name.startswith(".")
