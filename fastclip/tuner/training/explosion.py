"""What an explosion is, and the verdict on a fold."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """How a fold, or a trial, ended. Values are the words in `cv_results_` and in the files."""

    OK = "ok"
    COLLAPSED = "collapsed"  # ends at guessing, with the score of a guess
    EXPLODED = "exploded"
    OOM = "oom"
    DEGENERATE = "degenerate"  # a class of the test part never occurs in the training part
    ERROR = "error"
    KILLED = "killed"
    PRUNED = "pruned"
    OUT_OF_TIME = "out of time"
    NOT_RUN = "not run"  # an earlier fold of the trial decided it

    def __str__(self) -> str:
        """Return the word alone."""
        return self.value


TOLD_AS_WORST = (Verdict.EXPLODED, Verdict.OOM)
WITH_SCORE = (Verdict.OK, Verdict.COLLAPSED)

EARLY_STEPS = 21
MAX_SPREAD = 2.0
NORMAL_MAD = 1.4826  # deviation of a normal variable over its median absolute deviation


@dataclass(frozen=True)
class ExplosionRule:
    """When training counts as exploded.

    A non-finite loss or gradient norm is always an explosion. Beyond that:

    Attributes:
        norm_factor: k: the norm before clipping is above k x the larger of its running median and the median
            of the first 21 steps, which are not tested ...
        norm_steps: m: ... for m steps in a row. None for the factor switches the test off.
        window: Steps over which the running median is taken.
        loss_factor: c: the training loss of a step is above c x e^s x the larger of the loss of guessing and
            the loss of the untrained model; s, at most 2, is the robust deviation of the logarithm of the
            first losses, near 0 for large batches ...
        loss_steps: ... in half of so many steps. None for the factor switches the test off, and so does a
            loss below zero: a multiple of it means nothing.
        every: Steps between two looks. Each look is one host synchronisation; 1 stops at once, on a GPU a
            larger number keeps the queue full.
    """

    norm_factor: float | None = 100.0
    norm_steps: int = 5
    window: int = 101
    loss_factor: float | None = 4.0
    loss_steps: int = 10
    every: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("norm_factor", "loss_factor"):
            value = getattr(self, name)
            if value is not None and not value > 1.0:
                raise ValueError(f"ExplosionRule: {name}={value}; expected a factor above 1, or None.")
        for name in ("norm_steps", "window", "loss_steps", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"ExplosionRule: {name}={getattr(self, name)}; expected at least 1.")


class ExplosionWatch:
    """Follows the loss and the gradient norm of one training run.

    Args:
        rule: When it counts as exploded.
        reference: The larger of the loss of guessing and of the untrained model; None when neither is known,
            which leaves the first loss.
    """

    def __init__(self, rule: ExplosionRule, reference: float | None = None) -> None:
        self.rule = rule
        self._reference = reference
        self._early_losses: list[float] = []
        self._early_norms: list[float] = []
        self._is_above: deque[bool] = deque(maxlen=rule.loss_steps)
        self._has_meaning = reference is None or reference > 0
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._high_steps = 0

    def look(self, loss: float, norm: float | None) -> str | None:
        """Take in one step; return why it counts as an explosion, or None.

        Args:
            loss: Training loss of the step.
            norm: Norm of all gradients before clipping; None where float16 could not hold it.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is None:
            return self._look_at_loss(loss)
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        return self._look_at_loss(loss) or self._look_at_norm(norm)

    def _look_at_loss(self, loss: float) -> str | None:
        c = self.rule.loss_factor
        self._has_meaning &= loss >= 0
        if c is None or not self._has_meaning:
            return None
        if self._reference is None:
            self._reference = loss
        if len(self._early_losses) < EARLY_STEPS:
            self._early_losses.append(loss)
        bound = c * math.exp(_log_spread(self._early_losses)) * self._reference
        self._is_above.append(loss > bound)
        needed = (self.rule.loss_steps + 1) // 2
        if loss <= bound or sum(self._is_above) < needed:
            return None
        return (
            f"the loss {loss:.4g} is above {bound:.4g} for the {needed}. time in {len(self._is_above)} "
            f"steps; it began at {self._reference:.4g}"
        )

    def look_at_epoch(self, trained: float, held_out: float) -> str | None:
        """Return why a finished epoch counts as an explosion, or None.

        An epoch may be shorter than the steps that single mini-batches need to be believed. Overfitting
        raises the held-out loss alone, so both must be high.

        Args:
            trained: Mean training loss of the epoch.
            held_out: Loss on the held-out samples after it.
        """
        c = self.rule.loss_factor
        if not math.isfinite(held_out):
            return f"the held-out loss is {held_out}"
        if c is None or not self._has_meaning or self._reference is None:
            return None
        if min(trained, held_out) <= c * self._reference:
            return None
        return (
            f"training and held-out loss, {trained:.4g} and {held_out:.4g}, are above {c:g} x the "
            f"{self._reference:.4g} that it began at"
        )

    def _look_at_norm(self, norm: float) -> str | None:
        k = self.rule.norm_factor
        if k is None:
            return None
        # Norms that fall as training converges, or are 0 in most steps, leave a median that says little.
        is_early = len(self._early_norms) < EARLY_STEPS
        if is_early:  # the norm of the first mini-batch may be anything when it is a single sample
            self._early_norms.append(norm)
        recent = self._sorted[len(self._sorted) // 2] if self._sorted else 0.0
        median = max(statistics.median(self._early_norms), recent)
        self._high_steps = self._high_steps + 1 if not is_early and norm > k * median > 0 else 0
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


def _log_spread(losses: list[float]) -> float:
    """Return the robust deviation of the logarithm of the losses: how far mini-batches differ."""
    logs = [math.log(loss) for loss in losses if loss > 0]
    if not logs:
        return 0.0
    middle = statistics.median(logs)
    return min(MAX_SPREAD, NORMAL_MAD * statistics.median(abs(value - middle) for value in logs))
