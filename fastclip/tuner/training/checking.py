"""Find values that no rate can learn from before a rate is blamed for them."""

from __future__ import annotations

import numpy as np
import torch

from fastclip.tuner.errors import NonfiniteDataError
from fastclip.tuner.training.data import TuningData

REMEDIES = {
    "X": "Impute the value or drop the row; give a Dataset where the model itself handles missing inputs.",
    "y": "Drop the row, or correct its target.",
}


def check_values(data: TuningData, caller: str) -> None:
    """Refuse data that training can only fail on.

    The inputs of a Dataset are not read: that may take as long as an epoch.

    Raises:
        NonfiniteDataError: an input or a target is not finite; the message has its row and column.
        ValueError: there is one class only.
    """
    _check_finite(data.targets, "y", caller)
    if data.inputs is not None:
        _check_finite(data.inputs, "X", caller)
    if len(data.classes) == 1:
        raise ValueError(
            f"{caller}: y has one class only, {data.classes[0]}, in all {len(data)} samples; expected at "
            "least two. A regression's targets are floating-point numbers."
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
