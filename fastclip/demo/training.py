"""A plain training loop that records what its optimizer saw and what clip and step cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastclip import ClippedOptimizer, Monitor
from fastclip.demo.history import History
from fastclip.demo.outcomes import outcome
from fastclip.demo.runs import Run
from fastclip.demo.tasks import Task


def train(
    task: Task,
    run: Run,
    *,
    nan_step: int | None = None,
    on_epoch: Callable[[], object] = lambda: None,
    watched: Path | None = None,
) -> History:
    """Train a new model by SGD and test it; a run that explodes goes on to its last epoch.

    Args:
        task: The model, what to train it on, and the recipe.
        run: How to clip.
        nan_step: The step whose inputs are all nan, counted from 0; None leaves every batch as it is.
        on_epoch: Called after every epoch.
        watched: Folder for what a `Monitor` writes of a run that a `ClippedOptimizer` clips; None writes
            nothing.

    Returns:
        The history of every step and the marks at the end. The same arguments give the same losses and
        norms on the same machine with the same number of threads. Reads three scalars per step (a host
        synchronisation each, were the model on a GPU). The caller's random state is untouched.
    """
    recipe = task.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = task.make_model()
    shuffle = torch.Generator().manual_seed(recipe.seed)
    sgd = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    optimizer = run.make(sgd, run.max_norm)
    history = History(run, nan_step)
    spoiling = None if nan_step is None else _spoil(model, nan_step)

    monitor = None
    if watched is not None and isinstance(optimizer, ClippedOptimizer):
        monitor = Monitor(optimizer, watched, model=model, per_parameter=True)
    began = time.perf_counter()
    for _ in range(recipe.epochs):
        for loss in task.losses(model, shuffle):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            before = time.perf_counter()
            optimizer.step()
            history.step_seconds.append(time.perf_counter() - before)
            if monitor is not None:
                monitor.step(loss)
            last = optimizer.last
            assert last is not None  # there was a step
            if last.skipped:
                history.skipped.append(len(history.losses))
            history.losses.append(loss.item())
            history.norms.append(last.total_norm.item())
        on_epoch()

    if spoiling is not None:
        spoiling.remove()
    if monitor is not None:
        monitor.close()
    history.seconds = time.perf_counter() - began
    history.stats = optimizer.stats()
    history.train, history.test = task.judge(model, "train"), task.judge(model, "test")
    history.outcome = outcome(task, history)
    return history


def _spoil(model: nn.Module, call: int) -> RemovableHandle:
    """Hand the model nan in place of its inputs in this call of its `forward`, counted from 0."""
    calls = count()

    def spoil(_: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return tuple(torch.full_like(x, math.nan) for x in inputs) if next(calls) == call else inputs

    return model.register_forward_pre_hook(spoil)
