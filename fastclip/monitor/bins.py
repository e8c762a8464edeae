"""Steps put together where a picture has fewer columns than a run has steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastclip.monitor.reading import Run

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """At most as many spans of steps as were asked for, of equal length but for the last.

    Attributes:
        steps: Number of the first step of each.
        low: Smallest finite norm; nan where there is none.
        high: Largest finite norm; nan where there is none.
        threshold: Median threshold.
        clipped: Share of the steps that were clipped.
        skipped: Number of the steps that were skipped.
        last_step: Number of the last step of all.
    """

    steps: Floats
    low: Floats
    high: Floats
    threshold: Floats
    clipped: Floats
    skipped: NDArray[np.int64]
    last_step: float


def bins(run: Run, num_bins: int) -> Bins:
    """Put the steps of a run, which has some, into bins."""
    size = -(-len(run) // num_bins)
    starts = np.arange(0, len(run), size)
    counts = np.diff([*starts, len(run)])
    norms = np.where(np.isfinite(run["norm"]), run["norm"], np.nan)
    thresholds = np.pad(run["threshold"], (0, len(starts) * size - len(run)), mode="edge")
    return Bins(
        run["step"][starts],
        np.fmin.reduceat(norms, starts),
        np.fmax.reduceat(norms, starts),
        np.median(thresholds.reshape(-1, size), axis=1),
        np.add.reduceat(run.clipped.astype(np.float64), starts) / counts,
        np.add.reduceat(run.skipped.astype(np.int64), starts),
        float(run["step"][-1]),
    )
