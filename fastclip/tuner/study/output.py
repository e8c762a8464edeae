"""The output directory of a study.

    config.json        the settings that fix the results, their fingerprints, and how it was run
    study.db           the Optuna study (SQLite), unless another storage was given
    splits.npz         train0, test0, train1, ...: the indices of every fold
    trials.csv         one row per finished trial; the same bytes for the same seed
    folds.csv          one row per fold, with times and messages
    history/           trial00003-fold1.json: epoch records and the histogram of gradient norms
    best_model.pt      params, score and state_dict of the refitted model
    report.html        what was found, written by `fastclip tune run` and `TunerCV.report`
    .searched          a lock, held by the process that searches and let go of when that ends or is killed

Every file is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from fastclip.files import atomic, plain, write_csv, write_json
from fastclip.tuner.errors import ResumeError
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.folds import FoldResult
from fastclip.tuner.training.splits import Split

CONFIG, STUDY, SPLITS, TRIALS, FOLDS, HISTORY, BEST, REPORT = (
    "config.json",
    "study.db",
    "splits.npz",
    "trials.csv",
    "folds.csv",
    "history",
    "best_model.pt",
    "report.html",
)


LOCK = ".searched"


class OutputDir:
    """Reads and writes the files of one study.

    Args:
        path: The directory; made when the first file is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def storage_url(self) -> str:
        """The storage URL of the embedded study."""
        return f"sqlite:///{(self.path / STUDY).absolute()}"

    @property
    def report_path(self) -> Path:
        """Where the report goes."""
        return self.path / REPORT

    def check_unused(self, caller: str) -> None:
        """Raise ResumeError when the directory holds anything, or is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise ResumeError(
                f"{caller}: output_dir {self.path} is a file; expected a new or an empty directory."
            )
        if self.path.exists() and any(self.path.iterdir()):
            raise ResumeError(
                f"{caller}: output_dir {self.path} is not empty; expected a new or an empty directory. "
                "Continue the study in it with resume=True (--resume), or choose another one."
            )

    @contextmanager
    def search(self) -> Iterator[None]:
        """Hold the directory for one search; the system lets go of it when the process is killed.

        Raises:
            ResumeError: another process holds it.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ResumeError(
                f"OutputDir: {self.path} is searched by another process; expected one at a time. Wait, "
                "or search together through a shared storage."
            ) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def is_searched(self) -> bool:
        """Whether a living process searches; trials under way without one were killed."""
        try:
            with self.search():
                return False
        except ResumeError:
            return True

    def write_config(self, settings: dict[str, Any], run: dict[str, Any]) -> None:
        """Write what fixes the results and how it was run."""
        write_json(self.path / CONFIG, {"settings": settings, "run": run})

    def read_config(self) -> dict[str, Any]:
        """Return what `write_config` wrote."""
        config: dict[str, Any] = json.loads((self.path / CONFIG).read_text())
        return config

    def write_splits(self, splits: Sequence[Split]) -> None:
        """Write the indices of every fold."""
        arrays = {
            f"{name}{i}": rows
            for i, split in enumerate(splits)
            for name, rows in zip(("train", "test"), split, strict=True)
        }
        with atomic(self.path / SPLITS) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    def read_splits(self) -> list[Split]:
        """Return the indices of every fold."""
        with np.load(self.path / SPLITS) as arrays:
            return [(arrays[f"train{i}"], arrays[f"test{i}"]) for i in range(len(arrays.files) // 2)]

    def write_tables(self, records: Sequence[TrialRecord]) -> None:
        """Write trials.csv and folds.csv."""
        write_csv(self.path / TRIALS, [_trial_row(record) for record in records])
        write_csv(self.path / FOLDS, [_fold_row(fold) for record in records for fold in record.folds])

    def history_path(self, trial: int, fold: int) -> Path:
        """Return where the history of a fold lies."""
        return self.path / HISTORY / f"trial{trial:05d}-fold{fold}.json"

    def write_history(self, result: FoldResult) -> None:
        """Write the epoch records and the norm histogram of a fold."""
        write_json(
            self.history_path(result.trial, result.fold),
            {
                "trial": result.trial,
                "fold": result.fold,
                "status": str(result.status),
                "history": result.history,
                "norm_counts": result.norm_counts,
                "explosion": result.explosion,
            },
        )

    def read_history(self, trial: int, fold: int) -> dict[str, Any] | None:
        """Return what `write_history` wrote, or None when the fold was not run."""
        path = self.history_path(trial, fold)
        if not path.exists():
            return None
        history: dict[str, Any] = json.loads(path.read_text())
        return history

    def remove_history(self, trial: int, fold: int) -> None:
        """Remove the history of a fold that does not count."""
        self.history_path(trial, fold).unlink(missing_ok=True)

    def write_best(self, model: nn.Module, params: dict[str, Any], score: float) -> None:
        """Write the refitted model.

        Raises:
            ValueError: a weight is not finite; such a model is never the best.
        """
        for name, value in model.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"OutputDir.write_best: {name} has non-finite values; expected finite weights."
                )
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        with atomic(self.path / BEST) as file:
            torch.save({"params": plain(params), "score": score, "state_dict": state}, file)


def _trial_row(record: TrialRecord) -> dict[str, Any]:
    scores = {f"split{fold.fold}_score": "" if fold.score is None else fold.score for fold in record.folds}
    return {
        "trial": record.number,
        "status": record.status,
        "score": "" if record.score is None else record.score,
        "steps_survived": record.steps_survived,
        **scores,
        **{f"param_{name}": value for name, value in record.params.items()},
    }


def _fold_row(fold: FoldResult) -> dict[str, Any]:
    lines = fold.message.strip().splitlines()
    return {
        "trial": fold.trial,
        "fold": fold.fold,
        "status": fold.status,
        "epochs": fold.epochs,
        "steps": fold.steps,
        "planned_steps": fold.planned_steps,
        "clip_fraction": fold.clip_fraction,
        "fit_seconds": round(fold.fit_seconds, 4),
        "score_seconds": round(fold.score_seconds, 4),
        "message": lines[-1] if lines else "",
        **fold.metrics,
        # Measured after training as the test part is, in place of the mean over the last epoch's steps.
        **{f"train_{name}": value for name, value in fold.train_metrics.items()},
    }
