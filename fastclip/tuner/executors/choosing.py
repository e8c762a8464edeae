"""Choose an executor by name."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from fastclip.tuner.executors.base import EpochCallback, Executor, InlineExecutor, device_slots
from fastclip.tuner.training.folds import FoldContext

EXECUTORS = ("auto", "inline", "processes", "ray")


def make_executor(
    name: str,
    context: FoldContext,
    *,
    n_jobs: int,
    devices: Sequence[Any] | None,
    on_epoch: EpochCallback | None = None,
    may_prune: bool = True,
    hang_timeout: float = 600.0,
) -> Executor:
    """Build an executor.

    Args:
        name: "inline", "processes", "ray", or "auto": inline for one job, processes for more.
        context: What all folds share.
        n_jobs: Folds trained at the same time.
        devices: One device per slot, used in turn when there are fewer; None takes every CUDA device, or
            the CPU. On Ray see `ray_workers.RayExecutor`.
        on_epoch: See `Executor.poll`.
        may_prune: Whether on_epoch may return True, for which a worker waits after each epoch.
        hang_timeout: Seconds without a training step after which a worker counts as hung.

    Raises:
        ValueError: see `check_executor`.
    """
    check_executor(name, n_jobs)
    if name == "ray":
        from fastclip.tuner.executors.ray_workers import RayExecutor

        return RayExecutor(context, n_jobs, devices, on_epoch, may_prune=may_prune, hang_timeout=hang_timeout)
    slots = device_slots(devices, n_jobs)
    if name == "inline" or (name == "auto" and n_jobs == 1):
        return InlineExecutor(context, slots[0], on_epoch)
    from fastclip.tuner.executors.processes import ProcessExecutor

    return ProcessExecutor(context, slots, on_epoch, may_prune=may_prune, hang_timeout=hang_timeout)


def count_jobs(n_jobs: int | None) -> int:
    """Return the number of jobs: None is one, -1 every core, -2 all but one, as joblib has it."""
    if n_jobs is None:
        return 1
    try:
        n_jobs = operator.index(n_jobs)
    except TypeError:
        raise TypeError(f"count_jobs: n_jobs={n_jobs!r}; expected a whole number or None.") from None
    if n_jobs >= 0:
        return n_jobs
    import joblib

    return max(1, int(joblib.cpu_count()) + 1 + n_jobs)


def check_executor(name: str, n_jobs: int) -> None:
    """Raise ValueError for an unknown name, n_jobs < 1, or several jobs inline."""
    if name not in EXECUTORS:
        raise ValueError(
            f"check_executor: executor={name!r} is unknown; expected one of {', '.join(EXECUTORS)}."
        )
    if n_jobs < 1:
        raise ValueError(f"check_executor: n_jobs={n_jobs}; expected at least 1.")
    if name == "inline" and n_jobs > 1:
        raise ValueError(f"check_executor: n_jobs={n_jobs} with executor='inline'; expected n_jobs=1.")
