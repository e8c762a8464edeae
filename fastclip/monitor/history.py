"""The latest steps of a run, as far back as shares and warnings look; its size does not grow."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BEFORE = 10
"""Norms that the record of a step that is not finite tells of the steps before."""


class History:
    """The latest two windows of steps.

    Args:
        window: Steps of one.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._norms: deque[float] = deque(maxlen=2 * window)
        self._clipped: deque[bool] = deque(maxlen=2 * window)
        self._skipped: deque[bool] = deque(maxlen=2 * window)
        self._by_parameter: deque[NDArray[np.float32] | None] = deque(maxlen=2 * window)
        self._num_clipped = 0  # of the latest window

    def add(self, norm: float, clipped: bool, skipped: bool, norms: NDArray[np.float32] | None) -> None:
        """Add a step."""
        self._num_clipped += clipped
        if len(self._clipped) >= self.window:
            self._num_clipped -= self._clipped[-self.window]
        self._norms.append(norm)
        self._clipped.append(clipped)
        self._skipped.append(skipped)
        self._by_parameter.append(norms)

    @property
    def clipped_share(self) -> float:
        """Return the share of the latest window's steps that were clipped; 0 before the first."""
        return self._num_clipped / min(len(self._clipped), self.window) if self._clipped else 0.0

    @property
    def is_full(self) -> bool:
        """Whether there are two windows to compare."""
        return len(self._norms) == 2 * self.window

    @property
    def was_finite(self) -> bool:
        """Whether the latest step was; True before the first."""
        return not self._norms or (math.isfinite(self._norms[-1]) and not self._skipped[-1])

    def before(self) -> list[float]:
        """Return the latest norms, oldest first."""
        return list(self._norms)[-NUM_BEFORE:]

    def shares(self, what: str) -> tuple[float, float]:
        """Return the share of "clipped" or "skipped" steps in the window before the latest, and in that."""
        values = list(self._clipped if what == "clipped" else self._skipped)
        return sum(values[: self.window]) / self.window, sum(values[self.window :]) / self.window

    def medians(self) -> tuple[float, float]:
        """Return the median of the finite norms in the window before the latest, and in that; nan of none."""
        values = np.array(self._norms)
        older, newer = (part[np.isfinite(part)] for part in np.split(values, [self.window]))
        return (
            (float(np.median(older)), float(np.median(newer)))
            if len(older) and len(newer)
            else (math.nan,) * 2
        )

    def fastest(self, modules: dict[str, list[int]]) -> tuple[str, float] | None:
        """Return the module whose norms grew most from one window to the next, and how many times.

        Args:
            modules: Name -> positions of its parameters.
        """
        rows = list(self._by_parameter)
        windows = rows[: self.window], rows[self.window :]
        measured = [[row for row in window if row is not None] for window in windows]
        if not all(measured):
            return None
        older, newer = (
            np.nan_to_num(np.stack(window).astype(np.float64), posinf=0) ** 2 for window in measured
        )
        best = None
        for name, positions in modules.items():
            before, after = (np.median(np.sqrt(s[:, positions].sum(axis=1))) for s in (older, newer))
            if before > 0 and (best is None or after / before > best[1]):
                best = name, float(after / before)
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, for a checkpoint; norms of single parameters are left out."""
        return {"norms": list(self._norms), "clipped": list(self._clipped), "skipped": list(self._skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, whose window may have been another."""
        self.__init__(self.window)  # type: ignore[misc]
        for norm, clipped, skipped in zip(state["norms"], state["clipped"], state["skipped"], strict=True):
            self.add(norm, clipped, skipped, None)
