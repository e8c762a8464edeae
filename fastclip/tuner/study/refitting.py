"""Train the best parameters on all data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastclip.tuner.errors import RefitExplodedError
from fastclip.tuner.training.folds import FoldContext, build_model, torch_threads
from fastclip.tuner.training.loop import train
from fastclip.tuner.training.seeding import derive_seed, seeded
from fastclip.tuner.training.stepping import TrainingRun

MAX_REFITS = 3


def refit_best(
    context: FoldContext,
    ranked: Sequence[tuple[int, dict[str, Any]]],
    device: torch.device,
    threads: int | None,
) -> tuple[int, nn.Module, TrainingRun]:
    """Train on all data with the best parameters; if that explodes, with the next best, at most three times.

    Nothing is held out, so patience and target watch the score on the training data.

    Args:
        context: What the folds shared.
        ranked: Index and parameters of the trials, the best first.
        device: Where to train.
        threads: torch's threads.

    Returns:
        Index of the trial, its model in evaluation mode, and how training went.

    Raises:
        RefitExplodedError: each of them exploded.
    """
    rows = np.arange(len(context.data))
    seed = derive_seed(context.seed, len(context.splits))
    reasons = []
    for index, params in ranked[:MAX_REFITS]:
        with torch_threads(threads), seeded(seed, device):
            model = build_model(context.model_init, context.data, params, rows, device)
            run = train(
                model,
                context.data.to(device),
                rows,
                rows,
                params,
                context.objective,
                seed=seed,
                device=device,
            )
        if run.explosion is None:
            return index, model.eval(), run
        reasons.append(f"trial index {index}: {run.explosion['reason']} at step {run.explosion['step']}")
        warnings.warn(
            f"TunerCV: the refit exploded ({reasons[-1]}); trying the next best parameters.", stacklevel=4
        )
    raise RefitExplodedError(
        f"TunerCV: the refit on all data exploded for the best {len(reasons)} trials ({'; '.join(reasons)}); "
        "expected one to train. cv_results_ is there; narrow the space towards lower rates or thresholds."
    )
