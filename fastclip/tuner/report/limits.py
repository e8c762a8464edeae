"""What range of scores a picture shows: the best always, and no worse ones that would squash the rest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes

from fastclip.pages import style

BAD_QUANTILE = 0.25
REACH = 3.0  # of the distance from the best to the bad quartile, beyond which a score counts as an outlier
MARGIN = 0.16  # of the range, left free on both sides


def score_limits(scores: Iterable[float], sign: int) -> tuple[float, float]:
    """Return the smallest and the largest score that are no outliers.

    Args:
        scores: At least one finite number.
        sign: 1 when a larger score is better, -1 otherwise.
    """
    goodness = sign * np.array(list(scores), dtype=float)
    best = goodness.max()
    reach = REACH * (best - np.quantile(goodness, BAD_QUANTILE))
    shown = goodness if reach == 0 else goodness[goodness >= best - reach]
    return float((sign * shown).min()), float((sign * shown).max())


def mark_beyond(
    axes: Axes, places: Iterable[float], scores: Iterable[float], limits: tuple[float, float]
) -> None:
    """Set the vertical limits, and point at the scores beyond them with triangles on the edge."""
    low, high = limits
    room = MARGIN * (high - low) or MARGIN * abs(high) or MARGIN
    axes.set_ylim(low - room, high + room)
    paired = list(zip(places, scores, strict=True))
    below = [place for place, score in paired if score < low]
    above = [place for place, score in paired if score > high]
    for beyond, marker, edge in ((below, "v", low - room / 4), (above, "^", high + room / 4)):
        if beyond:
            label = f"{len(beyond)} beyond the axis"
            axes.scatter(
                beyond,
                [edge] * len(beyond),
                s=26,
                marker=marker,
                fc="none",
                ec=style.INK,
                lw=1.0,
                label=label,
            )
