"""What becomes of each epoch of a fold: callbacks, intermediate values of the study, pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeAlias

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError

from fastclip.tuner.study.trial_run import TrialRun
from fastclip.tuner.training.scoring import Scoring
from fastclip.tuner.training.stepping import EpochRecord

MAX_SHARE = 0.01  # of a search that may go into intermediate values which no pruner waits for

FoldEpochCallback: TypeAlias = Callable[[optuna.Trial, int, EpochRecord], object]


class Epochs:
    """Takes the epochs of all folds under way.

    The intermediate value of an epoch is the mean over the finished folds before its own and its own score,
    at step fold * max_epochs + epoch: trials are compared at the same point of the same fold, and the number
    of jobs changes nothing. Without a pruner a value waits until the folds before its own are finished. The
    newest is written first, and what would take more than a hundredth of the search's time is left out.

    Args:
        scoring: The primary measure is what is reported.
        max_epochs: Epochs of a fold.
        prunes: Whether the study's pruner is asked after each epoch; then every value is reported.
        callbacks: Called with the Optuna trial, the fold and the record of the epoch.
    """

    def __init__(
        self, scoring: Scoring, max_epochs: int, *, prunes: bool, callbacks: Sequence[FoldEpochCallback] = ()
    ) -> None:
        self._scoring, self._max_epochs = scoring, max_epochs
        self._prunes, self._callbacks = prunes, callbacks
        self._waiting: dict[tuple[int, int], list[EpochRecord]] = {}
        self._started, self._spent = perf_counter(), 0.0

    def take(self, run: TrialRun, fold: int, record: EpochRecord) -> bool:
        """Take an epoch; return whether to prune its fold.

        Raises:
            TypeError: a callback returned something.
        """
        for callback in self._callbacks:
            answer = callback(run.trial, fold, dict(record))
            if answer is not None:
                name = getattr(callback, "__name__", type(callback).__name__)
                raise TypeError(
                    f"TunerCV: the epoch callback {name} returned {answer!r}; expected None. A pruner ends "
                    "folds, and study.stop() in one of `callbacks` the search."
                )
        if run.is_lost:
            return True
        if self._prunes:
            is_known = self._report(run, fold, record)
            return run.is_lost or (is_known and run.trial.should_prune())
        self._waiting.setdefault((run.trial.number, fold), []).append(record)
        if all(lower in run.results for lower in range(fold)):
            self._write(run, fold)
        return False

    def end_fold(self, run: TrialRun) -> None:
        """Write what has waited for a fold that is finished, as far as there is time.

        What a finished fold has left is forgotten, as is all of a trial that is decided.
        """
        for fold in range(run.n_folds):
            is_next = all(lower in run.results for lower in range(fold))
            if is_next:
                self._write(run, fold)
            if run.is_finished or (is_next and fold in run.results):
                self._waiting.pop((run.trial.number, fold), None)

    def _write(self, run: TrialRun, fold: int) -> None:
        waiting = self._waiting.get((run.trial.number, fold), [])
        while waiting and not run.is_lost:
            now = perf_counter()
            if self._spent > MAX_SHARE * (now - self._started):
                return
            self._report(run, fold, waiting.pop())
            self._spent += perf_counter() - now

    def _report(self, run: TrialRun, fold: int, record: EpochRecord) -> bool:
        """Report an epoch; return whether the study has a value for it, for which it must be finite."""
        step = fold * self._max_epochs + int(record["epoch"])
        scores = [run.results[lower].score for lower in range(fold) if lower in run.results]
        known = [score for score in (*scores, record[self._scoring.primary]) if score is not None]
        mean = float(np.mean(known))
        if not np.isfinite(mean):
            return False
        if step in run.reported:  # by a worker that was lost, or before a resume
            return True
        run.reported.add(step)
        try:
            run.trial.report(mean, step)
        except UpdateFinishedTrialError:  # silent for so long that another process took it over
            run.is_lost = True
        return True
