"""What a strategy has seen as a row of numbers, for checkpoints that hold nothing but tensors of known size.

How long the row is follows from the strategy's settings and the number of gradients that there may be, not
from what it has seen: a new strategy's row is one into which that of another run can be read.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
    for path, like in _places(strategy, num_gradients):
        value = own.get(path)
        numbers = [] if value is None else torch.as_tensor(value).reshape(-1).tolist()
        if len(numbers) > like.numel():
            raise ValueError(
                f"{type(strategy).__name__}: it has seen {len(numbers)} gradients in a step; expected at "
                f"most {num_gradients}, the parameters that require one."
            )
        row.append(_ABSENT if value is None else len(numbers))
        row += numbers + [math.nan] * (like.numel() - len(numbers))
    return row


def unpacked(
    row: Sequence[float], strategy: Strategy, num_gradients: int
) -> tuple[dict[str, Any], Sequence[float]]:
    """Return what `load_state_dict` of the strategy takes, and the rest of the row.

    Of a strategy that grows it is what that has seen by now.

    Raises:
        ValueError: The row begins with that of another strategy.
    """
    places = list(_places(strategy, num_gradients))
    end = 1 + sum(1 + like.numel() for _, like in places)
    if len(row) < end or row[0] != _class_number(strategy):
        raise ValueError(_of_another(strategy))
    state: dict[str, Any] = strategy.state_dict()
    at = 1
    for path, like in places:
        size, at = row[at], at + 1
        *folders, name = path
        folder = state
        for key in folders:
            folder = folder[key]
        if size == _ABSENT:
            folder.pop(name, None)
        else:
            numbers = torch.tensor(row[at : at + int(size)], dtype=torch.float64)
            folder[name] = numbers.reshape(like.shape) if size == like.numel() else numbers
        at += like.numel()
    return state, row[end:]


def unpacked_all(
    row: Sequence[float], strategies: Iterable[tuple[Strategy, int]]
) -> list[tuple[Strategy, dict[str, Any]]]:
    """Return the states of strategies whose rows stand one behind the other.

    Args:
        row: All of them.
        strategies: Each with its number of gradients.

    Raises:
        ValueError: The rows are those of other strategies.
    """
    states = []
    for strategy, num_gradients in strategies:
        state, row = unpacked(row, strategy, num_gradients)
        states.append((strategy, state))
    if states and row:
        raise ValueError(_of_another(states[-1][0]))
    return states


def _of_another(strategy: Strategy) -> str:
    return f"{strategy!r}: the checkpoint is of another strategy; expected the same, with the same settings."


def _places(strategy: Strategy, num_gradients: int) -> Iterator[tuple[_Path, Tensor]]:
    """Yield where each value stands, and one of its shape with as many numbers as there are at most."""
    if not strategy.grows:
        for path, value in _values(_begun(strategy, num_gradients).state_dict()):
            yield path, torch.as_tensor(value)


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
