"""Set samples apart that no trial sees."""

from __future__ import annotations

from typing import Any

from sklearn.model_selection import GroupShuffleSplit

from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.splits import make_splits


def set_apart(data: TuningData, share: float, seed: int) -> tuple[TuningData, TuningData]:
    """Part data into what is searched on and what is tested on: by class, and no group in both.

    Args:
        data: All samples.
        share: Share of the samples, or of the groups, to test on, in (0, 1).
        seed: Chooses them.
    """
    splitter: Any = share
    if data.groups is not None:
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    train, test = make_splits(splitter, data, seed)[0]
    return data.subset(train), data.subset(test)
