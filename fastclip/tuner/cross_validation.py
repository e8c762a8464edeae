"""Cross-validation without a search, and nested around one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna

from fastclip.tuner.executors.base import Executor
from fastclip.tuner.executors.guarding import refuse_unguarded
from fastclip.tuner.study.preparation import make_context
from fastclip.tuner.study.probing import probe_context
from fastclip.tuner.study.records import fold_score
from fastclip.tuner.study.spaces import SpaceLike
from fastclip.tuner.study.specification import StudySpec
from fastclip.tuner.training.explosion import ExplosionRule, Verdict
from fastclip.tuner.training.folds import FoldResult, FoldTask, ModelInit
from fastclip.tuner.training.losses import LossFunction
from fastclip.tuner.training.reading import as_data
from fastclip.tuner.training.scoring import Scoring
from fastclip.tuner.training.splits import make_splits
from fastclip.tuner.tuner_cv import TunerCV

POLL_SECONDS = 60.0


def cross_validate(
    model_init: ModelInit,
    params: Mapping[str, Any],
    data: Any,
    y: Any = None,
    groups: Any = None,
    *,
    cv: Any = 5,
    scoring: Any = None,
    max_epochs: int = 10,
    patience: int | None = None,
    target: float | None = None,
    explosion: ExplosionRule | None = None,
    loss: LossFunction | None = None,
    search_clipped: bool = False,
    n_jobs: int = 1,
    executor: str = "auto",
    devices: Sequence[Any] | None = None,
    threads: int | str | None = 1,
    hang_timeout: float = 600.0,
    seed: int = 0,
    return_train_score: bool = False,
    eval_data: Any = None,
) -> dict[str, Any]:
    """Train one set of parameters on every fold.

    Args:
        model_init: Function of the dict of parameters that returns a new torch module.
        params: The parameters; see `TunerCV` for the names that the training loop reads.
        data: torch Dataset or DataLoader, a pair (X, y), or X.
        y: Targets for X.
        groups: Group labels for splitters that want them.
        eval_data: The same Dataset as it is measured, without augmentation.
        cv: As every keyword that follows it, as in `TunerCV`.

    Returns:
        scikit-learn's keys, arrays with one entry per fold: `fit_time`, `score_time`, `test_score` (or
        `test_<name>` for several measures); then `mean_test_*` and `std_test_*`, plain over the folds, and
        per fold `status`, `clip_fraction`, `steps`, `epochs`, `message`, `history`, its epoch records,
        `metrics`, every held-out measure, and `confusion`, a row for each true class. With
        return_train_score `train_*` stands beside each `test_*`, and `train_metrics` beside `metrics`.
        A fold that exploded has the worst value as its score, which the mean shows.
    """
    refuse_unguarded()
    spec = StudySpec(
        model_init,
        dict(params),
        "cross_validate",
        cv=cv,
        scoring=scoring,
        return_train_score=return_train_score,
        max_epochs=max_epochs,
        patience=patience,
        target=target,
        explosion=explosion,
        loss=loss,
        search_clipped=search_clipped,
        seed=seed,
        threads=threads,
        n_jobs=n_jobs,
        executor=executor,
        devices=devices,
        hang_timeout=hang_timeout,
    )
    context = make_context(spec, as_data(data, y, groups, caller="cross_validate", eval_data=eval_data))
    space = spec.parameters
    for name, dimension in space.dimensions():
        raise ValueError(f"cross_validate: {name} = {dimension}; expected one value. TunerCV searches.")
    probe_context(context, spec)
    workers = spec.make_executor(context)
    resolved = space.sample(optuna.trial.FixedTrial({}))
    try:
        folds = _run_all([FoldTask(0, fold, resolved) for fold in range(len(context.splits))], workers)
    finally:
        workers.close()
    return _summary(folds, context.objective.scoring, has_train_scores=return_train_score)


def nested_cv(
    model_init: ModelInit,
    space: SpaceLike,
    data: Any,
    y: Any = None,
    groups: Any = None,
    *,
    outer_cv: Any = 5,
    seed: int = 0,
    eval_data: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Estimate what a search will reach on new data: a whole search inside each outer fold.

    `best_score_` of a search is optimistic, being the best of many; the score on an outer test part, which
    the search never saw, is not.

    Args:
        model_init: As in `TunerCV`.
        space: As in `TunerCV`.
        data: torch Dataset, a pair (X, y), or X.
        y: Targets for X.
        groups: Group labels for splitters that want them.
        outer_cv: The outer splits, as `cv`.
        seed: Seed of the splits and of every search.
        eval_data: The same Dataset as it is measured, without augmentation.
        options: Keyword arguments of `TunerCV`, `cv` being the inner splits.

    Returns:
        `test_score`, one per outer fold, with `mean_test_score` and `std_test_score`; `best_score`, the inner
        scores; `best_params`; and `tuners`, the fitted searches.
    """
    for name in ("output_dir", "storage", "resume", "refit"):
        if options.get(name):
            raise ValueError(
                f"nested_cv: {name}={options[name]!r}; expected it left out, each outer fold searches anew."
            )
    view = as_data(data, y, groups, caller="nested_cv", eval_data=eval_data)
    tuners, scores = [], []
    for train, test in make_splits(outer_cv, view, seed):
        tuner = TunerCV(model_init, space, seed=seed, **options).fit(view.subset(train))
        tuners.append(tuner)
        scores.append(tuner.score(view.subset(test)))
    return {
        "test_score": np.array(scores),
        "mean_test_score": float(np.mean(scores)),
        "std_test_score": float(np.std(scores)),
        "best_score": np.array([tuner.best_score_ for tuner in tuners]),
        "best_params": [tuner.best_params_ for tuner in tuners],
        "tuners": tuners,
    }


def _run_all(tasks: Sequence[FoldTask], executor: Executor) -> list[FoldResult]:
    waiting = list(reversed(tasks))
    results: list[FoldResult] = []
    for _ in range(min(executor.slots, len(waiting))):
        executor.submit(waiting.pop())
    while len(results) < len(tasks):
        for result in executor.poll(POLL_SECONDS):
            results.append(result)
            if waiting:
                executor.submit(waiting.pop())
    return sorted(results, key=lambda result: result.fold)


def _summary(folds: Sequence[FoldResult], scoring: Scoring, *, has_train_scores: bool) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "fit_time": np.array([fold.fit_seconds for fold in folds]),
        "score_time": np.array([fold.score_seconds for fold in folds]),
    }
    counted = [fold.status is not Verdict.DEGENERATE for fold in folds]
    for name in scoring.scorers:
        scores = np.array([fold_score(fold, name, scoring.worst) for fold in folds])
        parts = {"test": scores}
        if has_train_scores:
            parts["train"] = np.array([fold_score(fold, name, scoring.worst, "train") for fold in folds])
        for part, values in parts.items():
            key = f"{part}_{scoring.key(name)}"
            summary[key] = values
            summary[f"mean_{key}"] = float(values[counted].mean())
            with np.errstate(invalid="ignore"):  # the deviation of infinite scores is undefined
                summary[f"std_{key}"] = float(values[counted].std())
    for name in ("clip_fraction", "steps", "epochs"):
        summary[name] = np.array([getattr(fold, name) for fold in folds])
    summary["status"] = np.array([str(fold.status) for fold in folds], dtype=object)
    summary["message"] = [fold.message for fold in folds]
    summary["metrics"] = [fold.metrics for fold in folds]
    summary["confusion"] = [fold.confusion for fold in folds]
    if has_train_scores:
        summary["train_metrics"] = [fold.train_metrics for fold in folds]
    summary["history"] = [fold.history for fold in folds]
    return summary
