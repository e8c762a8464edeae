"""How a running search shows itself: a bar on a terminal, a line per trial elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastclip.tuner.study.records import finished_trials
from fastclip.tuner.study.search import TrialCallback
from fastclip.tuner.study.trial_run import STATUS_ATTR

Counts: TypeAlias = "Counter[str]"


def summary(study: optuna.Study) -> str:
    """Return the best score and the counts of exploded, pruned and failed trials, in one line."""
    counts: Counts = Counter(trial.user_attrs[STATUS_ATTR] for trial in finished_trials(study))
    failed = sum(counts[status] for status in ("error", "killed", "oom", "out of time"))
    parts = [
        f"{counts['exploded']} exploded",
        *([f"{counts['collapsed']} collapsed"] if counts["collapsed"] else []),
        f"{counts['pruned']} pruned",
        *([f"{failed} failed"] if failed else []),
    ]
    best = f"best {study.best_value:.4g}" if counts["ok"] or counts["collapsed"] else "no score yet"
    return ", ".join([best, *parts])


@contextmanager
def progress(console: Console | None = None, n_trials: int | None = None) -> Iterator[TrialCallback]:
    """Yield a callback for `TunerCV` that shows each finished trial and, on a terminal, the time left."""
    console = console or Console()
    if not console.is_terminal:
        yield lambda study, trial: console.print(
            f"{_line(trial)}  [{summary(study)}]", markup=False, soft_wrap=True
        )
        return
    columns = (
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("no score yet", total=n_trials)

        def show(study: optuna.Study, trial: FrozenTrial) -> None:
            del trial
            bar.update(task, completed=len(finished_trials(study)), description=summary(study))

        yield show


def _line(trial: FrozenTrial) -> str:
    status = trial.user_attrs[STATUS_ATTR]
    score = f" {trial.value:.4g}" if status in ("ok", "collapsed") and trial.value is not None else ""
    chosen = " ".join(f"{name}={short(value)}" for name, value in trial.params.items())
    return f"trial {trial.number}: {status}{score}  {chosen}"


def short(value: object) -> str:
    """Return a value with four digits, if it is a number."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
