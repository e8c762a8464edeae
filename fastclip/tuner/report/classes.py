"""How well each class is found: recall and the confusion matrix of the best trial."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastclip.tuner.report.study_view import StudyView


@dataclass(frozen=True)
class ClassRow:
    """One true class: its name, the share of it that was found, and what its samples were taken for."""

    name: str
    recall: float
    counts: list[int]


def class_rows(view: StudyView) -> list[ClassRow]:
    """Return a row for each class, summed over the folds of the best trial; none where there is no matrix."""
    if view.best is None:
        return []
    matrices = [fold.confusion for fold in view.best.folds if fold.confusion is not None]
    if not matrices:
        return []
    total = np.sum(matrices, axis=0)
    return [
        ClassRow(str(name), counts[i] / max(sum(counts), 1), counts)
        for i, (name, counts) in enumerate(zip(view.settings["classes"], total.tolist(), strict=True))
    ]


def train_score(view: StudyView) -> float | None:
    """Return the mean score of the best trial on the parts that it was trained on, where it was measured."""
    if view.best is None:
        return None
    primary = view.settings["primary"]
    scores = [fold.train_metrics[primary] for fold in view.best.folds if primary in fold.train_metrics]
    return float(np.mean(scores)) if scores else None
