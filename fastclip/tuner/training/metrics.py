"""Metrics of held-out samples, in whatever shape they come."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fastclip.tuner.training.data import IGNORED
from fastclip.tuner.training.losses import LossFunction, default_loss, is_cross_entropy
from fastclip.tuner.training.scoring import Scoring
from fastclip.tuner.training.shapes import class_scores, is_multi_label, matched

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]

MAX_CONFUSION = 50  # classes, whose square is stored with every fold


def measure(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    loss: LossFunction,
    scoring: Scoring,
    classes: npt.NDArray[Any],
) -> dict[str, float]:
    """Return every metric of held-out outputs; see `measure_batches`."""
    ignore_index = IGNORED if bool((targets == IGNORED).any()) else None
    return measure_batches([(outputs, targets)], loss, scoring, classes, None, ignore_index)[0]


def measure_batches(
    batches: Sequence[Batch],
    loss: LossFunction,
    scoring: Scoring,
    classes: npt.NDArray[Any],
    names: Sequence[Any] | None = None,
    ignore_index: int | None = None,
) -> tuple[dict[str, float], list[list[int]] | None]:
    """Return every metric of held-out outputs.

    Args:
        batches: Model outputs and their targets, on the CPU: all in one, or several where sequences of
            different length do not make one; for classes as `class_scores` takes them.
        loss: Loss function of (outputs, targets).
        scoring: The measures asked for; `loss`, `accuracy`, `recall_macro` and `recall_<class>` (`loss` and
            `rmse` for a regression) are there in any case. Where a sample has several labels `accuracy` is
            the share of samples with all of them right, as scikit-learn has it, `label_accuracy` the share of
            labels, and `recall_<column>` belongs to a label. Where some do not count they are positions.
        classes: The classes in ascending order; empty for a regression.
        names: What the classes are called.
        ignore_index: Target that does not count, or None where every target of the data counts.

    Returns:
        The metrics; and the confusion matrix, a row for each true class, where there is one label for each
        target and at most `MAX_CONFUSION` classes.

    Raises:
        ValueError: The outputs do not fit the targets; the message names both shapes.
    """
    masks = [_is_counted(targets, ignore_index) for _, targets in batches]
    counted = [int(mask.sum()) for mask in masks]
    if not sum(counted):
        raise ValueError(f"measure: every target is {ignore_index}, which does not count; expected some.")
    values = {"loss": _mean_loss(batches, counted, loss)}
    confusion = None
    if not len(classes):
        outputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        held_out, labels = matched(outputs, targets, "measure"), targets.numpy()
        if not is_cross_entropy(loss):  # outputs would be logits, and targets shares of classes
            values["rmse"] = float(np.sqrt(np.mean(np.square(held_out.numpy() - labels))))
        kind = "regressor"
    elif ignore_index is None and _has_labels(batches, classes):
        logits, targets = batches[0]
        labels = targets.numpy()
        held_out = matched(as_logits(logits, loss), targets, "measure")
        values |= _label_metrics((held_out > 0).long().numpy(), labels)
        kind = "labels"
    else:
        rows = [class_scores(as_logits(o, loss), t, classes, last=loss is default_loss) for o, t in batches]
        flat = torch.cat([targets.reshape(-1) for _, targets in batches])
        is_counted = torch.cat([mask.reshape(-1) for mask in masks])
        labels = flat[is_counted].numpy()
        held_out = torch.cat(rows)[is_counted]
        predicted = held_out.argmax(dim=-1).numpy()
        values |= _classification(predicted, labels, classes, classes.tolist() if names is None else names)
        if len(classes) <= MAX_CONFUSION:
            confusion = _confusion_matrix(predicted, labels, classes)
        kind = "classifier"
    return values | _scores(scoring, kind, held_out, classes, labels), confusion


def _has_labels(batches: Sequence[Batch], classes: npt.NDArray[Any]) -> bool:
    outputs, targets = batches[0]
    fits = len(batches) == 1 and is_multi_label(outputs.shape, targets.shape)
    return fits and set(classes.tolist()) <= {0, 1}


def _is_counted(targets: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def _mean_loss(batches: Sequence[Batch], counted: Sequence[int], loss: LossFunction) -> float:
    if len(batches) == 1:
        return loss(*batches[0]).item()
    losses = [loss(*batch).item() * count for batch, count in zip(batches, counted, strict=True) if count]
    return sum(losses) / sum(counted)


def as_logits(outputs: torch.Tensor, loss: LossFunction) -> torch.Tensor:
    """Return outputs as logits, which they are unless the loss takes probabilities."""
    return torch.logit(outputs) if getattr(loss, "takes_probabilities", False) else outputs


def _scores(
    scoring: Scoring,
    kind: str,
    held_out: torch.Tensor,
    classes: npt.NDArray[Any],
    labels: npt.NDArray[Any],
) -> dict[str, float]:
    scorers = {name: scorer for name, scorer in scoring.scorers.items() if scorer is not None}
    if not scorers:
        return {}
    # scikit-learn takes two thirds of a second to import, and our own metrics do without it.
    from sklearn.exceptions import UndefinedMetricWarning

    from fastclip.tuner.training.held_out import as_estimator

    estimator, rows = as_estimator(kind, held_out, classes), np.arange(len(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)  # a class that is never predicted scores 0
        return {name: float(scorer(estimator, rows, labels)) for name, scorer in scorers.items()}


def _confusion_matrix(
    predicted: npt.NDArray[Any], labels: npt.NDArray[Any], classes: npt.NDArray[Any]
) -> list[list[int]]:
    """Return how often each class, a row, was taken for which; outputs that are no class are left out."""
    is_class, count = np.isin(predicted, classes), len(classes)
    cells = np.searchsorted(classes, labels[is_class]) * count + np.searchsorted(classes, predicted[is_class])
    return np.bincount(cells, minlength=count * count).reshape(count, count).tolist()


def _classification(
    predicted: npt.NDArray[Any], labels: npt.NDArray[Any], classes: npt.NDArray[Any], names: Sequence[Any]
) -> dict[str, float]:
    """Return accuracy and recall; macro recall is the mean over the classes that occur in the labels."""
    hit = predicted == labels
    recalls = {
        f"recall_{name}": float(hit[labels == label].mean())
        for label, name in zip(classes.tolist(), names, strict=True)
        if (labels == label).any()
    }
    return {"accuracy": float(hit.mean()), "recall_macro": float(np.mean(list(recalls.values()))), **recalls}


def _label_metrics(predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    """Return the metrics of several labels per sample; macro recall is over the labels that occur."""
    hit, occurs = predicted == labels, labels.any(axis=0)
    recalls = {
        f"recall_{column}": float(hit[labels[:, column] == 1, column].mean())
        for column in np.flatnonzero(occurs)
    }
    return {
        "accuracy": float(hit.all(axis=1).mean()),
        "label_accuracy": float(hit.mean()),
        "recall_macro": float(np.mean(list(recalls.values()))) if recalls else 0.0,
        **recalls,
    }
