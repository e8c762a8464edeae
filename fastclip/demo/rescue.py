"""One network trained at a rate that only clipping survives, and with a batch of NaN on the way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from fastclip.bench.runner import torch_threads
from fastclip.demo.plot import plot_histories
from fastclip.demo.report import runs_table
from fastclip.demo.runs import Run
from fastclip.demo.tasks import Expectation, Task
from fastclip.demo.training import History, train
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
    failures = [] if task.expectation is None else _failures(histories, task, task.expectation)
    verdict = _verdict(histories, task, failures)
    recipe = task.recipe
    setting = (
        f"{task.title}, SGD at rate {recipe.learning_rate:g}, momentum {recipe.momentum:g}, "
        f"batch {recipe.batch_size}, seed {recipe.seed}"
    )
    figure = output / f"{task.name}.png"
    plot_histories(
        histories,
        figure,
        title=verdict,
        subtitle=setting,
        measure=task.measure,
        guessing_loss=task.guessing_loss,
    )
    console.print(runs_table(histories, setting, task.measure))
    console.print(f"Loss and gradient norm of every step: {figure}", soft_wrap=True)
    for folder in sorted(path for path in (output / RUNS).glob("*") if path.is_dir()):
        page = write_report(read(folder), folder / "report.html")
        console.print(f"What the monitor saw: {page}, or fastclip monitor {folder}", soft_wrap=True)
    style = "red" if failures else "green"
    console.print(": ".join([verdict, *failures]) + ".", style=style, soft_wrap=True)
    return not failures


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
            console.print(f"Trained {run.name}: {measure.name} {measure.show(histories[-1].score)}.")
    return histories


def _fresh(folder: Path) -> Path:
    """Return a folder without a run of an earlier demo, which a monitor would go on with."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _failures(histories: Sequence[History], task: Task, expectation: Expectation) -> list[str]:
    """Say which runs did not end as they should."""
    measure = task.measure
    failures: list[str] = []
    for history in histories:
        run, skipped = history.run, history.stats.skipped
        bound = expectation.clipped if run.learns else expectation.unclipped
        if measure.is_at_least(history.score, bound) is not run.learns:
            failures.append(
                f"{run.name} reached {measure.show(history.score)}, expected "
                f"{'at least as good as' if run.learns else 'worse than'} {measure.show(bound)}"
            )
        if skipped != run.expected_skips:
            failures.append(f"{run.name} skipped {skipped} steps, expected {run.expected_skips}")
    return failures


def _verdict(histories: Sequence[History], task: Task, failures: Sequence[str]) -> str:
    if failures:
        return "The rescue failed"
    if task.expectation is None:
        scores = [f"{history.run.name} {task.measure.show(history.score)}" for history in histories]
        return f"{task.measure.name.capitalize()}: {', '.join(scores)}"
    rescued = "Unclipped, the network ends at guessing or worse; clipped, it learns"
    if any(history.run.has_nan for history in histories):
        return f"{rescued}. A batch of NaN costs one step with fastclip, the run with torch"
    return rescued
