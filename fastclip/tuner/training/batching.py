"""Which samples a step sees: mini-batches, and the parts of them whose gradients are added up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fastclip.tuner.training.data import TuningData

DEFAULT_BATCH_SIZE = 32

Indices = npt.NDArray[np.intp]
Part: TypeAlias = tuple[Any, torch.Tensor, float]
"""Inputs, targets, and the share of the step's samples."""


def batch_size_of(params: Mapping[str, Any], data: TuningData) -> int:
    """Return the samples of a mini-batch: the parameter, or what a DataLoader said, or the default."""
    return check_batch_size(params.get("batch_size", data.loading.batch_size or DEFAULT_BATCH_SIZE))


def check_batch_size(batch_size: Any, name: str = "batch_size") -> int:
    """Return batch_size as an int; raise ValueError unless it is a whole number of at least 1."""
    if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
        raise ValueError(f"check_batch_size: {name}={batch_size!r}; expected a whole number of at least 1.")
    return int(batch_size)


def accumulate_of(params: Mapping[str, Any]) -> int:
    """Return how many mini-batches make a step; None is one."""
    wanted = params.get("accumulate")
    return 1 if wanted is None else check_batch_size(wanted, "accumulate")


def num_steps(num_rows: int, params: Mapping[str, Any], data: TuningData) -> int:
    """Return the steps of an epoch."""
    return num_batches(num_rows, batch_size_of(params, data) * accumulate_of(params))


def steps(
    data: TuningData, rows: Indices, params: Mapping[str, Any], device: torch.device, limit: int | None = None
) -> Iterator[Iterator[Part]]:
    """Yield what each step of an epoch sees: `accumulate` mini-batches, the last time those that are left.

    The samples of a step, and the number of steps, are those of mini-batches that are so many times as large.

    Args:
        data: All samples.
        rows: Those of the epoch, in their order.
        params: `batch_size` and `accumulate` are read.
        device: Where inputs and targets are wanted.
        limit: Steps after which to stop, or None.

    Yields:
        Iterators, to be exhausted one after the other: no more than one mini-batch is in memory.
    """
    size = batch_size_of(params, data)
    groups = islice(mini_batches(rows, size * accumulate_of(params)), limit)
    split = [list(mini_batches(group, size)) for group in groups]
    batches = data.batches([part for parts in split for part in parts], device)
    for parts in split:
        total = sum(map(len, parts))
        yield ((*batch, len(part) / total) for part, batch in zip(parts, batches))  # noqa: B905
    next(batches, None)  # processes that read end with their iterator


def num_batches(num_rows: int, batch_size: int) -> int:
    """Return the mini-batches of an epoch; a last one of a single sample joins the one before it.

    Batch normalisation cannot train on one sample.
    """
    full, rest = divmod(num_rows, batch_size)
    return max(1, full + (rest > 1))


def mini_batches(rows: Indices, batch_size: int) -> Iterator[Indices]:
    """Yield the rows of each mini-batch."""
    count = num_batches(len(rows), batch_size)
    for i in range(count):
        yield rows[i * batch_size :] if i == count - 1 else rows[i * batch_size : (i + 1) * batch_size]
