"""What an optimizer's step reads beside the gradients' table: parameters, state, counters and rules.

Both are data, as in table.py: the numbers of tensors and of groups are no part of a kernel. Addresses seldom
change and are uploaded when they do. Rules, which a schedule changes in every step, stand apart: 72 bytes per
group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastclip.kernels.table import VECTOR_NBYTES, Int64Array, Table, build_table, scratch, upload

# Columns of what `fastclip._C` reads of a tensor: addresses, 0 where there is none; the number of its group;
# whether its state was made for this step, and whether its counter is float64, not float32; its span's other
# columns.
GRAD, PARAM, STATE, COUNTER, RULE = 0, 1, 2, 5, 6
_FRESH, _WIDE_COUNTER, _NUMEL, _DTYPE = range(7, 11)

# Of the columns of `targets`, those up to RULE are the same.
TARGET_FLAGS, TARGET_LENGTH = 7, 8
FLAG_ALIKE, FLAG_FRESH, FLAG_WIDE_COUNTER = 1, 2, 4

NUM_COEFFICIENTS = 8
"""Columns of `coefficients`."""


@dataclass(frozen=True)
class StepTable:
    """What the kernels read of one list of parameters, on one device and stream.

    Attributes:
        grads: The gradients' table.
        targets: (n, 8) int64, see columns.py.
        coefficients: (n, 8) float64 of scratch, see columns.py.
    """

    grads: Table
    targets: Tensor
    coefficients: Tensor


def build_step_table(rows: Int64Array, device: torch.device) -> StepTable:
    """Build the table of what a `_C.Step` has read, uploaded on the current stream."""
    memories = rows[:, :COUNTER]
    apart = (memories - rows[:, [GRAD]]) % VECTOR_NBYTES
    alike = ((apart == 0) | (memories == 0)).all(axis=1)
    flags = FLAG_ALIKE * alike + FLAG_FRESH * rows[:, _FRESH] + FLAG_WIDE_COUNTER * rows[:, _WIDE_COUNTER]
    targets = torch.from_numpy(np.column_stack((rows[:, :TARGET_FLAGS], flags)))
    return StepTable(
        grads=build_table(rows[:, [GRAD, _NUMEL, _DTYPE]], device),
        targets=upload(targets.view(-1), device).view(targets.shape),
        coefficients=scratch(len(rows), NUM_COEFFICIENTS, device),
    )


def upload_rules(rules: Int64Array, device: torch.device) -> Tensor:
    """Return the rules of the groups that a `_C.Step` has read, on the device: (groups * 9,) float64."""
    return upload(torch.from_numpy(rules).flatten(), device).view(torch.float64)
