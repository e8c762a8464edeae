"""What a strategy has seen as a row of numbers, for checkpoints that hold nothing but tensors of known size.

How long the row is follows from the strategy's settings and the number of gradients that there may be, not
from what it has seen: a new strategy's row is one into which that of another run can be read.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.strategies.base import Strategy

_ABSENT = -1.0
"""In the place of a length: of a strategy that has seen nothing."""

_Path = tuple[str, ...]


def packed(strategy: Strategy, num_gradients: int) -> list[float]:
    """Return the row: what tells the class, then each value's length, the value, and nan up to its end.

    Of a strategy that grows it is the class alone.

    Raises:
        ValueError: It has seen more gradients than that.
    """
    row = [_class_number(strategy)]
    own = dict(_values(strategy.state_dict()))
    for path, size in _sizes(strategy, num_gradients):
        value = own.get(path)
        numbers = [] if value is None else torch.as_tensor(value).reshape(-1).tolist()
        if len(numbers) > size:
            raise ValueError(
                f"{type(strategy).__name__}: it has seen {len(numbers)} gradients in a step; expected at "
                f"most {num_gradients}, the parameters that require one."
            )
        row.append(_ABSENT if value is None else len(numbers))
        row += numbers + [math.nan] * (size - len(numbers))
    return row


def unpacked(row: Sequence[float], strategy: Strategy, num_gradients: int) -> dict[str, Any]:
    """Return what `load_state_dict` of the strategy takes; of one that grows, what it has seen by now.

    Raises:
        ValueError: The row is that of another strategy.
    """
    sizes = list(_sizes(strategy, num_gradients))
    if not row or row[0] != _class_number(strategy) or len(row) != 1 + sum(1 + size for _, size in sizes):
        raise ValueError(
            f"{strategy!r}: the checkpoint is of another strategy; expected the same, with the same settings."
        )
    state: dict[str, Any] = strategy.state_dict()
    like = dict(_values(_begun(strategy, num_gradients).state_dict()))
    at = 1
    for path, size in sizes:
        length = row[at]
        numbers = torch.tensor(row[at + 1 : at + 1 + max(int(length), 0)], dtype=torch.float64)
        at += 1 + size
        *folders, name = path
        folder = state
        for key in folders:
            folder = folder[key]
        if length == _ABSENT:
            folder.pop(name, None)
        elif isinstance(like[path], Tensor):
            folder[name] = numbers.reshape(like[path].shape) if length == size else numbers
        else:
            folder[name] = int(numbers)
    return state


def length(strategy: Strategy, num_gradients: int) -> int:
    """Return how long the row is."""
    return 1 + sum(1 + size for _, size in _sizes(strategy, num_gradients))


def _sizes(strategy: Strategy, num_gradients: int) -> Iterator[tuple[_Path, int]]:
    """Yield where each value stands and how many numbers it has at most."""
    if not strategy.grows:
        for path, value in _values(_begun(strategy, num_gradients).state_dict()):
            yield path, value.numel() if isinstance(value, Tensor) else 1


def _begun(strategy: Strategy, num_gradients: int) -> Strategy:
    """Return a twin with the state of before the first step."""
    twin = copy.deepcopy(strategy)
    twin.begin(torch.zeros(num_gradients, dtype=torch.float64))
    return twin


def _values(state: dict[str, Any], above: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _values(value, (*above, key))
        elif not isinstance(value, str):
            yield (*above, key), value


def _class_number(strategy: Strategy) -> float:
    """Return a number for the class and that of a strategy in it."""

    def names(state: dict[str, Any]) -> Iterator[str]:
        for value in state.values():
            if isinstance(value, dict):
                yield from names(value)
            elif isinstance(value, str):
                yield value

    return float(zlib.crc32(" ".join(names(strategy.state_dict())).encode()))
