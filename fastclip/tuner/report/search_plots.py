"""Pictures of a whole search: its history, and what matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.trial import FrozenTrial, TrialState

from fastclip.pages import style
from fastclip.pages.style import NothingToDrawError, legend_above, new_figure
from fastclip.tuner.report import outcomes
from fastclip.tuner.report.importance import MIN_TRIALS, importances_of
from fastclip.tuner.report.limits import mark_beyond, score_limits
from fastclip.tuner.report.study_view import StudyView
from fastclip.tuner.study.records import TrialRecord, finished_trials
from fastclip.tuner.study.trial_run import STATUS_ATTR
from fastclip.tuner.training.explosion import WITH_SCORE, Verdict

RAIL = 0.04  # distance of trials without a score from the bad edge, as a share of the axis


def search_history(view: StudyView) -> Figure:
    """Draw the score of each trial and the best so far; trials without one stand at the bad edge."""
    if not view.records:
        raise NothingToDrawError("No trial has finished.")
    figure = new_figure()
    axes = figure.subplots()
    scored = [record for record in view.records if record.has_score]
    if scored:
        _draw_scores(axes, view, scored)
    else:
        axes.set_yticks([])
    for status in (status for status in view.counts if status not in WITH_SCORE):
        axes.scatter(
            [record.number for record in view.records if record.status is status],
            [RAIL if view.sign > 0 else 1 - RAIL] * view.counts[status],
            s=42,
            lw=0,
            marker=outcomes.MARKERS.get(status, outcomes.OTHER_MARKER),
            color=outcomes.COLOURS[status],
            label=str(status),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=3,
        )
    last = view.records[-1].number
    axes.set_xlim(-0.03 * last - 0.5, 1.03 * last + 0.5)  # marks on the rail do not widen the axis
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=f"{view.settings['primary']}, mean over folds")
    legend_above(axes)
    return figure


def _draw_scores(axes: Axes, view: StudyView, scored: Sequence[TrialRecord]) -> None:
    """Draw the trials with a score, outliers on the edge, with the number of the best."""
    numbers, scores = [r.number for r in scored], np.array([r.score for r in scored], dtype=float)
    limits = score_limits(scores, view.sign)
    best_so_far = view.sign * np.maximum.accumulate(view.sign * scores)
    axes.step(numbers, best_so_far, where="post", color=style.BEST_COLOUR, lw=2, label="best so far")
    for status in dict.fromkeys(record.status for record in scored):
        axes.scatter(
            [record.number for record in scored if record.status is status],
            [record.score or 0.0 for record in scored if record.status is status],
            s=30,
            marker=outcomes.MARKERS[status],
            color=outcomes.COLOURS[status],
            edgecolors=style.INK if status is Verdict.COLLAPSED else None,
            linewidths=0.5,
            label=str(status),
            zorder=3,
        )
    mark_beyond(axes, numbers, scores, limits)
    best = view.ranked[0]
    axes.annotate(
        f"trial {best.number}", (best.number, best.score or 0.0), xytext=(0, 5 * view.sign),
        textcoords="offset points", ha="center", va="bottom" if view.sign > 0 else "top", fontsize=9,
        fontweight="bold", color=style.INK, zorder=4,
    )  # fmt: skip


def importances(view: StudyView) -> Figure:
    """Draw how much of the variance each parameter explains: of the score, and of exploding at all."""
    explained = (
        ("what the score hangs on", Verdict.OK, _importance(view, _score)),
        ("what explosions hang on", Verdict.EXPLODED, _importance(view, _has_exploded)),
    )
    drawn = [(label, verdict, shares) for label, verdict, shares in explained if shares]
    if not drawn:
        raise NothingToDrawError(
            f"Importances need at least {MIN_TRIALS} trials with a score and two parameters "
            "that differ among them."
        )
    names = sorted(
        {name for _, _, shares in drawn for name in shares},
        key=lambda name: max(shares.get(name, 0.0) for _, _, shares in drawn),
    )
    figure = new_figure(height=1.6 + 0.5 * len(names))
    axes = figure.subplots()
    width = 0.76 / len(drawn)
    for i, (label, verdict, shares) in enumerate(drawn):
        middles = np.arange(len(names)) + (len(drawn) - 1 - 2 * i) * width / 2
        lengths = [shares.get(name, 0.0) for name in names]
        bars = axes.barh(middles, lengths, width, color=outcomes.COLOURS[verdict], label=label)
        axes.bar_label(bars, fmt="{:.0%}", padding=4, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="share of the variance explained (fANOVA)", xlim=(0, 1.08))
    axes.grid(visible=False, axis="y")
    legend_above(axes)
    return figure


def _importance(view: StudyView, value_of: Callable[[FrozenTrial], float]) -> dict[str, float]:
    """Return the share of the variance per parameter, over the trials whose value is finite."""
    told = [
        trial
        for trial in finished_trials(view.study)
        if trial.state is TrialState.COMPLETE and math.isfinite(value_of(trial))
    ]
    return importances_of(told, [value_of(trial) for trial in told])


def _score(trial: FrozenTrial) -> float:
    """Return the score of a trial, infinite for one that exploded."""
    return math.nan if trial.value is None else trial.value


def _has_exploded(trial: FrozenTrial) -> float:
    """Return 1 for a trial that exploded, 0 for one that did not."""
    return float(trial.user_attrs[STATUS_ATTR] == Verdict.EXPLODED)
