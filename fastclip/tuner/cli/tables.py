"""What a command prints of a study, within the width of a terminal."""

from __future__ import annotations

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
