"""Loggers of a search for TensorBoard and MLflow: curves of every fold, outcome of every trial.

board = TensorBoardLogger("runs/board")
tuner = TunerCV(..., callbacks=[board.on_trial], epoch_callbacks=[board.on_epoch])
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from fastclip.monitor.writers import summary_writer
from fastclip.tuner.study.trial_run import STATUS_ATTR
from fastclip.tuner.training.explosion import WITH_SCORE
from fastclip.tuner.training.stepping import EpochRecord

STATUSES_WITH_SCORE = tuple(map(str, WITH_SCORE))
STUDY_TAG, TRIAL_TAG = "fastclip.study", "fastclip.trial"


class TensorBoardLogger:
    """Writes a run `trial-<number>/fold-<number>` per fold, and parameters with the score per trial.

    Parameters and score are in TensorBoard's tab of hyperparameters; a trial without a score has its status
    alone. A fold that is trained again, after a resume or by another worker, begins anew.

    Args:
        folder: Where the runs lie.

    Raises:
        ImportError: the extra `tensorboard` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._open, self._folder = summary_writer("TensorBoardLogger"), Path(folder)
        self._writers: dict[tuple[int, int], Any] = {}

    def on_epoch(self, trial: optuna.Trial, fold: int, record: EpochRecord) -> None:
        """Write the record of an epoch, for `epoch_callbacks`."""
        key, epoch = (trial.number, fold), int(record["epoch"])
        if epoch == 0 and key in self._writers:  # a worker was lost
            self._writers.pop(key).close()
        if key not in self._writers:
            path = self._folder / f"trial-{trial.number}" / f"fold-{fold}"
            self._writers[key] = self._open(path, epoch)
        for name, value in record.items():
            if name != "epoch":
                self._writers[key].add_scalar(name, value, epoch)
        self._writers[key].flush()

    def on_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Write parameters and score of a finished trial, for `callbacks`."""
        del study
        for key in [key for key in self._writers if key[0] == trial.number]:
            self._writers.pop(key).close()
        status = trial.user_attrs[STATUS_ATTR]
        params = {name: value if _is_plain(value) else str(value) for name, value in trial.params.items()}
        scores = {"score": trial.value or 0.0} if status in STATUSES_WITH_SCORE else {}
        with self._open(self._folder / f"trial-{trial.number}", None) as writer:
            writer.add_hparams({**params, STATUS_ATTR: status}, scores, run_name=".")

    def close(self) -> None:
        """Close what a search that was stopped has left open."""
        while self._writers:
            self._writers.popitem()[1].close()


class MLflowLogger:
    """Writes an MLflow run per trial: parameters, `fold<number>/<measure>` per epoch, score and status.

    A resumed search goes on with the runs that it finds.

    Args:
        experiment: Name of the experiment, made if it is not there.
        tracking_uri: Where MLflow keeps it; None is MLflow's own choice.

    Raises:
        ImportError: the extra `mlflow` is not installed.
    """

    def __init__(self, experiment: str, tracking_uri: str | None = None) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise ImportError(
                "MLflowLogger: MLflow is not installed; expected the extra `mlflow`. pip install "
                "'fastclip[mlflow]'"
            ) from error
        self._metric, self._param = Metric, Param
        self._client = MlflowClient(tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)
        self._runs: dict[tuple[str, int], str] = {}

    def on_epoch(self, trial: optuna.Trial, fold: int, record: EpochRecord) -> None:
        """Write the record of an epoch, for `epoch_callbacks`."""
        step, now = int(record["epoch"]), _milliseconds()
        values = [(f"fold{fold}/{name}", value) for name, value in record.items() if name != "epoch"]
        self._client.log_batch(
            self._run(trial.study.study_name, trial.number),
            metrics=[self._metric(name, value, now, step) for name, value in values],
        )

    def on_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Write parameters and score of a finished trial and end its run, for `callbacks`."""
        run, status = self._run(study.study_name, trial.number), trial.user_attrs[STATUS_ATTR]
        scores = {"score": trial.value or 0.0} if status in STATUSES_WITH_SCORE else {}
        self._client.log_batch(
            run,
            params=[self._param(name, str(value)) for name, value in trial.params.items()],
            metrics=[self._metric(name, value, _milliseconds(), 0) for name, value in scores.items()],
        )
        self._client.set_tag(run, STATUS_ATTR, status)
        self._client.set_terminated(run, "FINISHED" if scores else "FAILED")
        del self._runs[study.study_name, trial.number]

    def _run(self, study: str, number: int) -> str:
        key = (study, number)
        if key not in self._runs:
            tags = {STUDY_TAG: study, TRIAL_TAG: str(number)}
            words = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
            found = self._client.search_runs([self._experiment], words, max_results=1)
            run = (
                found[0]
                if found
                else self._client.create_run(self._experiment, tags=tags, run_name=f"{study} trial {number}")
            )
            self._runs[key] = run.info.run_id
        return self._runs[key]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000
