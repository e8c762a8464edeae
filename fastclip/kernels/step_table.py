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

from fastclip.kernels.table import Int64Array, Table, build_table, overlap, read_spans, scratch, upload

# Columns of what is known of a tensor: those of `targets` in step.py, then numel and dtype tag.
_GRAD, _PARAM, _STATE, _COUNTER, _RULE, _FLAGS, _NUMEL, _DTYPE = 0, 1, slice(2, 5), 5, 6, 7, 8, 9
_TARGET_LENGTH, _ROW_LENGTH = 8, 10

_ALIKE, _FRESH, _WIDE_COUNTER = 1, 2, 4
_VECTOR_NBYTES = 16

NUM_COEFFICIENTS = 8
"""Columns of `coefficients`, see step.py."""


@dataclass
class StepOperand:
    """One parameter of a step.

    Attributes:
        param: The parameter.
        grad: Its gradient.
        state: Tensors of its state, as many as its optimizer has.
        counter: Its step, float32 or float64, or None.
        rule: The number of its group.
        fresh: Whether its state was made for this step.
    """

    param: Tensor
    grad: Tensor
    state: list[Tensor]
    counter: Tensor | None
    rule: int
    fresh: bool


def read_operands(operands: list[StepOperand]) -> Int64Array:
    """Return one row per tensor; about 1 us each."""
    rows = np.zeros((len(operands), _ROW_LENGTH), np.int64)
    spans = read_spans([o.grad for o in operands])
    rows[:, _GRAD], rows[:, _NUMEL], rows[:, _DTYPE] = spans.T
    rows[:, _PARAM] = [o.param.data_ptr() for o in operands]
    for i, operand in enumerate(operands):
        addresses = [tensor.data_ptr() for tensor in operand.state]
        rows[i, _STATE.start : _STATE.start + len(addresses)] = addresses
    rows[:, _COUNTER] = [0 if o.counter is None else o.counter.data_ptr() for o in operands]
    rows[:, _RULE] = [o.rule for o in operands]
    memories = rows[:, : _STATE.stop]
    apart = (memories - rows[:, [_GRAD]]) % _VECTOR_NBYTES
    alike = ((apart == 0) | (memories == 0)).all(axis=1)
    fresh = np.array([o.fresh for o in operands])
    wide = np.array([o.counter is not None and o.counter.dtype == torch.float64 for o in operands])
    rows[:, _FLAGS] = _ALIKE * alike + _FRESH * fresh + _WIDE_COUNTER * wide
    return rows


@dataclass(frozen=True)
class StepTable:
    """What the kernels read of one list of parameters, on one device and stream.

    Attributes:
        grads: The gradients' table.
        targets: (n, 8) int64, see step.py.
        coefficients: (n, 8) float64 of scratch, see step.py.
        params_overlap: Whether two parameters share memory.
        counters_overlap: Whether two parameters share a step counter.
    """

    grads: Table
    targets: Tensor
    coefficients: Tensor
    params_overlap: bool
    counters_overlap: bool

    def shared(self, with_grads: bool) -> str | None:
        """Return what two parameters share that the kernels write, or None; gradients if they do."""
        if self.params_overlap:
            return "two parameters share memory"
        if self.counters_overlap:
            return "two parameters share a step counter"
        return "two gradients share memory" if with_grads and self.grads.overlaps else None


def build_step_table(rows: Int64Array, device: torch.device) -> StepTable:
    """Build the table of what `read_operands` returned, uploaded on the current stream."""
    targets = torch.from_numpy(rows[:, :_TARGET_LENGTH].reshape(-1))
    counters = rows[rows[:, _COUNTER] != 0, _COUNTER]
    return StepTable(
        grads=build_table(rows[:, [_GRAD, _NUMEL, _DTYPE]], device),
        targets=upload(targets, device).view(-1, _TARGET_LENGTH),
        coefficients=scratch(len(rows), NUM_COEFFICIENTS, device),
        params_overlap=overlap(rows[:, [_PARAM, _NUMEL, _DTYPE]]),
        counters_overlap=len(np.unique(counters)) < len(counters),
    )
