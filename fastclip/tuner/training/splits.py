"""Make the splits of a study, once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastclip.tuner.training.data import TuningData

Indices = npt.NDArray[np.intp]
Split: TypeAlias = tuple[Indices, Indices]


def check_cv(cv: Any, *, is_classification: bool, seed: int) -> Any:
    """Return a splitter.

    Args:
        cv: Number of folds (stratified for classes, always shuffled), test share in (0, 1) for one split,
            a scikit-learn splitter, or an iterable of (train, test) index pairs.
        is_classification: Whether the targets are classes.
        seed: Gives a random splitter without a random_state its randomness.

    Raises:
        ValueError: a number that is neither.
        TypeError: anything else.
    """
    from sklearn.model_selection import KFold, ShuffleSplit, StratifiedKFold, StratifiedShuffleSplit

    if isinstance(cv, bool):
        raise TypeError(f"check_cv: cv={cv}; expected folds, a test share, a splitter or index pairs.")
    if isinstance(cv, (int, np.integer)):
        if cv < 2:
            raise ValueError(f"check_cv: cv={cv}; expected at least 2 folds, or a test share such as 0.2.")
        kind = StratifiedKFold if is_classification else KFold
        return kind(int(cv), shuffle=True, random_state=seed)
    if isinstance(cv, float):
        if not 0.0 < cv < 1.0:
            raise ValueError(f"check_cv: cv={cv}; expected a test share in (0, 1).")
        kind = StratifiedShuffleSplit if is_classification else ShuffleSplit
        return kind(1, test_size=cv, random_state=seed)
    if hasattr(cv, "split") and hasattr(cv, "get_n_splits"):
        if getattr(cv, "random_state", seed) is None and getattr(cv, "shuffle", True):
            cv = copy.copy(cv)
            cv.random_state = seed
        return cv
    if isinstance(cv, Iterable) and not isinstance(cv, (str, bytes)):
        return list(cv)
    raise TypeError(
        f"check_cv: cv={cv!r} is a {type(cv).__name__}; expected folds, a test share, a splitter or index "
        "pairs."
    )


def make_splits(cv: Any, data: TuningData, seed: int) -> list[Split]:
    """Return the (train, test) indices of every fold.

    Raises:
        ValueError: a pair is empty, overlaps or points outside the data.
    """
    labels = data.labels if data.labels.ndim == 1 else None
    is_classification = data.is_classification and labels is not None
    splitter = check_cv(cv, is_classification=is_classification, seed=seed)
    if isinstance(splitter, list):
        pairs = splitter
    else:
        rows = np.empty((len(data), 0))
        pairs = list(splitter.split(rows, labels, data.groups))
    splits = [(np.asarray(train, dtype=np.intp), np.asarray(test, dtype=np.intp)) for train, test in pairs]
    if not splits:
        raise ValueError("make_splits: cv gave no splits; expected at least one.")
    for fold, (train, test) in enumerate(splits):
        _check_split(fold, train, test, len(data))
    return splits


def fingerprint(splits: list[Split]) -> str:
    """Return a digest of the splits."""
    digest = hashlib.sha256()
    for train, test in splits:
        for part in (train, test):
            digest.update(str(len(part)).encode() + part.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def missing_classes(data: TuningData, split: Split) -> list[Any]:
    """Return the classes that occur in the test part of a split and never in its training part."""
    if not data.is_classification:
        return []
    train, test = split
    missing = np.setdiff1d(data.labels[test], data.labels[train])
    names = data.label_names
    return [
        label if names is None else str(names[label])
        for label in missing.tolist()
        if label != data.ignore_index
    ]


def describe_cv(cv: Any) -> str:
    """Return a splitter as text for the records of a study."""
    from sklearn.model_selection import BaseCrossValidator

    return repr(cv) if isinstance(cv, (int, float, BaseCrossValidator)) else type(cv).__name__


def _check_split(fold: int, train: Indices, test: Indices, n_samples: int) -> None:
    for name, part in (("training", train), ("test", test)):
        if len(part) == 0:
            raise ValueError(
                f"make_splits: the {name} part of fold {fold} is empty; expected samples in both parts."
            )
        if part.min() < 0 or part.max() >= n_samples:
            raise ValueError(
                f"make_splits: the {name} part of fold {fold} has indices from {part.min()} to {part.max()}; "
                f"expected 0 to {n_samples - 1}."
            )
    if np.intersect1d(train, test).size:
        raise ValueError(f"make_splits: the parts of fold {fold} share samples; expected disjoint parts.")
