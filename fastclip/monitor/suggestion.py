"""Propose a threshold, or a rule that finds one, from the norms that a run has seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fastclip.monitor.reading import Run, read

MIN_STEPS = 40
MAD_TO_SIGMA = 1.4826
"""What makes the median absolute deviation of a normal distribution its standard deviation."""
OUTLIER = 4.0
"""Deviations from the median beyond which a norm is taken for an outlier."""
DRIFT = 2.0
"""Growth or decay of the median from the first third of a run to the last that no fixed threshold follows."""
WINDOW = 128

Norms = NDArray[np.float64]


@dataclass(frozen=True)
class Proposal:
    """One way to clip.

    Attributes:
        code: What to write in a ClippedOptimizer.
        threshold: What it comes to at the end of the run.
        share: Share of the run's steps that it would have clipped, had their norms been the same.
        reason: What the threshold is.
    """

    code: str
    threshold: float
    share: float
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """What `suggest` found.

    Attributes:
        best: The proposal to begin with.
        proposals: All, the best included: fixed thresholds from low to high, then rules.
        drift: Median norm of the last third of the steps over that of the first.
        num_steps: Steps with a finite norm.
    """

    best: Proposal
    proposals: list[Proposal]
    drift: float
    num_steps: int


def suggest(run: str | Path | Run) -> Suggestion:
    """Propose max_norm or a strategy from the norms of a run.

    Where the norms stay where they are, that is the border of outliers: median + 4 sigma, with sigma from the
    median absolute deviation, which outliers cannot move. Where the median drifts by more than a factor of
    two, the border of the last 128 steps follows it. Norms depend on the clipping that they were seen under;
    look again after a change.

    Args:
        run: The directory that a monitor writes to, its file, or what `read` returned.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: Fewer than 40 steps have a finite norm, or most norms are 0.
    """
    seen = run if isinstance(run, Run) else read(run)
    norms = seen.finite_norms
    if len(norms) < MIN_STEPS:
        raise ValueError(
            f"suggest: {seen.path} has {len(norms)} steps with a finite norm; expected at least {MIN_STEPS}."
        )
    if np.median(norms) == 0:
        raise ValueError(f"suggest: most norms in {seen.path} are 0; expected a run that learns.")
    third = len(norms) // 3
    first, last = float(np.median(norms[:third])), float(np.median(norms[-third:]))
    drift = last / first if first > 0 else math.inf
    border = _fixed(norms, _border(norms), "median + 4 sigma")
    fixed = [
        _fixed(norms, float(np.quantile(norms, quantile)), f"{quantile:.0%} quantile")
        for quantile in (0.5, 0.9, 0.99)
    ]
    rules = [
        _rule(
            norms,
            f"strategies.MedianMAD(k={OUTLIER:g}, window={WINDOW})",
            _border,
            "the same, moving",
        ),
        _rule(
            norms,
            f"strategies.Percentile(90, window={WINDOW})",
            lambda window: float(np.quantile(window, 0.9)),
            "90% quantile, moving",
        ),
    ]
    best = border if 1 / DRIFT <= drift <= DRIFT else rules[0]
    ordered = sorted([border, *fixed], key=lambda proposal: proposal.threshold)
    return Suggestion(best, [*ordered, *rules], drift, len(norms))


def _border(norms: Norms) -> float:
    median = np.median(norms)
    return float(median + OUTLIER * MAD_TO_SIGMA * np.median(np.abs(norms - median)))


def _fixed(norms: Norms, threshold: float, reason: str) -> Proposal:
    rounded = float(f"{threshold:.3g}")
    return Proposal(f"max_norm={rounded:g}", rounded, float(np.mean(norms > rounded)), reason)


def _rule(norms: Norms, code: str, rule: Callable[[Norms], float], reason: str) -> Proposal:
    """Follow a rule over the steps: each is judged by the window of those before it."""
    window = min(WINDOW, len(norms) // 2)
    thresholds = np.array([rule(before) for before in sliding_window_view(norms, window)])
    share = float(np.mean(norms[window:] > thresholds[:-1]))
    return Proposal(code, float(thresholds[-1]), share, reason)
