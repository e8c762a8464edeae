"""A small search for the rate, the threshold and the initialisation of the digits network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console
from torch import nn

from fastclip.demo.data import load_digits
from fastclip.demo.models import DigitsCNN
from fastclip.tuner import Choice, Float, TunerCV
from fastclip.tuner.progress import progress

SPACE = {
    "lr_x_max_norm": Float(1e-3, 5.0, log=True),
    "max_norm": Float(0.03, 10.0, log=True),
    "init": Choice(["default", "kaiming_normal", "orthogonal"]),
    "momentum": 0.9,
}
"""Rates from far too low to far above what the network stands: lr is lr_x_max_norm / max_norm."""

FOLDER = "digits-search"
REPORT = "report.html"

FOUND = 0.93
"""The network trained with the parameters found must sort this share of the test images."""


def make_digits_cnn(params: dict[str, Any]) -> nn.Module:
    """Return a new network; none of the parameters concerns its layers."""
    del params
    return DigitsCNN()


def search_digits(
    console: Console,
    output: Path,
    *,
    n_trials: int = 16,
    max_epochs: int = 5,
    n_jobs: int = 2,
    seed: int = 0,
) -> bool:
    """Search by three-fold cross-validation, retrain on all training images, and test once.

    Args:
        console: Where progress and result go.
        output: Gets the folder `digits-search` with all that the search writes, an earlier one being
            replaced, and `report.html`.
        n_trials: Parameters to try.
        max_epochs: Passes over the training images in every fold and in the retraining.
        n_jobs: Folds that train at the same time.
        seed: Seed of the split into training and test images and of the search.

    Returns:
        True if the retrained network sorts the test images, which the search never saw, as it should.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the lines below say more than Optuna's
    folder = output / FOLDER
    if folder.exists():
        shutil.rmtree(folder)
    data = load_digits(seed=seed)

    with progress(console, n_trials) as show:
        tuner = TunerCV(
            make_digits_cnn,
            SPACE,
            cv=3,
            n_trials=n_trials,
            max_epochs=max_epochs,
            n_jobs=n_jobs,
            output_dir=folder,
            seed=seed,
            callbacks=[show],
        )
        tuner.fit(data.train_inputs, data.train_labels)
    accuracy = tuner.score(data.test_inputs, data.test_labels)
    report = tuner.report(output / REPORT)
    is_found = accuracy >= FOUND
    best = tuner.best_params_
    console.print(
        f"Best of {n_trials} trials, {len(tuner.explosions_)} of which exploded: rate {best['lr']:.3g}, "
        f"threshold {best['max_norm']:.3g}, init {best['init']}; mean accuracy over the "
        f"folds {tuner.best_score_:.1%}.",
        soft_wrap=True,
    )
    console.print(
        f"Retrained with them on all training images: test accuracy {accuracy:.1%}"
        + ("." if is_found else f", expected at least {FOUND:.0%}."),
        style="green" if is_found else "red",
        soft_wrap=True,
    )
    console.print(f"Report of the search: {report}", soft_wrap=True)
    return is_found
