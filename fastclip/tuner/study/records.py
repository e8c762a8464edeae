"""What a study holds, read back trial by trial: the source of cv_results_, the tables and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from scipy.stats import rankdata

from fastclip.tuner.study.trial_run import PARAMS_ATTR, STATUS_ATTR, STEPS_ATTR, fold_attr
from fastclip.tuner.training.explosion import TOLD_AS_WORST, WITH_SCORE, Verdict
from fastclip.tuner.training.folds import FoldResult


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial.

    Attributes:
        number: Optuna's trial number.
        status: How it ended.
        params: Its parameters, with `lr` worked out, those that are plain values as they are, others as text.
        chosen: The parameters that the sampler chose.
        score: The plain mean over its folds; the worst value for an explosion; None when failed or pruned.
        steps_survived: Optimizer steps of all folds.
        folds: One result per fold; folds after the decisive one are `Verdict.NOT_RUN`. Without histories.
    """

    number: int
    status: Verdict
    params: dict[str, Any]
    chosen: dict[str, Any]
    score: float | None
    steps_survived: int
    folds: list[FoldResult]

    @property
    def has_score(self) -> bool:
        """Whether the trial may be the best one."""
        return self.status in WITH_SCORE


def finished_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that were told; one whose worker vanished was not, and its copy stands for it."""
    return [
        t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and STATUS_ATTR in t.user_attrs
    ]


def collect(study: optuna.Study, n_folds: int) -> list[TrialRecord]:
    """Return the finished trials of a study in the order of their numbers."""
    return [_record(trial, n_folds) for trial in finished_trials(study)]


def cv_results(
    records: Sequence[TrialRecord],
    metrics: Mapping[str, str],
    primary: str,
    sign: int,
    *,
    has_train_scores: bool = False,
) -> dict[str, Any]:
    """Return scikit-learn's `cv_results_`, with the status and clip fraction of every fold.

    A fold without a score is NaN in `split{i}_*`, except that an exploded one has the worst value; the mean
    of a trial with an exploded fold is the worst value, of a failed or pruned one NaN, ranked last.

    Args:
        records: Finished trials.
        metrics: Name of a metric -> its name in the keys, `score` for a single one.
        primary: The metric that the search follows.
        sign: 1 when larger is better, -1 otherwise.
        has_train_scores: Whether `split{i}_train_*` and their means are there, too.
    """
    n_folds = len(records[0].folds) if records else 0
    results: dict[str, Any] = {}
    for name, attribute in (("fit_time", "fit_seconds"), ("score_time", "score_seconds")):
        seconds = np.array([[getattr(fold, attribute) for fold in r.folds] for r in records])
        results[f"mean_{name}"] = seconds.mean(axis=1)
        results[f"std_{name}"] = seconds.std(axis=1)
    for name in sorted({name for record in records for name in record.params}):
        results[f"param_{name}"] = _masked([record.params.get(name, np.ma.masked) for record in records])
    results["params"] = [dict(record.params) for record in records]
    for metric, key in metrics.items():
        scores = np.array([[fold_score(fold, metric, -sign * np.inf) for fold in r.folds] for r in records])
        parts = {"test": scores}
        if has_train_scores:
            worst = -sign * np.inf
            parts["train"] = np.array(
                [[fold_score(f, metric, worst, "train") for f in r.folds] for r in records]
            )
        for part, table in parts.items():
            for i in range(n_folds):
                results[f"split{i}_{part}_{key}"] = table[:, i]
            paired = list(zip(records, table, strict=True))
            results[f"mean_{part}_{key}"] = np.array([_mean(r, row, -sign * np.inf) for r, row in paired])
            results[f"std_{part}_{key}"] = np.array([_std(r, row) for r, row in paired])
        means = results[f"mean_test_{key}"]
        if metric == primary:
            worst_last = np.where(np.isnan(means), np.inf, -sign * means)
            results[f"rank_test_{key}"] = rankdata(worst_last, method="min").astype(np.int32)
    for i in range(n_folds):
        results[f"split{i}_status"] = np.array(
            [str(record.folds[i].status) for record in records], dtype=object
        )
        results[f"split{i}_clip_fraction"] = np.array([record.folds[i].clip_fraction for record in records])
    return results


def ranked(records: Sequence[TrialRecord], direction: str) -> list[int]:
    """Return the indices of the trials with a score, the best first, earlier ones first among equals."""
    sign = 1 if direction == "maximize" else -1
    scored = [(i, record.score) for i, record in enumerate(records) if record.has_score]
    return [i for i, score in sorted(scored, key=lambda pair: -sign * (pair[1] or 0.0))]


def explosions(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return one dict per exploded fold: trial, fold, params and what `TrainingRun.explosion` holds."""
    return [
        {"trial": record.number, "fold": fold.fold, "params": record.params, **fold.explosion}
        for record in records
        for fold in record.folds
        if fold.explosion is not None
    ]


def _record(trial: optuna.trial.FrozenTrial, n_folds: int) -> TrialRecord:
    attributes = trial.user_attrs
    folds = [
        FoldResult.from_dict({**attributes[fold_attr(i)], "trial": trial.number})
        if attributes.get(fold_attr(i)) is not None
        else FoldResult(trial.number, i, Verdict.NOT_RUN)
        for i in range(n_folds)
    ]
    status = Verdict(attributes[STATUS_ATTR])
    return TrialRecord(
        trial.number,
        status,
        attributes[PARAMS_ATTR],
        trial.params,
        trial.value if status in WITH_SCORE or status in TOLD_AS_WORST else None,
        attributes[STEPS_ATTR],
        folds,
    )


def fold_score(fold: FoldResult, metric: str, worst: float, part: str = "test") -> float:
    """Return a metric of a fold: the worst value for an explosion, NaN for a fold without a score."""
    if fold.status in TOLD_AS_WORST:
        return worst
    return (
        (fold.metrics if part == "test" else fold.train_metrics).get(metric, np.nan)
        if fold.status in WITH_SCORE
        else np.nan
    )


def _mean(record: TrialRecord, scores: npt.NDArray[np.float64], worst: float) -> float:
    if record.status in TOLD_AS_WORST:
        return worst
    return float(_scored(record, scores).mean()) if record.has_score else np.nan


def _std(record: TrialRecord, scores: npt.NDArray[np.float64]) -> float:
    return float(_scored(record, scores).std()) if record.has_score else np.nan


def _scored(record: TrialRecord, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return scores[[fold.status in WITH_SCORE for fold in record.folds]]


def _masked(values: list[Any]) -> np.ma.MaskedArray[Any, Any]:
    column = np.ma.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column
