"""Turn the arguments of a study into the context of its folds, and check them before anything starts."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastclip.files import plain
from fastclip.tuner.study.fingerprints import callable_digest
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.training.checking import check_values
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.folds import FoldContext
from fastclip.tuner.training.loop import Objective, StopRule
from fastclip.tuner.training.losses import is_cross_entropy, prepare_loss, with_meaning_of
from fastclip.tuner.training.metrics import MAX_CONFUSION
from fastclip.tuner.training.scoring import check_scoring
from fastclip.tuner.training.splits import describe_cv, fingerprint, make_splits, missing_classes


def make_context(spec: StudySpec, data: TuningData) -> FoldContext:
    """Return what all folds of a study share.

    Raises:
        TypeError: model_init is not callable, or an argument has the wrong type.
        ValueError: an argument is out of range, every fold is degenerate, or the data holds values that are
            not finite.
    """
    caller, model_init, seed, n_jobs = spec.caller, spec.model_init, spec.seed, spec.jobs
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
    measured = prepare_loss(spec.loss)
    data = with_meaning_of(measured, data)
    check_values(data, caller)
    splits = make_splits(spec.cv, data, seed)
    missing = [missing_classes(data, split) for split in splits]
    if all(missing):
        raise ValueError(
            f"{caller}: the training part of every fold lacks classes that its test part has ({missing[0]} "
            "in fold 0); expected each class in both parts. Use a stratified splitter, or shuffle."
        )
    is_of_shares = is_cross_entropy(measured) and not data.is_classification
    if is_of_shares and not (spec.scoring == "loss" or callable(spec.scoring)):
        raise ValueError(
            f"{caller}: scoring={spec.scoring!r} with floating-point y and cross-entropy, which takes y for "
            "shares of the classes; expected scoring='loss' or a callable. Give y.argmax(1) to score "
            "classes, and the parameter label_smoothing to smooth them."
        )
    objective = Objective(
        loss=measured,
        scoring=check_scoring(spec.scoring, is_classification=data.is_classification, refit=spec.refit),
        stop=StopRule(spec.max_epochs, spec.patience, spec.target),
        rule=ExplosionRule() if spec.explosion is None else spec.explosion,
        search_clipped=spec.search_clipped,
    )
    return FoldContext(
        model_init,
        data,
        splits,
        objective,
        seed,
        resolve_threads(spec.threads, n_jobs, caller),
        spec.return_train_score,
    )


def resolve_threads(threads: int | str | None, n_jobs: int, caller: str) -> int | None:
    """Return torch's threads per fold."""
    if threads == "divide":
        return max(1, torch.get_num_threads() // n_jobs)
    if threads is None or (isinstance(threads, int) and threads >= 1):
        return threads
    raise ValueError(f"{caller}: threads={threads!r}; expected a number of at least 1, 'divide' or None.")


def settings_of(context: FoldContext, spec: StudySpec) -> dict[str, Any]:
    """Return what fixes the results of a study, as JSON would give it back.

    A study is resumed only with equal settings; n_trials, timeout, n_jobs and the like may change.
    """
    objective = context.objective
    settings = {
        "space": spec.parameters.describe(),
        "model": callable_digest(context.model_init, context.model),
        "loss": callable_digest(objective.loss),
        "data": context.data.fingerprint(),
        "n_samples": len(context.data),
        "cv": describe_cv(spec.cv),
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
        "sampler": _name(spec.sampler),
        "pruner": _name(spec.pruner),
        "threads": spec.threads,
        "search_clipped": spec.search_clipped,
        "return_train_score": context.has_train_scores,
    }
    plain_settings: dict[str, Any] = json.loads(json.dumps(plain(settings)))
    return plain_settings


def _name(choice: Any) -> str | None:
    return choice if choice is None or isinstance(choice, str) else type(choice).__name__
