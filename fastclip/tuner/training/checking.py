"""Find values that no rate can learn from before a rate is blamed for them."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from fastclip.tuner.errors import NonfiniteDataError
from fastclip.tuner.training.data import TuningData

REMEDIES = {
    "X": "Impute the value or drop the row; give a Dataset where the model itself handles missing inputs.",
    "y": "Drop the row, or correct its target.",
}

MAX_CLASSES, SAMPLES_PER_CLASS = 20, 5  # whole numbers that look like classes: few, and each of them often


def check_values(data: TuningData, caller: str) -> None:
    """Refuse data that training can only fail on, and warn of classes that are given as a regression.

    The inputs of a Dataset are not read: that may take as long as an epoch.

    Raises:
        NonfiniteDataError: an input or a target is not finite; the message has its row and column.
        ValueError: there is one class only.
    """
    _check_finite(data.targets, "y", caller)
    _hint_at_classes(data, caller)
    if data.inputs is not None:
        _check_finite(data.inputs, "X", caller)
    if len(data.classes) == 1:
        raise ValueError(
            f"{caller}: y has one class only, {data.classes[0]}, in all {len(data)} samples; expected at "
            "least two. A regression's targets are floating-point numbers."
        )


def _hint_at_classes(data: TuningData, caller: str) -> None:
    if data.is_classification:
        return
    values = np.unique(data.labels)
    is_few = 1 < len(values) <= min(MAX_CLASSES, len(data) // SAMPLES_PER_CLASS)
    if is_few and bool((values == values.round()).all()):
        found = ", ".join(f"{value:g}" for value in values)
        warnings.warn(
            f"{caller}: y is {data.targets.dtype} and holds only {found}; expected integers if they are "
            "classes, y.astype(int): floating-point targets are a regression.",
            stacklevel=4,
        )


def _check_finite(values: torch.Tensor, name: str, caller: str) -> None:
    if not values.is_floating_point():
        return
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return
    rows = bad.reshape(len(bad), -1).any(dim=1).nonzero().flatten()
    row = int(rows[0])
    where = np.argwhere(bad[row].numpy())[0].tolist() if values.dim() > 1 else []
    column = f", column {where[0] if len(where) == 1 else tuple(where)}" if where else ""
    value = float(values[(row, *where)])
    more = f" ({len(rows)} rows have such values)" if len(rows) > 1 else ""
    raise NonfiniteDataError(
        f"{caller}: {name} has {value} in row {row}{column}{more}; expected finite numbers. {REMEDIES[name]}"
    )
