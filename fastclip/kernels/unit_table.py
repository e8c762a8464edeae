"""Units of tensors, the slices along their first dimension, as a table of runs in device memory.

As in table.py: nothing is compiled again when tensors change, and nothing is uploaded until one of them does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastclip.kernels.table import ITEM_SIZES, Int64Array, upload

# Columns of a tensor, as its builder takes them, and of a run: addresses of its first unit's gradient and
# weights, elements of a unit, units, dtype tag.
GRAD, WEIGHTS, NUMEL, COUNT, DTYPE, RUN_LENGTH = range(6)

RUN_NUMEL = 16 * 1024
"""Elements of a run of short units; a longer unit is a run."""


@dataclass(frozen=True)
class UnitTable:
    """What a kernel reads of the units of one list of tensors, on one device and stream.

    Attributes:
        runs: (c, 5) int64, see columns.py.
    """

    runs: Tensor

    @property
    def num_chunks(self) -> int:
        """Count the runs, which are what a program takes."""
        return self.runs.shape[0]

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return self.runs.device


def build_unit_table(tensors: Int64Array, device: torch.device) -> UnitTable:
    """Cut the units of tensors into runs and upload them on the current stream, without waiting for it.

    Args:
        tensors: (n, 5), see above; of every one there is at least one unit of at least one element.
        device: Where they are.
    """
    steps = np.maximum(RUN_NUMEL // tensors[:, NUMEL], 1)
    counts = -(-tensors[:, COUNT] // steps)
    tensor = np.repeat(np.arange(len(tensors)), counts)
    first = (np.arange(len(tensor)) - (np.cumsum(counts) - counts)[tensor]) * steps[tensor]
    runs = tensors[tensor]
    offsets = first * runs[:, NUMEL] * ITEM_SIZES[runs[:, DTYPE]]
    runs[:, GRAD] += offsets
    runs[:, WEIGHTS] += offsets
    runs[:, COUNT] = np.minimum(tensors[tensor, COUNT] - first, steps[tensor])
    return UnitTable(upload(torch.from_numpy(runs).view(-1), device).view(runs.shape))
