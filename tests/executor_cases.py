"""What every executor must do with folds that train, kill their worker or hang: tests to derive from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tuner_cases as cases

from fastclip.tuner.data import as_data
from fastclip.tuner.executors.base import device_slots
from fastclip.tuner.study.preparation import make_context
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.folds import FoldContext, FoldResult, FoldTask, run_fold


def context(model: Any = cases.mlp) -> FoldContext:
    """What the folds of these tests have in common."""
    spec = StudySpec(model, {}, "test", cv=3, max_epochs=3, n_jobs=2)
    return make_context(spec, as_data(cases.blobs(), caller="test"))


def drain(executor: Any, count: int, seconds: float = 120) -> list[FoldResult]:
    """Poll until `count` folds are back."""
    deadline, results = time.monotonic() + seconds, []
    while len(results) < count:
        assert time.monotonic() < deadline, f"only {len(results)} of {count} folds came back"
        results += executor.poll(1.0)
    return sorted(results, key=lambda result: (result.trial, result.fold))


def outcome(result: FoldResult) -> dict[str, Any]:
    """What must not depend on where a fold ran: everything but the times."""
    values = result.to_dict()
    return {name: values[name] for name in values if name not in ("fit_seconds", "score_seconds")}


def outcome_here(task: FoldTask) -> dict[str, Any]:
    """The outcome in this process."""
    return outcome(run_fold(context(), task, device_slots(None, 1)[0]))


class ExecutorContract:
    """Tests of a fixture `pool`: an executor of two workers that train `tuner_models.dangerous`."""

    lost: ClassVar[str]
    """How the message of a fold begins whose worker was lost."""
    hung: ClassVar[str]
    """The same, of a fold that hung."""

    def test_folds_are_those_of_this_process(self, pool: Any) -> None:
        tasks = [
            FoldTask(trial, fold, {"lr": lr}) for trial, lr in enumerate([0.1, 0.3]) for fold in range(2)
        ]
        results = []
        for part in (tasks[:2], tasks[2:]):
            for task in part:
                pool.submit(task)
            results += drain(pool, 2)
        assert [outcome(result) for result in results] == [outcome_here(task) for task in tasks]

    def test_killed_fold_is_tried_once_more(self, pool: Any, tmp_path: Path) -> None:
        marker = tmp_path / "killed"
        pool.submit(FoldTask(0, 0, {"lr": 0.1, "kill_unless": str(marker)}))
        (result,) = drain(pool, 1)
        assert marker.exists()
        assert outcome(result) == outcome_here(FoldTask(0, 0, {"lr": 0.1}))

    def test_fold_that_kills_twice_is_given_back_and_the_other_finishes(self, pool: Any) -> None:
        pool.submit(FoldTask(0, 0, {"lr": cases.DEADLY}))
        pool.submit(FoldTask(1, 1, {"lr": 0.1}))
        killed, fine = drain(pool, 2)
        assert (killed.status, fine.status) == (Verdict.KILLED, Verdict.OK)
        assert self.lost in killed.message
        assert killed.message.endswith("2 times")

    def test_hung_fold_is_given_back(self, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # Only here, so that a machine that pauses fails no other test.
        monkeypatch.setattr(pool, "_hang_timeout", 0.5)
        pool.submit(FoldTask(0, 0, {"lr": cases.HANGING}))
        (result,) = drain(pool, 1)
        assert result.status is Verdict.KILLED
        assert self.hung in result.message
