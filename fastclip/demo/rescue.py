"""One network trained at a rate that only clipping survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from rich.progress import Progress

import fastclip
from fastclip.bench.runner import torch_threads
from fastclip.demo.plot import plot_histories
from fastclip.demo.report import runs_table
from fastclip.demo.tasks import Task
from fastclip.demo.training import Clip, History, train

CLIPS: Mapping[str, Clip] = MappingProxyType(
    {"fastclip": fastclip.clip_grad_norm_, "torch": torch.nn.utils.clip_grad_norm_}
)
"""The functions whose clipping is to rescue the network."""


def rescue(console: Console, output: Path, task: Task, clips: Mapping[str, Clip]) -> bool:
    """Train on a task unclipped and with each clipping function; print and plot what happened.

    Args:
        console: Where the progress, the table and the verdict go.
        output: Folder for the figure, `<name of the task>.png`.
        task: What the runs have in common.
        clips: The functions to clip with, by name; one or two.

    Returns:
        True if every run ended as the task expects; always True for a task that expects nothing.
    """
    histories = _train_each(console, task, clips)
    failures = _failures(histories, task)
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
    console.print(f"Loss and gradient norm of every step: {figure}")
    console.print(": ".join([verdict, *failures]) + ".", style="red" if failures else "green")
    return not failures


def _train_each(console: Console, task: Task, clips: Mapping[str, Clip]) -> dict[str, History]:
    """Return the history of every run by its name.

    The unclipped run calls fastclip with an infinite threshold, which measures and writes nothing. One
    thread is as fast as several for networks this small, and makes the outcome the same on every number
    of cores.
    """
    recipe, measure = task.recipe, task.measure
    runs: dict[str, tuple[Clip, float]] = {"unclipped": (fastclip.clip_grad_norm_, math.inf)}
    runs |= {f"{name} {recipe.max_norm:g}": (clip, recipe.max_norm) for name, clip in clips.items()}
    histories: dict[str, History] = {}
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with progress, torch_threads(1):
        for name, (clip, max_norm) in runs.items():
            bar = progress.add_task(f"training, {name}", total=recipe.epochs)
            on_epoch = partial(progress.advance, bar)
            histories[name] = train(task, clip=clip, max_norm=max_norm, on_epoch=on_epoch)
            console.print(f"Trained {name}: {measure.name} {measure.show(histories[name].score)}.")
    return histories


def _failures(histories: Mapping[str, History], task: Task) -> list[str]:
    """Say which runs did not end as they should."""
    measure, expectation = task.measure, task.expectation
    failures: list[str] = []
    if expectation is None:
        return failures
    for name, history in histories.items():
        is_clipped = math.isfinite(history.max_norm)
        bound = expectation.clipped if is_clipped else expectation.unclipped
        if measure.is_at_least(history.score, bound) is not is_clipped:
            failures.append(
                f"{name} reached {measure.show(history.score)}, expected "
                f"{'at least as good as' if is_clipped else 'worse than'} {measure.show(bound)}"
            )
    return failures


def _verdict(histories: Mapping[str, History], task: Task, failures: list[str]) -> str:
    if failures:
        return "The rescue failed"
    if task.expectation is not None:
        return "Unclipped, the network ends at guessing or worse; clipped, it learns"
    scores = [f"{name} {task.measure.show(history.score)}" for name, history in histories.items()]
    return f"{task.measure.name.capitalize()}: {', '.join(scores)}"
