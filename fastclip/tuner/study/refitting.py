"""Train the best parameters on all data."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastclip.tuner.errors import RefitExplodedError
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.folds import FoldContext, build_model, torch_threads
from fastclip.tuner.training.loop import StopRule, evaluate, train
from fastclip.tuner.training.seeding import derive_seed, seeded
from fastclip.tuner.training.splits import make_splits
from fastclip.tuner.training.stepping import TrainingRun

MAX_REFITS = 3
HOLDOUT = 0.1
REFITS = ("all", "holdout")


def check_refit_on(refit_on: str) -> None:
    """Raise ValueError for an unknown way to end the refit."""
    if refit_on not in REFITS:
        raise ValueError(f"check_refit_on: refit_on={refit_on!r}; expected one of {', '.join(REFITS)}.")


def median_epochs(record: TrialRecord) -> int:
    """Return the median over the folds of the epoch that counted, the best one with patience."""
    return max(1, round(statistics.median(fold.epochs for fold in record.folds if fold.epochs)))


def refit_best(
    context: FoldContext,
    ranked: Sequence[tuple[int, dict[str, Any], int]],
    device: torch.device,
    threads: int | None,
    refit_on: str,
) -> tuple[int, nn.Module, TrainingRun, dict[str, dict[str, float]]]:
    """Train on all data with the best parameters; if that explodes, with the next best, at most three times.

    The score on training data says nothing about when to stop: patience and target act on a held-out share,
    or the folds have said already after how many epochs a model is best.

    Args:
        context: What the folds shared.
        ranked: Index, parameters and `median_epochs` of the trials, the best first.
        device: Where to train.
        threads: torch's threads.
        refit_on: "all" trains on all data for the median epochs, "holdout" keeps a tenth for the stop rule.

    Returns:
        Index of the trial, its model in evaluation mode, how training went, and every measure of the model on
        the samples that it was trained on, `train`, and on those that were held out, `test`, if any.

    Raises:
        RefitExplodedError: each of them exploded.
    """
    rows = np.arange(len(context.data))
    seed = derive_seed(context.seed, len(context.splits))
    train_rows, test_rows = (
        make_splits(HOLDOUT, context.data, seed)[0] if refit_on == "holdout" else (rows, rows)
    )
    reasons = []
    for index, params, epochs in ranked[:MAX_REFITS]:
        objective = context.objective
        if refit_on == "all":
            stop = StopRule(objective.stop.max_epochs, end_after=epochs)
            objective = replace(objective, stop=stop)
        with torch_threads(threads), seeded(seed, device):
            model = build_model(context.model_init, context.data, params, train_rows, device)
            run = train(
                model,
                context.data.to(device),
                train_rows,
                test_rows,
                params,
                objective,
                seed=seed,
                device=device,
            )
        if run.explosion is None:
            parts = {"train": train_rows, **({"test": test_rows} if refit_on == "holdout" else {})}
            data, amp = context.data.to(device), params.get("amp")
            with torch_threads(threads):
                scores = {
                    name: evaluate(model, data, rows, objective, device, amp)[0]
                    for name, rows in parts.items()
                }
            return index, model.eval(), run, scores
        reasons.append(f"trial index {index}: {run.explosion['reason']} at step {run.explosion['step']}")
        warnings.warn(
            f"TunerCV: the refit exploded ({reasons[-1]}); trying the next best parameters.", stacklevel=4
        )
    raise RefitExplodedError(
        f"TunerCV: the refit on all data exploded for the best {len(reasons)} trials ({'; '.join(reasons)}); "
        "expected one to train. cv_results_ is there; narrow the space towards lower rates or thresholds."
    )
