"""Turn the arguments of a study into the context of its folds, and check them before anything starts."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastclip.files import plain
from fastclip.tuner.study.fingerprints import callable_digest
from fastclip.tuner.study.spaces import Space
from fastclip.tuner.training.checking import check_values
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.folds import FoldContext, ModelInit
from fastclip.tuner.training.loop import Objective, StopRule
from fastclip.tuner.training.losses import LossFunction, prepare_loss, with_meaning_of
from fastclip.tuner.training.metrics import MAX_CONFUSION
from fastclip.tuner.training.scoring import check_scoring
from fastclip.tuner.training.splits import describe_cv, fingerprint, make_splits, missing_classes


def make_context(
    model_init: ModelInit,
    data: TuningData,
    *,
    cv: Any,
    scoring: Any,
    refit: bool | str,
    loss: LossFunction | None,
    max_epochs: int,
    patience: int | None,
    target: float | None,
    explosion: ExplosionRule | None,
    seed: int,
    threads: int | str | None,
    n_jobs: int,
    caller: str,
    return_train_score: bool = False,
) -> FoldContext:
    """Return what all folds of a study share.

    Raises:
        TypeError: model_init is not callable, or an argument has the wrong type.
        ValueError: an argument is out of range, every fold is degenerate, or the data holds values that are
            not finite.
    """
    if isinstance(model_init, torch.nn.Module) or not callable(model_init):
        kind = "module" if isinstance(model_init, torch.nn.Module) else type(model_init).__name__
        raise TypeError(
            f"{caller}: model_init is a {kind}; expected a function of the parameters that returns a new "
            "torch.nn.Module, because every fold trains a fresh one."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"{caller}: seed={seed!r}; expected an integer >= 0.")
    if data.loading.num_workers and n_jobs > 1:
        raise ValueError(
            f"{caller}: n_jobs={n_jobs} with a DataLoader of num_workers={data.loading.num_workers}; "
            "expected one of them, because a process that trains folds can start no other."
        )
    measured = prepare_loss(loss)
    data = with_meaning_of(measured, data)
    check_values(data, caller)
    splits = make_splits(cv, data, seed)
    missing = [missing_classes(data, split) for split in splits]
    if all(missing):
        raise ValueError(
            f"{caller}: the training part of every fold lacks classes that its test part has ({missing[0]} "
            "in fold 0); expected each class in both parts. Use a stratified splitter, or shuffle."
        )
    objective = Objective(
        loss=measured,
        scoring=check_scoring(scoring, is_classification=data.is_classification, refit=refit),
        stop=StopRule(max_epochs, patience, target),
        rule=ExplosionRule() if explosion is None else explosion,
    )
    return FoldContext(
        model_init,
        data,
        splits,
        objective,
        seed,
        resolve_threads(threads, n_jobs, caller),
        return_train_score,
    )


def resolve_threads(threads: int | str | None, n_jobs: int, caller: str) -> int | None:
    """Return torch's threads per fold."""
    if threads == "divide":
        return max(1, torch.get_num_threads() // n_jobs)
    if threads is None or (isinstance(threads, int) and threads >= 1):
        return threads
    raise ValueError(f"{caller}: threads={threads!r}; expected a number of at least 1, 'divide' or None.")


def settings_of(
    context: FoldContext, space: Space, sampler: Any, pruner: Any, cv: Any, threads: int | str | None
) -> dict[str, Any]:
    """Return what fixes the results of a study, as JSON would give it back.

    A study is resumed only with equal settings; n_trials, timeout, n_jobs and the like may change.
    """
    objective = context.objective
    settings = {
        "space": space.describe(),
        "model": callable_digest(context.model_init, context.model),
        "loss": callable_digest(objective.loss),
        "data": context.data.fingerprint(),
        "n_samples": len(context.data),
        "cv": describe_cv(cv),
        "splits": fingerprint(context.splits),
        "n_folds": len(context.splits),
        "seed": context.seed,
        "scoring": list(objective.scoring.scorers),
        "classes": context.data.class_names[:MAX_CONFUSION],
        "primary": objective.scoring.primary,
        "direction": objective.scoring.direction,
        "max_epochs": objective.stop.max_epochs,
        "patience": objective.stop.patience,
        "target": objective.stop.target,
        "explosion": vars(objective.rule),
        "sampler": sampler if isinstance(sampler, str) else type(sampler).__name__,
        "pruner": pruner if pruner is None or isinstance(pruner, str) else type(pruner).__name__,
        "threads": threads,
        "return_train_score": context.has_train_scores,
    }
    plain_settings: dict[str, Any] = json.loads(json.dumps(plain(settings)))
    return plain_settings
