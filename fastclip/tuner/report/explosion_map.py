"""The picture of a whole search by rate and threshold: where it trains, and where it explodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastclip.pages import style
from fastclip.pages.style import NothingToDrawError, is_wide, new_figure
from fastclip.pages.ticks import scale_log
from fastclip.tuner.report import outcomes
from fastclip.tuner.report.limits import score_limits
from fastclip.tuner.report.study_view import StudyView, number
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.explosion import Verdict

MAX_NUMBERED = 3
LANE_SHARE = 0.16  # height of the panel of unclipped trials, as a share of that of the map


def explosion_map(view: StudyView) -> Figure:
    """Draw every trial at its rate and threshold, coloured by outcome, trials that learned by score.

    Trials that did not clip have no threshold and stand in a panel of their own above.
    """
    placed = [record for record in view.records if (number(record.params.get("lr")) or 0.0) > 0]
    if not placed:
        raise NothingToDrawError("No finished trial has a learning rate `lr` among its parameters.")
    clipped = [record for record in placed if threshold(record) is not None]
    unclipped = [record for record in placed if threshold(record) is None]
    figure = new_figure(height=4.2 if clipped else 2.2)
    trials = [group for group in (unclipped, clipped) if group]
    shares = [LANE_SHARE, 1.0] if len(trials) == 2 else [1.0]
    panels = list(figure.subplots(len(trials), sharex=True, squeeze=False, height_ratios=shares)[:, 0])
    rates = [float(record.params["lr"]) for record in placed]
    if is_wide(rates):
        scale_log(panels[-1].xaxis, min(rates), max(rates))
    scores = [float(r.score) for r in placed if r.status is Verdict.OK and r.score is not None]
    limits = score_limits(scores, view.sign) if scores else None
    coloured = [
        points
        for axes, group in zip(panels, trials, strict=True)
        if (points := _draw_trials(axes, view, group, limits)) is not None
    ]
    if unclipped:
        _shape_lane(panels[0])
    if clipped:
        thresholds = [value for record in clipped if (value := threshold(record)) is not None]
        if is_wide(thresholds):
            scale_log(panels[-1].yaxis, min(thresholds), max(thresholds))
        panels[-1].set_ylabel("threshold max_norm")
    panels[-1].set_xlabel("learning rate")
    panels[-1].margins(x=0.08, y=0.1)
    if coloured and limits is not None:
        _draw_colours(figure, panels, coloured[0], view, scores, limits)
    _draw_legend(figure, view, placed)
    return figure


def threshold(record: TrialRecord) -> float | None:
    """Return the threshold of a trial, or None when it did not clip."""
    value = number(record.params.get("max_norm"))
    return value if value is not None and value > 0 else None


def _draw_trials(
    axes: Axes, view: StudyView, trials: Sequence[TrialRecord], limits: tuple[float, float] | None
) -> PathCollection | None:
    """Draw the trials of a panel and number the best; return the points that are coloured by score."""
    coloured = None
    look: dict[str, Any] = {"s": 60, "ec": "white", "lw": 0.8}
    for status in sorted({record.status for record in trials}, key=lambda status: status is Verdict.OK):
        rows = [record for record in trials if record.status is status]
        x, y = [record.params["lr"] for record in rows], [threshold(record) or 0.0 for record in rows]
        marker = outcomes.MARKERS.get(status, outcomes.OTHER_MARKER)
        if status is Verdict.OK and limits is not None:
            scores = np.array([record.score for record in rows], dtype=float)
            low, high = limits
            coloured = axes.scatter(
                x, y, c=scores, cmap=_score_map(view), vmin=low, vmax=high, marker=marker, zorder=3, **look
            )
        else:
            edge = {"ec": style.INK} if status is Verdict.COLLAPSED else {}  # not the yellow of a good score
            axes.scatter(x, y, color=outcomes.COLOURS[status], marker=marker, **{**look, **edge})
    for record in view.ranked[:MAX_NUMBERED]:
        if record in trials:
            place = (float(record.params["lr"]), threshold(record) or 0.0)
            axes.annotate(
                str(record.number), place, xytext=(6, 5), textcoords="offset points", fontsize=9,
                fontweight="bold", color=style.INK, zorder=5,
            )  # fmt: skip
    best = view.best
    if best is not None and best in trials:
        place = (float(best.params["lr"]), threshold(best) or 0.0)
        axes.scatter(*place, s=190, fc="none", ec=style.BEST_COLOUR, lw=2.2, zorder=4)
    return coloured


def _shape_lane(axes: Axes) -> None:
    axes.set_yticks([0.0], ["no clipping"])
    axes.set_ylim(-1.0, 1.0)
    axes.set_facecolor("#F1F4F8")
    axes.grid(visible=False, axis="y")


def _draw_colours(
    figure: Figure,
    panels: Sequence[Axes],
    points: PathCollection,
    view: StudyView,
    scores: Sequence[float],
    limits: tuple[float, float],
) -> None:
    """Draw the scale of the colours, pointed where scores lie beyond it."""
    is_beyond = (min(scores) < limits[0], max(scores) > limits[1])
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(is_beyond, "neither")
    label = f"{view.settings['primary']} of the trials that trained"
    figure.colorbar(points, ax=list(panels), label=label, extend=extend)


def _draw_legend(figure: Figure, view: StudyView, placed: Sequence[TrialRecord]) -> None:
    looks: list[tuple[str, dict[str, Any]]] = [
        (
            str(status),
            {
                "marker": outcomes.MARKERS.get(status, outcomes.OTHER_MARKER),
                "color": outcomes.COLOURS[status],
            },
        )
        for status in dict.fromkeys(record.status for record in placed)
        if status is not Verdict.OK
    ]
    best = view.best
    if best is not None and best in placed:
        ring = {"marker": "o", "mfc": "none", "color": style.BEST_COLOUR}
        looks.append((f"best: trial {best.number}", ring))
    handles = [Line2D([], [], ls="none", ms=7, label=label, **look) for label, look in looks]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=style.LEGEND_COLUMNS)


def _score_map(view: StudyView) -> str:
    """Return the colour map: its dark end, which stands out from the paper, is the good one."""
    return f"{style.SCORE_MAP}_r" if view.sign > 0 else style.SCORE_MAP
