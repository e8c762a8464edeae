"""What the runs on own images show, beside guessing: rescued or not, nothing to rescue, clipped too low."""

from __future__ import annotations

import math

import pytest
import torch

from fastclip.demo.data import ClassificationData
from fastclip.demo.history import History
from fastclip.demo.models import ImageModel
from fastclip.demo.outcomes import conclude, outcome
from fastclip.demo.runs import Run
from fastclip.demo.tasks import Marks, Recipe, image_task

GUESS = Marks(loss=0.62, value=0.7, recall=0.5)
GOOD = Marks(loss=0.2, value=0.95, recall=0.9)
NEAR = Marks(loss=0.4, value=0.83, recall=0.7)
FAIR = Marks(loss=0.5, value=0.81, recall=0.7)
"""3 * sqrt((0.95 * 0.05 + p * (1 - p)) / 100) is 0.130 for p = 0.83 and 0.135 for p = 0.81."""


@pytest.fixture
def task():
    """Seven test images in ten are of class 0, as are those to train on: guessing reaches 70 %."""
    labels = torch.tensor([0] * 70 + [1] * 30)
    images = torch.zeros(100, 1, 4, 4)
    data = ClassificationData(images, labels, images, labels, 2)
    recipe = Recipe(learning_rate=0.3, momentum=0.9, max_norm=0.25, batch_size=32, epochs=4)
    return image_task("imagefolder", ImageModel("simple", (1, 4, 4), 2), data, recipe)


def history(test, *, max_norm=math.inf, losses=(0.6,) * 30, norms=None, **options):
    run = Run("fastclip" if math.isfinite(max_norm) else "unclipped", lambda o, n: o, max_norm, learns=True)
    norms = norms or [1.0] * len(losses)
    return History(run, losses=list(losses), norms=list(norms), train=test, test=test, **options)


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (GUESS, "guesses"),
        (Marks(loss=0.62, value=0.77, recall=0.5), "guesses"),  # 0.7 + 1.645 * sqrt(0.7 * 0.3 / 100) = 0.775
        (Marks(loss=0.62, value=0.78, recall=0.5), "learned"),
        (Marks(loss=0.62, value=0.6, recall=0.6), "learned"),  # of rare classes; bound 0.582
        (Marks(loss=0.59, value=0.7, recall=0.5), "learned"),  # 0.98 * 0.611, the loss of the shares
        (Marks(loss=0.6, value=0.7, recall=0.5), "guesses"),
        (Marks(loss=math.nan, value=0.7, recall=0.5), "exploded"),
        (Marks(loss=900.0, value=0.3, recall=0.5), "exploded"),
    ],
)
def test_a_run_is_measured_by_guessing(task, test, expected):
    assert outcome(task, history(test)) == expected


def test_a_run_that_ends_at_guessing_says_since_when_it_was_lost(task):
    broken = [0.6] * 12 + [math.nan] * 5
    assert outcome(task, history(GUESS, losses=broken)) == "exploded at 12"
    assert outcome(task, history(GUESS, losses=broken, nan_step=12)) == "nan since 12"
    assert outcome(task, history(GUESS, losses=broken, skipped=list(range(12, 17)))) == "guesses"
    # Above 4 x log(2) in five steps of ten, the watch's rule.
    assert outcome(task, history(GUESS, losses=[0.6] * 20 + [50.0] * 10)) == "exploded at 24"


def test_a_run_that_explodes_and_then_learns_has_learned(task):
    assert outcome(task, history(GOOD, losses=[0.6] * 5 + [math.inf] + [0.3] * 5)) == "learned"


@pytest.mark.parametrize(
    ("plain", "clipped", "verdict"),
    [
        (GUESS, GOOD, "Rescued: unclipped, the network ends at guessing; clipped, it learns"),
        (GOOD, GOOD, "Nothing to rescue: the network learns unclipped, and clipped"),
        (GUESS, GUESS, "Not rescued: the network ends at guessing unclipped, and clipped"),
        (FAIR, GOOD, "Better clipped: the network learns unclipped, and more clipped"),
        (GOOD, FAIR, "Clipped too low: the network learns unclipped, and less clipped"),
        (NEAR, GOOD, "Nothing to rescue: the network learns unclipped, and clipped"),
        (GOOD, GUESS, "Clipped too low: the network learns unclipped, and not clipped"),
    ],
)
def test_verdict_on_own_images(task, plain, clipped, verdict):
    runs = [history(plain), history(clipped, max_norm=0.25)]
    for run in runs:
        run.outcome = outcome(task, run)
    conclusion = conclude(task, runs)
    assert conclusion.verdict == verdict
    assert conclusion.failures == ()
    shown = [f"{run.score:.1%} ({run.outcome})" for run in runs]
    assert conclusion.details == (
        f"test accuracy: unclipped {shown[0]}, fastclip 0.25 {shown[1]}",
        "guessing reaches 70.0%, the share of the largest class",
    )
