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
from fastclip.demo.data import ClassificationData, load_digits
from fastclip.demo.models import DigitsCNN
from fastclip.demo.plot import plot_histories
from fastclip.demo.report import runs_table
from fastclip.demo.training import Clip, History, Recipe, train

CLIPS: Mapping[str, Clip] = MappingProxyType(
    {"fastclip": fastclip.clip_grad_norm_, "torch": torch.nn.utils.clip_grad_norm_}
)
"""The functions whose clipping is to rescue the network."""

MAX_NORM = 0.25
"""Threshold of the clipped runs."""

CHANCE = 0.2
"""Without clipping the accuracy must end below this; guessing gives 0.1."""

RESCUED = 0.9
"""With clipping the accuracy must reach this. It ends near 0.97, give or take the rounding of a machine."""


def rescue_digits(console: Console, output: Path, recipe: Recipe, clips: Mapping[str, Clip]) -> bool:
    """Train on the digits unclipped and with each clipping function; print and plot what happened.

    Args:
        console: Where the progress, the table and the verdict go.
        output: Folder for `digits.png`.
        recipe: What the runs have in common.
        clips: The functions to clip with, by name; one or two.

    Returns:
        True if the unclipped run ended at chance and every clipped run learned the digits.
    """
    data = load_digits(seed=recipe.seed)
    histories = _train_each(console, data, recipe, clips)
    failures = _failures(histories)
    verdict = (
        "The rescue failed"
        if failures
        else "Unclipped, the network ends at guessing; clipped, it learns the digits"
    )
    setting = (
        f"Digits CNN, SGD at rate {recipe.learning_rate:g}, momentum {recipe.momentum:g}, "
        f"batch {recipe.batch_size}, seed {recipe.seed}"
    )
    figure = output / "digits.png"
    plot_histories(histories, figure, title=verdict, subtitle=setting, num_classes=data.num_classes)
    console.print(runs_table(histories, setting))
    console.print(f"Loss and gradient norm of every step: {figure}")
    console.print(": ".join([verdict, *failures]) + ".", style="red" if failures else "green")
    return not failures


def _train_each(
    console: Console, data: ClassificationData, recipe: Recipe, clips: Mapping[str, Clip]
) -> dict[str, History]:
    """Return the history of every run by its name.

    The unclipped run calls fastclip with an infinite threshold, which measures and writes nothing. One
    thread is as fast as several for a network this small, and makes the outcome the same on every number
    of cores.
    """
    runs: dict[str, tuple[Clip, float]] = {"unclipped": (fastclip.clip_grad_norm_, math.inf)}
    runs |= {f"{name} {MAX_NORM:g}": (clip, MAX_NORM) for name, clip in clips.items()}
    histories: dict[str, History] = {}
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with progress, torch_threads(1):
        for name, (clip, max_norm) in runs.items():
            task = progress.add_task(f"training, {name}", total=recipe.epochs)
            on_epoch = partial(progress.advance, task)
            histories[name] = train(DigitsCNN, data, recipe, clip=clip, max_norm=max_norm, on_epoch=on_epoch)
            console.print(f"Trained {name}: test accuracy {histories[name].accuracy:.1%}.")
    return histories


def _failures(histories: Mapping[str, History]) -> list[str]:
    """Say which runs did not end as they should."""
    failures = []
    for name, history in histories.items():
        clipped = math.isfinite(history.max_norm)
        if clipped and history.accuracy < RESCUED:
            failures.append(f"{name} reached {history.accuracy:.1%}, expected at least {RESCUED:.0%}")
        if not clipped and history.accuracy >= CHANCE:
            failures.append(f"{name} reached {history.accuracy:.1%}, expected below {CHANCE:.0%}")
    return failures
