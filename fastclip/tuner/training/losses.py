"""The loss that is trained and the one that is measured, from torch's own and from the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from fastclip.tuner.training.data import IGNORED, TuningData
from fastclip.tuner.training.shapes import class_rows, equal_but_for_ones, matched, scores_dim

LossFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LABEL_PARAMETERS = ("label_smoothing", "class_weight")
OF_PROBABILITIES = (F.binary_cross_entropy, nn.BCELoss)
BINARY = (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, *OF_PROBABILITIES)
ELEMENTWISE = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
    *BINARY,
)


def default_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy for integer targets, see `cross_entropy`, and mean squared error otherwise."""
    if targets.is_floating_point():
        return F.mse_loss(matched(outputs, targets, "default_loss"), targets)
    return cross_entropy(outputs, targets)


def cross_entropy(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return cross-entropy of class scores, or of one logit for each target; -100 does not count.

    Args:
        outputs: Class scores at the end, (n, ..., classes), or behind the batch where only that fits; or as
            many logits as targets, for the classes 0 and 1 or for labels that are there or not.
        targets: Integers of shape (n, ...).
        weight: One weight for each class.
        label_smoothing: Share of each target that goes to all classes alike.

    Raises:
        ValueError: outputs fit no targets; the message names both shapes.
    """
    if equal_but_for_ones(outputs.shape, targets.shape):
        return _binary_cross_entropy(outputs.reshape(targets.shape), targets, weight, label_smoothing)
    rows = class_rows(outputs, scores_dim(outputs, targets, "default_loss"))
    if weight is not None:  # classes that never occur
        weight = F.pad(weight, (0, rows.shape[1] - len(weight)), value=1.0).to(rows)
    return F.cross_entropy(rows, targets.reshape(-1), weight=weight, label_smoothing=label_smoothing)


def _binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, label_smoothing: float
) -> torch.Tensor:
    known = targets.clamp(min=0)
    goal = known.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    share = (targets != IGNORED).to(logits.dtype)
    if weight is not None:
        share = share * weight.to(logits)[known]
    return (losses * share).sum() / share.sum()


@dataclass(frozen=True)
class MatchedLoss:
    """One of torch's losses of single numbers, which would broadcast (n, 1) against (n,) or refuse integers.

    Attributes:
        loss: torch's function or module.
        takes_probabilities: Whether outputs are probabilities, to be read at 0.5 and not at 0.
    """

    loss: LossFunction
    takes_probabilities: bool

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of outputs brought into the shape of their targets."""
        goal = targets if targets.is_floating_point() else targets.to(outputs.dtype)
        return self.loss(matched(outputs, targets, _name(self.loss)), goal)


def prepare_loss(loss: LossFunction | None) -> LossFunction:
    """Return the loss to measure: the default for None, and torch's losses of single numbers matched."""
    if loss is None:
        return default_loss
    if loss in ELEMENTWISE or type(loss) in ELEMENTWISE:
        return MatchedLoss(loss, loss in OF_PROBABILITIES or type(loss) in OF_PROBABILITIES)
    return loss


def is_cross_entropy(loss: LossFunction) -> bool:
    """Return whether a loss is torch's cross-entropy: floating-point targets are then shares of classes."""
    inner = getattr(loss, "func", loss)  # of functools.partial
    return inner is F.cross_entropy or isinstance(inner, nn.CrossEntropyLoss)


def has_label_parameters(loss: LossFunction, data: TuningData) -> bool:
    """Return whether `label_smoothing` and `class_weight` act, which belong to cross-entropy."""
    return loss is default_loss and data.is_classification


def with_meaning_of(loss: LossFunction, data: TuningData) -> TuningData:
    """Return the data as a loss means it: which target does not count, and whether 0 and 1 are classes.

    Torch's binary losses want classes as floating-point numbers, which are a regression otherwise.

    Raises:
        ValueError: the loss would count a target that is to be ignored.
    """
    data = replace(data, ignore_index=ignore_index_of(loss))
    inner = getattr(loss, "loss", None)
    is_binary = isinstance(loss, MatchedLoss) and (inner in BINARY or type(inner) in BINARY)
    if is_binary and data.has_ignored:
        raise ValueError(
            f"with_meaning_of: y holds {data.ignore_index}, and {_name(inner)} would take it for a target; "
            "expected 0 and 1. The default loss leaves it out."
        )
    if is_binary and not data.is_classification and set(np.unique(data.labels).tolist()) <= {0.0, 1.0}:
        return replace(data, targets=data.targets.long())
    return data


def ignore_index_of(loss: LossFunction) -> int:
    """Return the target that does not count: the loss's own ignore_index, or torch's default."""
    keywords = getattr(loss, "keywords", {})  # of functools.partial
    found = getattr(loss, "ignore_index", keywords.get("ignore_index", IGNORED))
    return int(found)


def training_loss(
    loss: LossFunction, params: Mapping[str, Any], data: TuningData, rows: npt.NDArray[np.intp]
) -> LossFunction:
    """Return the loss to train with: `label_smoothing` and `class_weight` act on the default loss.

    Args:
        loss: The loss that is measured.
        params: `class_weight` is None, "balanced" (each class of the training part counts as much as any
            other, as scikit-learn has it), or a mapping of classes to weights.
        data: All samples.
        rows: Those that are trained on.

    Raises:
        ValueError: a value is out of range, or names no class.
    """
    smoothing, wanted = float(params.get("label_smoothing") or 0.0), params.get("class_weight")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"training_loss: label_smoothing={smoothing}; expected a value in [0, 1).")
    if not has_label_parameters(loss, data) or (smoothing == 0.0 and wanted is None):
        return loss
    weight = None if wanted is None else _class_weights(wanted, data, rows)
    return lambda outputs, targets: cross_entropy(outputs, targets, weight, smoothing)


def _class_weights(wanted: Any, data: TuningData, rows: npt.NDArray[np.intp]) -> torch.Tensor:
    classes = data.classes
    weights = torch.ones(int(classes.max()) + 1)
    if wanted == "balanced":
        labels = data.labels[rows]
        counts = np.array([(labels == label).sum() for label in classes])
        seen = counts > 0
        weights[torch.from_numpy(classes[seen])] = torch.from_numpy(
            counts.sum() / (seen.sum() * counts[seen])
        ).float()
        return weights
    if not isinstance(wanted, Mapping):
        raise ValueError(
            f"training_loss: class_weight={wanted!r}; expected None, 'balanced' or a mapping of classes to "
            "weights."
        )
    names = dict(zip(data.class_names, classes.tolist(), strict=True))
    for name, value in wanted.items():
        if name not in names:
            raise ValueError(
                f"training_loss: class_weight names {name!r}; expected classes of the targets: "
                f"{', '.join(map(str, names))}."
            )
        weights[names[name]] = float(value)
    return weights


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
