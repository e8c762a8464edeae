"""Epochs of folds under way: callbacks, and intermediate values of the study."""

from __future__ import annotations

import math

import optuna
import pytest
import tuner_cases as cases

from fastclip.tuner import Choice, Verdict
from fastclip.tuner.study import epochs
from fastclip.tuner.study.epochs import Epochs

optuna.logging.set_verbosity(optuna.logging.WARNING)

GRID = {"lr": Choice([0.05, 0.2])}
JOBS = pytest.mark.parametrize("n_jobs", [1, 2], ids=["inline", "processes"])


def grid(**options):
    settings = {"sampler": "grid", "n_trials": None, "refit": False, **options}
    return cases.tuner(options.pop("model", cases.mlp), GRID, **settings)


class Seen:
    """An epoch callback that keeps what it is called with."""

    def __init__(self):
        self.calls = {}

    def __call__(self, trial, fold, record):
        self.calls.setdefault((trial.number, fold), []).append((trial.params, record))
        record["epoch"] = "spoiled"  # a copy, which nobody else sees


def failing(trial, fold, record):
    if (trial.number, fold, record["epoch"]) == (1, 0, 1.0):
        raise OSError("the disk of the logger is full")


class TestCallbacks:
    @JOBS
    def test_see_every_epoch_of_every_fold_in_this_process(self, n_jobs):
        seen = Seen()
        search = grid(n_jobs=n_jobs, epoch_callbacks=[seen]).fit(cases.blobs())
        assert sorted(seen.calls) == [(trial, fold) for trial in range(2) for fold in range(2)]
        for record in search.records_:
            for fold in record.folds:
                told = seen.calls[record.number, fold.fold]
                assert [params for params, _ in told] == [record.chosen] * 3
                losses = [epoch["train_loss"] for _, epoch in told]
                accuracies = [epoch["accuracy"] for _, epoch in told]
                assert accuracies[-1] == fold.metrics["accuracy"]
                assert losses == sorted(losses, reverse=True)

    @JOBS
    def test_what_one_raises_ends_the_search_which_goes_on_later(self, n_jobs, tmp_path):
        options = {"n_jobs": n_jobs, "output_dir": tmp_path / "run"}
        with pytest.raises(OSError, match="the disk of the logger is full"):
            grid(epoch_callbacks=[failing], **options).fit(cases.blobs())
        study = optuna.load_study(study_name="fastclip", storage=f"sqlite:///{tmp_path}/run/study.db")
        assert study.trials[1].state is optuna.trial.TrialState.RUNNING
        resumed = grid(resume=True, **options).fit(cases.blobs())
        assert [record.status for record in resumed.records_] == [Verdict.OK, Verdict.OK]
        whole = grid().fit(cases.blobs())
        assert (
            resumed.cv_results_["mean_test_score"].tolist() == whole.cv_results_["mean_test_score"].tolist()
        )

    def test_that_return_something_are_refused(self):
        with pytest.raises(
            TypeError, match=r"epoch callback <lambda> returned True; expected None. A pruner"
        ):
            grid(epoch_callbacks=[lambda *_: True]).fit(cases.blobs())


@pytest.fixture
def all_of_the_time(monkeypatch):
    monkeypatch.setattr(epochs, "MAX_SHARE", 1.0)


class TestIntermediateValues:
    @JOBS
    def test_are_the_means_over_the_folds_so_far_without_a_pruner(self, n_jobs, all_of_the_time):
        seen = Seen()
        search = grid(n_jobs=n_jobs, epoch_callbacks=[seen]).fit(cases.blobs())
        for trial in search.study_.trials:
            first, second = ([e["accuracy"] for _, e in seen.calls[trial.number, fold]] for fold in range(2))
            expected = {
                **dict(enumerate(first)),
                **{3 + i: (first[-1] + a) / 2 for i, a in enumerate(second)},
            }
            assert trial.intermediate_values == pytest.approx(expected)
            assert trial.intermediate_values[5] == pytest.approx(trial.value)

    def test_are_those_that_a_pruner_sees(self, all_of_the_time):
        never = optuna.pruners.ThresholdPruner(lower=-1.0)
        values = [
            [trial.intermediate_values for trial in grid(pruner=pruner).fit(cases.blobs()).study_.trials]
            for pruner in (None, never)
        ]
        assert values[0] == values[1]

    def test_of_a_fold_after_one_that_exploded_are_left_out(self, all_of_the_time):
        search = cases.tuner(
            cases.nan_above_half, {"lr": Choice([0.1, 0.9])}, sampler="grid", n_trials=None, refit=False
        ).fit(cases.blobs())
        assert [len(trial.intermediate_values) for trial in search.study_.trials] == [6, 1]

    def test_take_at_most_a_hundredth_of_the_time_and_the_newest_come_first(self, monkeypatch):
        clock = Clock(monkeypatch)
        run = Run(clock, cost=0.02)
        reports = Epochs(Scored(), 10, prunes=False)
        for epoch in range(10):
            clock.now += 1.0
            reports.take(run, 0, {"epoch": float(epoch), "score": float(epoch)})
        # One report costs what two seconds allow.
        assert [step for _, step in run.reported_values] == [0, 1, 3, 5, 7, 9]
        assert len(run.reported_values) * 0.02 <= 0.01 * clock.now + 0.02

    def test_that_wait_are_written_at_the_end_of_a_fold_and_steps_once(self, monkeypatch):
        clock = Clock(monkeypatch)
        run = Run(clock, cost=0.0)
        reports = Epochs(Scored(), 10, prunes=False)
        for epoch in range(2):
            reports.take(run, 1, {"epoch": float(epoch), "score": 0.5})
        run.results[1] = Result(0.5)  # before the fold before it
        reports.end_fold(run)
        assert run.reported_values == []
        run.results[0] = Result(0.1)
        reports.end_fold(run)
        assert sorted(run.reported_values) == [(pytest.approx(0.3), 10), (pytest.approx(0.3), 11)]
        reports.take(run, 1, {"epoch": 1.0, "score": 0.5})  # a worker was lost, and another trains the fold
        assert len(run.reported_values) == 2

    def test_of_a_trial_that_another_process_took_over_end_its_fold(self, monkeypatch):
        run = Run(Clock(monkeypatch), cost=0.0)

        def report(value, step):
            raise optuna.exceptions.UpdateFinishedTrialError

        run.report = report
        reports = Epochs(Scored(), 10, prunes=False)
        assert (
            reports.take(run, 0, {"epoch": 0.0, "score": 0.5}) is False
        )  # what nobody waits for ends nothing
        assert run.is_lost
        assert reports.take(run, 0, {"epoch": 1.0, "score": 0.5}) is True

    def test_the_pruner_is_asked_for_each_that_is_finite(self, monkeypatch):
        run = Run(Clock(monkeypatch), cost=5.0)
        reports = Epochs(Scored(), 10, prunes=True)
        told = [
            reports.take(run, 0, {"epoch": float(i), "score": s}) for i, s in enumerate([0.5, math.inf, 0.25])
        ]
        assert told == [True, False, True]
        assert run.reported_values == [(0.5, 0), (0.25, 2)]


class Clock:
    """A clock in the place of the one that `epochs` reads."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(epochs, "perf_counter", lambda: self.now)


class Scored:
    """Stands for a `Scoring`."""

    primary = "score"


class Result:
    """Stands for the result of a fold."""

    def __init__(self, score):
        self.score = score


class Run:
    """Stands for a `TrialRun` and its trial, whose reports take so many seconds."""

    n_folds, number, is_lost, is_finished = 3, 0, False, False

    def __init__(self, clock, cost):
        self.trial, self._clock, self._cost = self, clock, cost
        self.results, self.reported, self.reported_values = {}, set(), []

    def report(self, value, step):
        self._clock.now += self._cost
        self.reported_values.append((value, step))

    def should_prune(self):
        return True
