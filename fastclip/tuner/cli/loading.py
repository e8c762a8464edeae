"""Find what a command is about: the experiment of a file, the study of a storage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import optuna

from fastclip.tuner.config import Experiment, build, read_config
from fastclip.tuner.study.opening import CONFIG_ATTR
from fastclip.tuner.study.storage import check_exists, open_shared_storage


def search_path(folder: Path) -> None:
    """Let references find modules in a folder, as `python script.py` would."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def load(config: Path, overrides: tuple[str, ...], **options: Any) -> Experiment:
    """Build the experiment of a file; an option of None leaves the file's."""
    for folder in (Path.cwd(), config.absolute().parent):
        search_path(folder)
    table = read_config(config, overrides)
    return build(table, study_attrs={CONFIG_ATTR: table}, **given(options))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def load_study(storage: str, name: str) -> optuna.Study:
    """Open a study of a storage.

    Raises:
        FileNotFoundError: the storage is a file that is not there.
        ValueError: the storage holds no study of this name.
    """
    check_exists(storage, "tune")
    try:
        return optuna.load_study(study_name=name, storage=open_shared_storage(storage))
    except KeyError:
        raise ValueError(
            f"tune: {storage} holds no study {name!r}; expected one made by `tune run`."
        ) from None
