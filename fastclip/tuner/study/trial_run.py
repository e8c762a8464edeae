"""One trial on its way through the folds, and what it is told as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from fastclip.tuner.training.explosion import TOLD_AS_WORST, WITH_SCORE, Verdict
from fastclip.tuner.training.folds import FoldResult, FoldTask
from fastclip.tuner.training.scoring import Scoring

CONSTRAINT = "explosion"
FEASIBLE = -1.0
MIN_VIOLATION = 1e-6

STATUS_ATTR = "status"
PARAMS_ATTR = "params"
STEPS_ATTR = "steps_survived"


def fold_attr(fold: int) -> str:
    """Return the name of the trial attribute that holds the result of a fold."""
    return f"fold:{fold}"


class TrialRun:
    """A trial whose folds are being trained.

    The first fold that did not end ok decides the trial, whatever order folds finish in, and the folds after
    it count as not run. So a trial's outcome does not depend on the number of jobs.

    Args:
        trial: The Optuna trial; results of folds that an interrupted run finished are read from it.
        params: What the training loop and model_init get.
        n_folds: Number of splits.

    Attributes:
        results: Fold -> how it ended.
        in_flight: Folds that are being trained.
        is_lost: Another process has taken the trial over, so nothing more is stored.
        reported: Steps at which the study has an intermediate value.
    """

    def __init__(self, trial: optuna.Trial, params: dict[str, Any], n_folds: int) -> None:
        self.trial, self.params, self.n_folds = trial, params, n_folds
        attributes = trial.user_attrs
        self.results: dict[int, FoldResult] = {
            fold: FoldResult.from_dict({**attributes[fold_attr(fold)], "trial": trial.number})
            for fold in range(n_folds)
            if attributes.get(fold_attr(fold)) is not None
        }
        self.in_flight: set[int] = set()
        self.is_lost = False
        self.reported: set[int] = set(trial._cached_frozen_trial.intermediate_values)

    def next_task(self, deadline: float | None = None) -> FoldTask | None:
        """Return the next fold to train until the deadline, and count it as in flight; None without one."""
        if self.is_lost or decisive(self.results.values()) is not None:
            return None
        fold = next(
            (f for f in range(self.n_folds) if f not in self.results and f not in self.in_flight), None
        )
        if fold is None:
            return None
        self.in_flight.add(fold)
        return FoldTask(self.trial.number, fold, self.params, deadline=deadline)

    def take(self, result: FoldResult) -> None:
        """Take in the result of a fold."""
        self.in_flight.discard(result.fold)
        self.results[result.fold] = result

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        is_decided = (
            self.is_lost or len(self.results) == self.n_folds or decisive(self.results.values()) is not None
        )
        return is_decided and not self.in_flight

    def drop_folds_not_run(self) -> list[int]:
        """Forget the folds after the one that decided the trial; return their numbers."""
        first = decisive(self.results.values())
        dropped = [] if first is None else [fold for fold in self.results if fold > first.fold]
        for fold in dropped:
            del self.results[fold]
        return dropped

    def tell(self, scoring: Scoring) -> None:
        """Tell the study: an explosion as the worst value with a constraint, never NaN.

        Exploded and out-of-memory trials are COMPLETE, with a constraint above 0 that falls with the share of
        the planned steps that was survived; every other COMPLETE trial has -1. A trial with an error, a
        killed fold or no time left is FAIL, which samplers leave out.
        """
        folds = sorted(self.results.values(), key=lambda result: result.fold)
        status = verdict_of(folds)
        trial = self.trial
        trial.set_user_attr(STEPS_ATTR, sum(result.steps for result in folds))
        trial.set_user_attr(STATUS_ATTR, str(status))
        if status in WITH_SCORE:
            trial.set_constraint(CONSTRAINT, FEASIBLE)
            trial.study.tell(trial, mean_score(folds))
        elif status in TOLD_AS_WORST:
            trial.set_constraint(CONSTRAINT, _violation(folds, self.n_folds))
            trial.study.tell(trial, scoring.worst)
        else:
            state = TrialState.PRUNED if status is Verdict.PRUNED else TrialState.FAIL
            trial.study.tell(trial, state=state)


def decisive(results: Any) -> FoldResult | None:
    """Return the first fold, in the order of the folds, whose verdict ends the trial."""
    ended = [r for r in results if r.status not in (*WITH_SCORE, Verdict.DEGENERATE)]
    return min(ended, key=lambda result: result.fold, default=None)


def verdict_of(folds: Sequence[FoldResult]) -> Verdict:
    """Return how a trial with these folds ended: collapsed where one of them is and nothing worse came."""
    first = decisive(folds)
    if first is not None:
        return first.status
    has_collapsed = any(result.status is Verdict.COLLAPSED for result in folds)
    return Verdict.COLLAPSED if has_collapsed else Verdict.OK


def mean_score(folds: Sequence[FoldResult]) -> float:
    """Return the plain mean over the folds of a trial whose folds have scores.

    Degenerate folds are left out. They are the same for every trial, being a matter of the splits alone.
    """
    return float(np.mean([result.score for result in folds if result.status in WITH_SCORE]))


def _violation(folds: Sequence[FoldResult], n_folds: int) -> float:
    planned = max(result.planned_steps for result in folds) * n_folds
    survived = sum(result.steps for result in folds)
    return max(MIN_VIOLATION, 1.0 - survived / planned) if planned else 1.0
