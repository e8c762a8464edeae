"""Everything that the report shows, read from a study and its output directory."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from fastclip.tuner.study.opening import SETTINGS_ATTR
from fastclip.tuner.study.output import CONFIG, STUDY, OutputDir
from fastclip.tuner.study.records import TrialRecord, collect, explosions
from fastclip.tuner.study.storage import check_exists, open_storage
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.stepping import EpochRecord


class StudyView:
    """A study as it stands, finished or not.

    Args:
        study: A study that fastclip made.
        output: Its directory, which holds the epoch records, or None.

    Raises:
        ValueError: the study was not made by fastclip.
    """

    def __init__(self, study: optuna.Study, output: OutputDir | None = None) -> None:
        if SETTINGS_ATTR not in study.user_attrs:
            raise ValueError(
                f"StudyView: study {study.study_name!r} was not made by fastclip; expected one of TunerCV."
            )
        self.study, self.output = study, output
        self.settings: dict[str, Any] = study.user_attrs[SETTINGS_ATTR]
        self.run: dict[str, Any] = {}
        if output is not None and (output.path / CONFIG).exists():
            self.run = output.read_config()["run"]

    @classmethod
    def open(
        cls, output_dir: str | Path, storage: str | optuna.storages.BaseStorage | None = None
    ) -> StudyView:
        """Read the study of an output directory.

        Args:
            output_dir: A directory that `TunerCV` or `fastclip tune run` wrote.
            storage: Where the study is, when it is not in the directory.

        Raises:
            FileNotFoundError: the directory holds no study.
            ValueError: the storage does not hold the study of the directory.
        """
        output = OutputDir(output_dir)
        for name, remedy in (
            (CONFIG, "Give the output directory of a search."),
            (STUDY, "Give the storage URL of the study (--storage)."),
        ):
            if not (output.path / name).exists() and not (name == STUDY and storage is not None):
                raise FileNotFoundError(
                    f"StudyView.open: {output.path} has no {name}; expected what a search leaves. {remedy}"
                )
        name = output.read_config()["run"]["study_name"]
        storage = output.storage_url if storage is None else storage
        if isinstance(storage, str):
            check_exists(storage, "StudyView.open")
        try:
            opened = open_storage(storage) if isinstance(storage, str) else storage
            return cls(optuna.load_study(study_name=name, storage=opened), output)
        except KeyError:
            raise ValueError(
                f"StudyView.open: the storage holds no study {name!r}; expected the one of {output.path}."
            ) from None

    @cached_property
    def records(self) -> list[TrialRecord]:
        """The finished trials in the order of their numbers."""
        return collect(self.study, self.settings["n_folds"])

    @cached_property
    def num_under_way(self) -> int:
        """Trials that were asked for and not yet told: they run, or were interrupted."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    @property
    def sign(self) -> int:
        """1 when a larger score is better, -1 otherwise."""
        return 1 if self.settings["direction"] == "maximize" else -1

    @cached_property
    def ranked(self) -> list[TrialRecord]:
        """The trials with a score, the best first, earlier ones first among equals."""
        scored = [record for record in self.records if record.has_score]
        return sorted(scored, key=lambda record: -self.sign * (record.score or 0.0))

    @property
    def best(self) -> TrialRecord | None:
        """The best trial, if any has a score."""
        return self.ranked[0] if self.ranked else None

    @cached_property
    def shown(self) -> TrialRecord | None:
        """The trial that is looked at closely: the best, or the one that survived the most steps."""
        return self.best or max(self.records, key=lambda record: record.steps_survived, default=None)

    @cached_property
    def counts(self) -> Counter[Verdict]:
        """Number of finished trials per verdict."""
        return Counter(record.status for record in self.records)

    @cached_property
    def explosions(self) -> list[dict[str, Any]]:
        """One dict per exploded fold."""
        return explosions(self.records)

    @property
    def fit_seconds(self) -> float:
        """Time spent in training and evaluation, over all folds and workers."""
        return sum(fold.fit_seconds + fold.score_seconds for record in self.records for fold in record.folds)

    @cached_property
    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What each parameter was chosen from, as last seen."""
        return {
            name: distribution
            for trial in self.study.get_trials(deepcopy=False)
            for name, distribution in trial.distributions.items()
        }

    def curves(self, record: TrialRecord) -> list[list[EpochRecord]]:
        """Return the epoch records of a trial, one list per fold that finished an epoch."""
        if self.output is None:
            return []
        histories = [self.output.read_history(record.number, fold.fold) for fold in record.folds]
        return [history["history"] for history in histories if history is not None and history["history"]]


def clip_fraction(record: TrialRecord) -> float:
    """Return the share of a trial's steps that were clipped."""
    steps = sum(fold.steps for fold in record.folds)
    return sum(fold.clip_fraction * fold.steps for fold in record.folds) / steps if steps else 0.0


def number(value: Any) -> float | None:
    """Return a stored parameter as a finite number, or None when it is another thing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
