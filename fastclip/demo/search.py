"""A small search for the rate, the threshold and the initialisation of a network that sorts."""

from __future__ import annotations

import math
import shutil
import time
from itertools import islice
from pathlib import Path

import optuna
import torch
from rich.console import Console

from fastclip.bench.runner import torch_threads
from fastclip.demo.tasks import Marks, SortingTask
from fastclip.tuner import Choice, Float, TunerCV
from fastclip.tuner.progress import progress

SPACE = {
    "lr_x_max_norm": Float(1e-3, 5.0, log=True),
    "max_norm": Float(0.03, 10.0, log=True),
    "init": Choice(["default", "kaiming_normal", "orthogonal"]),
    "momentum": 0.9,
}
"""Rates from far too low to far above what the networks stand: lr is lr_x_max_norm / max_norm."""

FOLDS = 3

TIMED_STEPS = 5
"""Training steps from which the length of a search is foretold."""


def search_folder(output: Path, task: SortingTask) -> Path:
    """Return the folder of all that the search of a task writes."""
    return output / f"{task.name}-search"


def search(
    console: Console,
    output: Path,
    task: SortingTask,
    *,
    n_trials: int = 16,
    max_epochs: int = 5,
    n_jobs: int = 2,
) -> bool:
    """Search by three-fold cross-validation, retrain on all training samples, and test once.

    Args:
        console: Where progress and result go.
        output: Gets the folder `<name of the task>-search` with all that the search writes and `report.html`,
            an earlier one being replaced.
        task: The samples and the network; its recipe gives the seed alone.
        n_trials: Parameters to try.
        max_epochs: Passes over the training samples in every fold and in the retraining.
        n_jobs: Folds that train at the same time.

    Returns:
        True if the retrained network sorts the test samples, which the search never saw, as the task expects;
        always True for a task that expects nothing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the lines below say more than Optuna's
    folder = search_folder(output, task)
    if folder.exists():
        shutil.rmtree(folder)
    minutes = _foretell(task, n_trials, max_epochs, n_jobs) / 60
    console.print(
        f"Searching: {n_trials} trials of {FOLDS} folds of {max_epochs} epochs, at most about "
        f"{max(1, math.ceil(minutes))} min; folds that explode end early.",
        soft_wrap=True,
    )
    began = time.perf_counter()
    with progress(console, n_trials) as show:
        tuner = TunerCV(
            task.model,
            SPACE,
            cv=FOLDS,
            n_trials=n_trials,
            max_epochs=max_epochs,
            n_jobs=n_jobs,
            output_dir=folder,
            seed=task.recipe.seed,
            callbacks=[show],
        )
        tuner.fit(task.tuning_data("train"))
    train = tuner.refit_scores_["train"]
    test = tuner.measures(task.tuning_data("test"))
    report = tuner.report()
    best = tuner.best_params_
    console.print(
        f"Best of {n_trials} trials, {len(tuner.explosions_)} of which exploded, in "
        f"{time.perf_counter() - began:.0f} s: rate {best['lr']:.3g}, threshold {best['max_norm']:.3g}, init "
        f"{best['init']}; mean accuracy over the folds {tuner.best_score_:.1%}.",
        soft_wrap=True,
    )
    marks = Marks(loss=test["loss"], value=test["accuracy"], recall=test["recall_macro"])
    is_found, sentence = _judge(task, marks)
    console.print(
        f"Retrained with them on all training samples: train accuracy {train['accuracy']:.1%}, test accuracy "
        f"{test['accuracy']:.1%}, train loss {train['loss']:.3g}, test loss {test['loss']:.3g}{sentence}.",
        style="green" if is_found else "red",
        soft_wrap=True,
    )
    console.print(f"Report of the search: {report}", soft_wrap=True)
    return is_found or task.expectation is None


def _judge(task: SortingTask, test: Marks) -> tuple[bool, str]:
    """Tell whether parameters were found that train the network, and what to add to its scores."""
    if task.expectation is None:
        is_guess = task.is_guess(test)
        return not is_guess, f"; {'no better than' if is_guess else 'better than'} guessing, {task.guess}"
    is_found = test.value >= task.expectation.clipped
    return is_found, "" if is_found else f", expected at least {task.expectation.clipped:.0%}"


def _foretell(task: SortingTask, n_trials: int, max_epochs: int, n_jobs: int) -> float:
    """Return the seconds that the search takes if nothing ends early, by a few steps of training."""
    with torch.random.fork_rng(devices=[]), torch_threads(1):
        model = task.make_model()
        losses = task.losses(model, torch.Generator().manual_seed(0))
        torch.autograd.backward(next(losses))
        began = time.perf_counter()
        num_steps = 0
        for loss in islice(losses, TIMED_STEPS):
            torch.autograd.backward(loss)
            num_steps += 1
        seconds = (time.perf_counter() - began) / max(1, num_steps)
    steps = len(task.labels("train")) * (FOLDS - 1) / task.recipe.batch_size
    return seconds * steps * max_epochs * n_trials / n_jobs
