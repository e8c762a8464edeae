"""The search: ask for trials, keep the executor busy with their folds, tell the study."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from fastclip.files import plain
from fastclip.tuner.errors import AllTrialsFailedError
from fastclip.tuner.executors.base import Executor
from fastclip.tuner.study.epochs import Epochs, FoldEpochCallback
from fastclip.tuner.study.opening import OpenedStudy
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.study.records import collect, finished_trials
from fastclip.tuner.study.samplers import grid_points, sampler_for_trial
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.study.storage import Heartbeat, quiet_optuna, requeue_abandoned, stoppable
from fastclip.tuner.study.trial_run import PARAMS_ATTR, TrialRun, fold_attr
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.folds import FoldContext, FoldResult, FoldTask
from fastclip.tuner.training.stepping import EpochRecord

POLL_SECONDS = 1.0
WAIT_FOR_OTHERS_SECONDS = 1.0

TrialCallback: TypeAlias = Callable[[optuna.Study, FrozenTrial], None]


@dataclass
class Search:
    """A search over one study, which other processes may share.

    Attributes:
        opened: The study; this process alone writes it unless it is shared. Then abandoned trials are taken
            over by heartbeat, and the search ends when the study as a whole is done.
        spec: What was asked for. With a pruner the folds of a trial run one after the other.
        context: What all folds share.
        callbacks: Called with the study and each finished trial; after `study.stop()` in one of them no trial
            starts, and those under way are finished.
        epoch_callbacks: Called with the trial, the fold and the record of each epoch, see `Epochs`.
    """

    opened: OpenedStudy
    spec: StudySpec
    context: FoldContext
    callbacks: Sequence[TrialCallback] = ()
    epoch_callbacks: Sequence[FoldEpochCallback] = ()
    _runs: dict[int, TrialRun] = field(default_factory=dict, init=False)
    _has_trained: bool = field(default=False, init=False)
    _is_stopped: bool = field(default=False, init=False)
    _epochs: Epochs = field(init=False)

    def __post_init__(self) -> None:
        """Make what takes the epochs."""
        self._epochs = Epochs(
            self.context.objective.scoring,
            self.context.objective.stop.max_epochs,
            prunes=self.spec.prunes,
            callbacks=self.epoch_callbacks,
        )

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return self.opened.study

    @property
    def output(self) -> OutputDir | None:
        """Where tables and histories go."""
        return self.opened.output

    @property
    def is_shared(self) -> bool:
        """Whether other processes work on the study, too."""
        return self.opened.is_shared

    def run(self) -> None:
        """Search until the study is done.

        Raises:
            AllTrialsFailedError: the first fold ended in an error, so every other would too.
            KeyboardInterrupt: the user stopped it; finished folds are stored and a resumed search goes on
                after them.
        """
        executor = self.spec.make_executor(self.context, self.on_epoch)
        try:
            self._run(executor)
        finally:
            executor.close()

    def _run(self, executor: Executor) -> None:
        deadline = None if self.spec.timeout is None else time.time() + self.spec.timeout
        heartbeat = Heartbeat(self.study._storage) if self.is_shared else None
        self._has_trained = bool(finished_trials(self.study))
        try:
            with nullcontext() if self.output is None else self.output.search():
                self._prepare()
                self._work(executor, heartbeat, deadline)
        finally:
            if heartbeat is not None:
                heartbeat.close()

    def _work(self, executor: Executor, heartbeat: Heartbeat | None, deadline: float | None) -> None:
        """Train folds until none is left for this process."""
        while True:
            self._fill(executor, heartbeat, deadline)
            if self._runs:
                for result in executor.poll(POLL_SECONDS):
                    self._take(result, heartbeat)
            elif self._others_may_leave_work() and not (self._is_stopped or _is_past(deadline)):
                time.sleep(WAIT_FOR_OTHERS_SECONDS)
            else:
                return

    def on_epoch(self, task: FoldTask, record: EpochRecord) -> bool:
        """Take an epoch of a fold; return whether to prune it."""
        return self._epochs.take(self._runs[task.trial], task.fold, record)

    def _prepare(self) -> None:
        if self.spec.sampler == "grid" and not self.study.get_trials(deepcopy=False):
            for point in grid_points(self.spec.parameters):
                self.study.enqueue_trial(point)
        if not self.is_shared:
            for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                run = self._open(frozen.number, partial(optuna.Trial, self.study, frozen._trial_id))
                if run.is_finished:  # stopped between the last fold and the telling
                    self._finish(run, None)
            self._write_tables()

    def _fill(self, executor: Executor, heartbeat: Heartbeat | None, deadline: float | None) -> None:
        """Hand out folds while slots are free, those of trials under way first."""
        while sum(len(run.in_flight) for run in self._runs.values()) < executor.slots:
            tasks = (self._next_task(run, deadline) for run in self._runs.values())
            task = next(filter(None, tasks), None)
            if task is not None:
                executor.submit(task)
            elif self._is_stopped or _is_past(deadline) or not self._ask(heartbeat):
                return

    def _next_task(self, run: TrialRun, deadline: float | None) -> FoldTask | None:
        return None if self.spec.prunes and run.in_flight else run.next_task(deadline)

    def _ask(self, heartbeat: Heartbeat | None) -> bool:
        """Start a trial, unless the study has enough."""
        if self.is_shared:
            requeue_abandoned(self.study)
        trials = self.study.get_trials(deepcopy=False)
        running = sum(trial.state is TrialState.RUNNING for trial in trials)
        limit = self.spec.n_trials
        if limit is not None and len(finished_trials(self.study)) + running >= limit:
            return False
        if self.spec.sampler == "grid" and not any(trial.state is TrialState.WAITING for trial in trials):
            return False
        run = self._open(len(trials), self.study.ask, heartbeat)
        if run.is_finished:  # a copy of an abandoned trial whose folds were all done
            self._finish(run, heartbeat)
        return True

    def _open(
        self, number: int, start: Callable[[], optuna.Trial], heartbeat: Heartbeat | None = None
    ) -> TrialRun:
        if isinstance(self.spec.sampler, str):
            entropy = (self.context.seed, number, self.opened.salt)
            self.study.sampler = sampler_for_trial(self.spec.sampler, *entropy)
        with quiet_optuna():
            trial = start()
            if heartbeat is not None:  # at once: a trial without a sign of life is never taken over
                heartbeat.add(trial._trial_id)
            params = self.spec.parameters.sample(trial)
        trial.set_user_attr(PARAMS_ATTR, plain(params))
        run = TrialRun(trial, params, len(self.context.splits))
        self._runs[trial.number] = run
        return run

    def _take(self, result: FoldResult, heartbeat: Heartbeat | None) -> None:
        run = self._runs[result.trial]
        run.take(result)
        self._epochs.end_fold(run)
        if result.status in (Verdict.ERROR, Verdict.KILLED) and not self._has_trained:
            raise AllTrialsFailedError(
                f"TunerCV: the first fold to end (trial {result.trial}, fold {result.fold}, parameters "
                f"{plain(run.params)}) was {result.status}; expected it to train. What "
                f"happened:\n{result.message}"
            )
        self._has_trained |= result.status is not Verdict.DEGENERATE
        try:
            self._store(run, result)
        except optuna.exceptions.UpdateFinishedTrialError:  # silent for so long that it was taken over
            run.is_lost = True
        if run.is_finished:
            self._finish(run, heartbeat)

    def _store(self, run: TrialRun, result: FoldResult) -> None:
        if run.is_lost:
            return
        stored = result.to_dict()
        del stored["history"]
        run.trial.set_user_attr(fold_attr(result.fold), stored)
        if self.output is not None:
            self.output.write_history(result)

    def _finish(self, run: TrialRun, heartbeat: Heartbeat | None) -> None:
        del self._runs[run.trial.number]
        if heartbeat is not None:
            heartbeat.remove(run.trial._trial_id)
        if run.is_lost:
            return
        for fold in run.drop_folds_not_run():
            run.trial.set_user_attr(fold_attr(fold), None)
            if self.output is not None:
                self.output.remove_history(run.trial.number, fold)
        run.tell(self.context.objective.scoring)
        self._write_tables()
        with stoppable(self.study) as is_stopped:
            for callback in self.callbacks:
                callback(self.study, self.study._storage.get_trial(run.trial._trial_id))
        self._is_stopped |= is_stopped()

    def _write_tables(self) -> None:
        if self.output is not None:
            self.output.write_tables(collect(self.study, len(self.context.splits)))

    def _others_may_leave_work(self) -> bool:
        """Tell whether another process has a trial in hand that it might abandon."""
        return self.is_shared and bool(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.time() >= deadline
