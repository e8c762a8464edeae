"""One network trained at a rate that only clipping survives, and with a batch of NaN on the way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fastclip.bench.runner import torch_threads
from fastclip.demo.history import History
from fastclip.demo.outcomes import conclude
from fastclip.demo.plot import plot_histories
from fastclip.demo.report import runs_table
from fastclip.demo.runs import Run
from fastclip.demo.tasks import Measure, Task
from fastclip.demo.training import train
from fastclip.monitor import read
from fastclip.monitor.report import write_report

RUNS = "monitor"
"""Folder, in that of the figure, of what the monitor saw of each run that fastclip clips."""


def rescue(console: Console, output: Path, task: Task, runs: Sequence[Run]) -> bool:
    """Train on a task in every way; print and plot what happened.

    Args:
        console: Where the progress, the table and the verdict go.
        output: Folder for the figure, `<name of the task>.png`.
        task: What the runs have in common.
        runs: How to train, the first one without a batch of NaN.

    Returns:
        True if every run ended as it is expected to; always True for a task that expects nothing.
    """
    histories = _train_each(console, task, runs, output / RUNS)
    conclusion = conclude(task, histories)
    recipe = task.recipe
    setting = (
        f"{task.title}, SGD at rate {recipe.learning_rate:g}, momentum {recipe.momentum:g}, "
        f"batch {recipe.batch_size}, seed {recipe.seed}"
    )
    figure = output / f"{task.name}.png"
    plot_histories(
        histories,
        figure,
        title=conclusion.verdict,
        subtitle=setting,
        measure=task.measure,
        guessing_loss=task.guessing_loss,
    )
    console.print(runs_table(histories, setting, task.measure))
    console.print(f"Loss and gradient norm of every step: {figure}", soft_wrap=True)
    for folder in sorted(path for path in (output / RUNS).glob("*") if path.is_dir()):
        page = write_report(read(folder), folder / "report.html")
        console.print(f"What the monitor saw: {page}, or fastclip monitor {folder}", soft_wrap=True)
    for detail in conclusion.details:
        console.print(f"{detail[0].upper()}{detail[1:]}.", soft_wrap=True)
    style = "red" if conclusion.failures else "green"
    sentence = ": ".join([conclusion.verdict, *conclusion.failures])
    console.print(f"{sentence}.", style=style, soft_wrap=True)
    return not conclusion.failures


def _train_each(console: Console, task: Task, runs: Sequence[Run], watched: Path) -> list[History]:
    """Return the history of every run; a monitor watches those that fastclip clips.

    One thread is as fast as several for networks this small, and makes the outcome the same on every number
    of cores.
    """
    measure = task.measure
    histories: list[History] = []
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with progress, torch_threads(1):
        for run in runs:
            bar = progress.add_task(f"training, {run.name}", total=task.recipe.epochs)
            nan_step = len(histories[0].losses) // 2 if run.has_nan else None
            on_epoch = partial(progress.advance, bar)
            folder = _fresh(watched / run.name.replace(" ", "")) if run.clipper == "fastclip" else None
            histories.append(train(task, run, nan_step=nan_step, on_epoch=on_epoch, watched=folder))
            console.print(f"Trained {run.name}: {_marks(histories[-1], measure)}.", soft_wrap=True)
    return histories


def _marks(history: History, measure: Measure) -> str:
    """Return how a run did on what it was trained on and on what was held out."""
    train, test = history.train, history.test
    values = f"{measure.train_name} {measure.show(train.value)}, {measure.name} {measure.show(test.value)}"
    if measure.is_loss:
        return f"{values}, {history.outcome}"
    return f"{values}, train loss {train.loss:.3g}, test loss {test.loss:.3g}, {history.outcome}"


def _fresh(folder: Path) -> Path:
    """Return a folder without a run of an earlier demo, which a monitor would go on with."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
