"""Where folds run. An executor takes tasks and gives results; the search never sees how.

To add one, write the four members of `Executor`, train with `folds.run_fold`, and name it in
`choosing.make_executor`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch

from fastclip.tuner.training.folds import FoldContext, FoldResult, FoldTask, run_fold
from fastclip.tuner.training.stepping import EpochRecord

EpochCallback: TypeAlias = Callable[[FoldTask, EpochRecord], bool]


class Executor(Protocol):
    """Trains folds.

    Attributes:
        slots: Number of folds that train at the same time.
    """

    slots: int

    def submit(self, task: FoldTask) -> None:
        """Take a fold. The caller keeps at most `slots` of them unfinished."""

    def poll(self, timeout: float) -> list[FoldResult]:
        """Return the folds that finished, waiting at most `timeout` seconds for the first.

        Calls `on_epoch(task, record)` for each epoch, in the caller's thread, and ends the fold as pruned
        when it returns True; what it raises ends the poll as it is. A worker that died or hangs costs its
        fold: it is tried once more and then given back as `Verdict.KILLED`.
        """

    def close(self) -> None:
        """Stop whatever still runs, and wait for its end."""


class InlineExecutor:
    """Trains one fold after the other in the calling process."""

    slots = 1

    def __init__(
        self, context: FoldContext, device: torch.device, on_epoch: EpochCallback | None = None
    ) -> None:
        self._context, self._device, self._on_epoch = context, device, on_epoch
        self._queue: deque[FoldTask] = deque()

    def submit(self, task: FoldTask) -> None:
        """Take a fold."""
        self._queue.append(task)

    def poll(self, timeout: float) -> list[FoldResult]:
        """Train the next fold to its end."""
        del timeout
        task = self._queue.popleft()
        report = None if self._on_epoch is None else partial(self._report, self._on_epoch, task)
        try:
            return [run_fold(self._context, task, self._device, on_epoch=report)]
        except _CallbackError as failure:
            raise failure.error from None

    def close(self) -> None:
        """Forget what has not started."""
        self._queue.clear()

    @staticmethod
    def _report(on_epoch: EpochCallback, task: FoldTask, record: EpochRecord) -> bool:
        try:
            return on_epoch(task, record)
        except Exception as error:
            raise _CallbackError(error) from error


class _CallbackError(BaseException):
    """Carries what a callback raised out of a fold, which would take an Exception for its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def device_slots(devices: Sequence[Any] | None, n_jobs: int) -> list[torch.device]:
    """Return the device of each of n_jobs slots.

    Args:
        devices: Names of devices or torch.device objects, taken in turn; "cuda" without a number stands for
            every visible one. None is every CUDA device, or the CPU.
        n_jobs: Number of slots.

    Raises:
        ValueError: no device is given, or one is not there; the message names it.
    """
    if devices is None:
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    if isinstance(devices, (str, torch.device)):
        devices = [devices]
    if not devices:
        raise ValueError("device_slots: devices is empty; expected at least one, or None.")
    found = [found for device in devices for found in _find_devices(device)]
    return [found[i % len(found)] for i in range(n_jobs)]


def _find_devices(wanted: Any) -> list[torch.device]:
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_slots: devices has {wanted!r}; expected the name of a device, such as cpu or cuda:0."
        ) from error
    count = torch.cuda.device_count()
    if str(device) == "cuda" and count:
        return [torch.device("cuda", i) for i in range(count)]
    if device.type == "cuda" and (device.index or 0) >= count:
        present = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise ValueError(
            f"device_slots: devices has {wanted!r}, which is not there; expected one of {present}."
        )
    return [device]
