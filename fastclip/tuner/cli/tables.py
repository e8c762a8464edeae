"""What a command prints of a study, within the width of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from fastclip.tuner.progress import short, summary
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.study.storage import num_silent

SHOWN_TRIALS = 5

OF_TRAINING = ("epoch", "lr", "grad_norm_median", "grad_norm_max", "clip_fraction")
"""What the record of an epoch holds beside losses and measures."""


def show_results(console: Console, records: list[TrialRecord], study: optuna.Study) -> None:
    """Print the best trials and the counts."""
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    scored = sorted(
        (r for r in records if r.score is not None and r.has_score), key=lambda r: sign * (r.score or 0)
    )
    table = Table("trial", "score", "parameters", title=f"{len(records)} trials: {summary(study)}")
    for record in scored[:SHOWN_TRIALS]:
        chosen = {
            name: value for name, value in record.params.items() if name in record.chosen or name == "lr"
        }
        words = " ".join(f"{name}={short(value)}" for name, value in chosen.items())
        table.add_row(str(record.number), f"{record.score:.4g}", words)
    console.print(table)
    if scored:
        _show_folds(console, scored[0])


def _show_folds(console: Console, record: TrialRecord) -> None:
    """Print accuracy and loss, the mean over the folds; of the training part, too, where it was measured."""
    for part, folds in (
        ("training part", [fold.train_metrics for fold in record.folds if fold.train_metrics]),
        ("held-out part", [fold.metrics for fold in record.folds if fold.metrics]),
    ):
        means = {
            name: sum(fold[name] for fold in folds) / len(folds)
            for name in (folds[0] if folds else {})
            if name not in OF_TRAINING and not name.startswith("recall_")
        }
        if means:
            console.print(f"trial {record.number}, folds, {part}: {show_measures(means)}", soft_wrap=True)


def show_refit(console: Console, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print every measure of the refitted model on its training part, and on a holdout if there is one."""
    names = {"train": "refitted model on its training part", "test": "refitted model on its holdout"}
    for part, measures in scores.items():
        console.print(f"{names[part]}: {show_measures(measures)}", soft_wrap=True)


def show_measures(measures: Mapping[str, float]) -> str:
    """Return measures in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())


def show_skipped(console: Console, skipped: Sequence[str]) -> None:
    """Print what data of a kind left out by choice, one line each, if anything."""
    if skipped:
        console.print(f"left out of the data: {len(skipped)}")
    for sentence in skipped:
        console.print(f"  {sentence}", markup=False, soft_wrap=True)


def show_progress(console: Console, study: optuna.Study, output: OutputDir | None) -> None:
    """Print how many trials run, how many lost their process, and how many wait."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    running = states.count(TrialState.RUNNING)
    if output is None:
        killed, remedy = num_silent(study), "a worker takes it over"
    else:
        killed = running if running and not output.is_searched else 0
        remedy = "go on with --resume"
    parts = [f"{running - killed} running", *([f"{killed} killed ({remedy})"] if killed else [])]
    console.print(", ".join([*parts, f"{states.count(TrialState.WAITING)} waiting"]), soft_wrap=True)
