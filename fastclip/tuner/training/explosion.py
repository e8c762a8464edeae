"""What an explosion is, and the verdict on a fold."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """How a fold, or a trial, ended. Values are the words in `cv_results_` and in the files."""

    OK = "ok"
    EXPLODED = "exploded"
    OOM = "oom"
    DEGENERATE = "degenerate"  # a class of the test part never occurs in the training part
    ERROR = "error"
    KILLED = "killed"
    PRUNED = "pruned"
    NOT_RUN = "not run"  # an earlier fold of the trial decided it

    def __str__(self) -> str:
        """Return the word alone."""
        return self.value


TOLD_AS_WORST = (Verdict.EXPLODED, Verdict.OOM)


@dataclass(frozen=True)
class ExplosionRule:
    """When training counts as exploded.

    A non-finite loss or gradient norm is always an explosion. Beyond that:

    Attributes:
        norm_factor: k: the norm before clipping is above k x the running median ...
        norm_steps: m: ... for m steps in a row. None for the factor switches the test off.
        window: Steps over which the running median is taken.
        loss_factor: c: the training loss of a step is above c x the loss of the first step. None is off.
        every: Steps between two looks. Each look is one host synchronisation; 1 stops at once, on a GPU a
            larger number keeps the queue full.
    """

    norm_factor: float | None = 100.0
    norm_steps: int = 5
    window: int = 101
    loss_factor: float | None = 4.0
    every: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("norm_factor", "loss_factor"):
            value = getattr(self, name)
            if value is not None and not value > 1.0:
                raise ValueError(f"ExplosionRule: {name}={value}; expected a factor above 1, or None.")
        for name in ("norm_steps", "window", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"ExplosionRule: {name}={getattr(self, name)}; expected at least 1.")


class ExplosionWatch:
    """Follows the loss and the gradient norm of one training run."""

    def __init__(self, rule: ExplosionRule) -> None:
        self.rule = rule
        self._initial_loss: float | None = None
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._high_steps = 0

    def look(self, loss: float, norm: float) -> str | None:
        """Take in one step; return why it counts as an explosion, or None.

        Args:
            loss: Training loss of the step.
            norm: Norm of all gradients before clipping.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self._initial_loss is None:
            self._initial_loss = loss
        c = self.rule.loss_factor
        if c is not None and loss > c * abs(self._initial_loss):
            return f"the loss {loss:.4g} is above {c:g} x the initial {self._initial_loss:.4g}"
        return self._look_at_norm(norm)

    def _look_at_norm(self, norm: float) -> str | None:
        k = self.rule.norm_factor
        if k is None:
            return None
        median = self._sorted[len(self._sorted) // 2] if self._sorted else math.inf
        self._high_steps = self._high_steps + 1 if norm > k * median else 0
        if self._high_steps >= self.rule.norm_steps:
            return (
                f"the gradient norm was above {k:g} x its running median {median:.4g} for {self._high_steps} "
                f"steps and reached {norm:.4g}"
            )
        if self._high_steps == 0:  # a spike must not move the median that it is measured by
            insort(self._sorted, norm)
            self._recent.append(norm)
            if len(self._recent) > self.rule.window:
                del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        return None
