"""What folders with a folder or a file per class have in common."""

from __future__ import annotations

import os
from pathlib import Path

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


def shown(path: Path) -> str:
    """Return a path that can be printed, also where its name is in no known encoding."""
    return os.fsencode(path).decode(errors="replace")


def is_hidden(path: Path) -> bool:
    """Tell whether a file manager would not show it."""
    return path.name.startswith(".")
