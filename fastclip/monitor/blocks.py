"""What a monitor collects between two writes: a block of rows, preallocated, where the outcomes are.

A row holds what one step found. On a device nothing waits: rows are written there by a handful of small
launches, a whole block is copied at once into pinned memory, and the host takes it when the copy is done.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.optim import Outcome

COLUMNS = ("norm", "coef", "skipped", "threshold", "update_ratio", "loss")
_UPDATE, _LOSS = COLUMNS.index("update_ratio"), COLUMNS.index("loss")

NO_GRADIENT = -1.0
"""Stands for the norm of a gradient that is not there."""


@dataclass(frozen=True)
class Rows:
    """Steps that have arrived on the host.

    Attributes:
        first: Number of the first step.
        times: Seconds since the epoch, one per step.
        has_loss: Whether one was given, per step.
        values: float64, one row per step, one column per name in COLUMNS; nan where one is not known.
        norms: float32, one row per step, one column per parameter, or NO_GRADIENT, which is all that a
            step has in which they were not measured. None if they never are.
    """

    first: int
    times: list[float]
    has_loss: list[bool]
    values: NDArray[np.float64]
    norms: NDArray[np.float32] | None


class HostBlock:
    """A block on the host, for outcomes whose numbers are at hand.

    Args:
        every: Steps that it holds.
        width: Parameters whose norms are kept, 0 for none.
    """

    def __init__(self, every: int, width: int) -> None:
        self.num_rows = 0
        self._every = every
        self._times, self._has_loss = [0.0] * every, [False] * every
        self._values = np.full((every, len(COLUMNS)), np.nan)
        self._norms = np.full((every, width), np.nan, np.float32) if width else None
        self._sent: Rows | None = None

    @property
    def is_full(self) -> bool:
        """Whether `send` has to come before the next `put`."""
        return self.num_rows == self._every

    def put(
        self, outcome: Outcome, threshold: float | Tensor, norms: Tensor | None, update: Tensor | None
    ) -> None:
        """Add a row; norms are one per parameter or not measured, `update` is the update ratio."""
        row = self.num_rows
        numbers = outcome.numbers()
        assert numbers is not None  # `block_for` gives others a block on their device
        self._values[row] = (
            *numbers,
            float(threshold),
            math.nan if update is None else float(update),
            math.nan,
        )
        if self._norms is not None:
            self._norms[row] = NO_GRADIENT if norms is None else norms.cpu().numpy()
        self._times[row], self._has_loss[row] = time.time(), False
        self.num_rows += 1

    def set_loss(self, loss: float | Tensor) -> None:
        """Add the loss to the latest row."""
        self._has_loss[self.num_rows - 1] = True
        self._values[self.num_rows - 1, _LOSS] = float(loss)

    def send(self, first: int) -> None:
        """Put the rows on their way and start an empty block; `first` is the number of the first step."""
        n, self.num_rows = self.num_rows, 0
        norms = None if self._norms is None else self._norms[:n].copy()
        self._sent = Rows(first, self._times[:n], self._has_loss[:n], self._values[:n].copy(), norms)

    def take(self, *, wait: bool) -> Rows | None:
        """Return the rows that were sent, once."""
        sent, self._sent = self._sent, None
        return sent


class DeviceBlock:
    """A block on a device: `put`, `set_loss` and `send` launch and never wait.

    Args:
        every: Steps that it holds.
        width: Parameters whose norms are kept, 0 for none.
        device: Where the outcomes are.
    """

    def __init__(self, every: int, width: int, device: torch.device) -> None:
        self.num_rows = 0
        self._every, self._device = every, device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._times, self._has_loss = [0.0] * every, [False] * every
        self._values = torch.full((every, len(COLUMNS)), math.nan, dtype=self._dtype, device=device)
        self._norms = torch.full((every, width), math.nan, device=device) if width else None
        is_cuda = device.type == "cuda"
        self._host_values = torch.empty(self._values.shape, dtype=self._dtype, pin_memory=is_cuda)
        self._host_norms = torch.empty((every, width), pin_memory=is_cuda)
        self._arrived = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._sent: tuple[int, list[float], list[bool]] | None = None
        self._threshold = (math.nan, torch.full((), math.nan, dtype=self._dtype, device=device))

    @property
    def is_full(self) -> bool:
        """Whether `send` has to come before the next `put`."""
        return self.num_rows == self._every

    @torch.no_grad()
    def put(
        self, outcome: Outcome, threshold: float | Tensor, norms: Tensor | None, update: Tensor | None
    ) -> None:
        """Add a row; norms are one per parameter or not measured, `update` is the update ratio."""
        row = self.num_rows
        found = outcome.total_norm, outcome.clip_coef, outcome.skipped, self._on_device(threshold)
        columns = [value.to(self._device, self._dtype, non_blocking=True) for value in found]
        self._values[row, :_UPDATE].copy_(torch.stack(columns))
        if update is not None:
            self._values[row, _UPDATE].copy_(update, non_blocking=True)
        if self._norms is not None:
            if norms is None:
                self._norms[row].fill_(NO_GRADIENT)
            else:
                self._norms[row].copy_(norms, non_blocking=True)
        self._times[row], self._has_loss[row] = time.time(), False
        self.num_rows += 1

    @torch.no_grad()
    def set_loss(self, loss: float | Tensor) -> None:
        """Add the loss to the latest row."""
        self._has_loss[self.num_rows - 1] = True
        cell = self._values[self.num_rows - 1, _LOSS]
        if isinstance(loss, Tensor):
            cell.copy_(loss.reshape(()), non_blocking=True)
        else:
            cell.fill_(loss)

    def send(self, first: int) -> None:
        """Put the rows on their way and start an empty block; what was sent before has been taken.

        One buffer on each side is enough: the stream copies the rows before it overwrites them.
        """
        n, self.num_rows = self.num_rows, 0
        self._host_values[:n].copy_(self._values[:n], non_blocking=True)
        if self._norms is not None:
            self._host_norms[:n].copy_(self._norms[:n], non_blocking=True)
        self._values.fill_(math.nan)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device))
        self._sent = first, self._times[:n], self._has_loss[:n]

    def take(self, *, wait: bool) -> Rows | None:
        """Return the rows that were sent, once; None while they are on their way, unless told to wait."""
        if self._sent is None or (self._arrived is not None and not wait and not _has_passed(self._arrived)):
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        (first, times, has_loss), self._sent = self._sent, None
        n = len(times)
        norms = None if self._norms is None else self._host_norms[:n].numpy().copy()
        return Rows(first, times, has_loss, self._host_values[:n].double().numpy().copy(), norms)

    def _on_device(self, threshold: float | Tensor) -> Tensor:
        if isinstance(threshold, Tensor):
            return threshold
        if threshold != self._threshold[0]:
            self._threshold = threshold, torch.full((), threshold, dtype=self._dtype, device=self._device)
        return self._threshold[1]


def _has_passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


Block: TypeAlias = HostBlock | DeviceBlock


def block_for(outcome: Outcome, every: int, width: int) -> Block:
    """Return an empty block where this outcome is."""
    if outcome.numbers() is not None:
        return HostBlock(every, width)
    return DeviceBlock(every, width, outcome.total_norm.device)


def fits(block: Block, outcome: Outcome) -> bool:
    """Whether a block takes an outcome without a synchronization."""
    return isinstance(block, DeviceBlock) or outcome.numbers() is not None
