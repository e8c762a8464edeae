"""Interleaved timing: all peers in the same rounds of the same run, until a time budget is spent."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

QUANTILES = (0, 5, 20, 50, 80, 95, 100)
MIN_ROUNDS = 7
MAX_ROUNDS = 3000

Call = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """How long one call took over the rounds of a run.

    Attributes:
        num_rounds: Number of timed calls.
        quantiles_ms: Percentage (one of QUANTILES) -> milliseconds.
    """

    num_rounds: int
    quantiles_ms: dict[int, float]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Measurement:
        """Summarise the times of single calls."""
        values = np.percentile(np.asarray(seconds) * 1e3, QUANTILES)
        return cls(len(seconds), {q: float(value) for q, value in zip(QUANTILES, values, strict=True)})

    @property
    def median_ms(self) -> float:
        """Return the median."""
        return self.quantiles_ms[50]

    @property
    def p20_ms(self) -> float:
        """Return the 20th percentile."""
        return self.quantiles_ms[20]

    @property
    def p80_ms(self) -> float:
        """Return the 80th percentile."""
        return self.quantiles_ms[80]


def wall_clock(call: Call) -> float:
    """Return the seconds that a call takes as its caller sees them."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the order of each round, without end.

    Every permutation takes its turn, so that over the run each peer follows each other one equally often
    and none always inherits the caches that the same neighbour left.
    """
    return itertools.cycle(itertools.permutations(names))


def interleave(
    calls: Mapping[str, Call],
    *,
    budget_s: float,
    before: Call | None = None,
    stopwatch: Callable[[Call], float] = wall_clock,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Measurement]:
    """Time several calls in alternation.

    One round that is not counted comes first: it pays for page faults, thread pools and caches of shapes.

    Args:
        calls: Name -> what to time.
        budget_s: Seconds after which no further round starts.
        before: Runs before every call and is not timed.
        stopwatch: Runs a call and returns its seconds.
        min_rounds: Rounds made even if the budget is spent.
        max_rounds: Rounds after which more add nothing.

    Returns:
        Name -> measurement, each over the same number of rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + budget_s
    with _no_garbage_collection():
        for number, order in enumerate(rounds(list(calls))):
            if number > max_rounds or (number > min_rounds and time.perf_counter() >= deadline):
                break
            for name in order:
                if before is not None:
                    before()
                elapsed = stopwatch(calls[name])
                if number > 0:
                    seconds[name].append(elapsed)
    return {name: Measurement.of(values) for name, values in seconds.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from pausing whichever call happens to trigger it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
