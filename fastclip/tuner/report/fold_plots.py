"""Pictures of folds: how far they agree, how they learned, how large their gradients were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastclip.pages import style
from fastclip.pages.style import NothingToDrawError, is_wide, legend_above, new_figure
from fastclip.pages.ticks import scale_log
from fastclip.tuner.report import outcomes
from fastclip.tuner.report.limits import mark_beyond, score_limits
from fastclip.tuner.report.study_view import StudyView, clip_fraction, number
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.explosion import Verdict
from fastclip.tuner.training.stepping import NORM_BINS_PER_DECADE, EpochRecord

MAX_BOXES = 12
NEXT_BEST = 4
MIN_FOLDS_FOR_BOX = 5  # a marker for each fold below
MARKERS = "osD^"


def fold_scores(view: StudyView) -> Figure:
    """Draw every fold score of the best trials, the best on the left; from five folds on, in a box.

    Below five folds each has a marker of its own and a dash is their mean: quartiles of so few say nothing.
    """
    trials = view.ranked[:MAX_BOXES]
    if not trials:
        raise NothingToDrawError("No trial has a score on every fold.")
    figure = new_figure()
    axes = figure.subplots()
    scores = [[fold.score for fold in record.folds if fold.score is not None] for record in trials]
    places = [float(i) for i in range(1, len(trials) + 1)]
    if view.settings["n_folds"] < MIN_FOLDS_FOR_BOX:
        _draw_folds(axes, trials, places)
    else:
        _draw_boxes(axes, scores, places)
    points = [(place, score) for place, folds in zip(places, scores, strict=True) for score in folds]
    x, y = zip(*points, strict=True)
    mark_beyond(axes, x, y, score_limits(y, view.sign))
    axes.set_xticks(places, [str(record.number) for record in trials])
    axes.set(xlabel="trial, the best first", ylabel=view.settings["primary"])
    axes.set_xlim(0.4, len(trials) + 0.6)
    axes.grid(visible=False, axis="x")
    if axes.get_legend_handles_labels()[0]:
        legend_above(axes, columns=MIN_FOLDS_FOR_BOX + 1)
    return figure


def learning_curves(view: StudyView) -> Figure:
    """Draw loss and score per epoch of the trial looked at: the mean over folds in the band of the folds."""
    record = view.shown
    curves = view.curves(record) if record is not None else []
    if record is None or not curves:
        raise NothingToDrawError(
            "No fold finished an epoch."
            if view.output is not None
            else "Epoch records are kept in an output directory (output_dir); this study has none."
        )
    primary = view.settings["primary"]
    figure = new_figure()
    panels = figure.subplots(1, 1 if primary == "loss" else 2, squeeze=False)[0]
    loss = panels[0]
    _draw_band(loss, curves, "train_loss", style.SECOND_COLOUR, "training", dashes="--")
    _draw_band(loss, curves, "loss", outcomes.COLOURS[Verdict.OK], "held out")
    losses = [epoch[key] for curve in curves for epoch in curve for key in ("train_loss", "loss")]
    if is_wide(losses):
        scale_log(loss.yaxis, min(losses), max(losses))
    loss.set_ylabel("loss")
    for panel in panels[1:]:
        _draw_next_best(panel, view, primary)
        _draw_band(panel, curves, primary, outcomes.COLOURS[Verdict.OK], f"trial {record.number}")
        panel.set_ylabel(primary)
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_above(panel)
    return figure


def gradient_norms(view: StudyView) -> Figure:
    """Draw the norms of the trial looked at with its threshold, and those of exploded trials."""
    record = view.shown
    counts = _sum_counts([record]) if record is not None else Counter()
    if record is None or not counts:
        raise NothingToDrawError("No optimizer step was taken.")
    figure = new_figure()
    axes = figure.subplots()
    is_exploded = record.status is Verdict.EXPLODED
    colour = outcomes.COLOURS[Verdict.EXPLODED if is_exploded else Verdict.OK]
    edges, shares = _histogram(counts)
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.75, label=f"trial {record.number}")
    others = [r for r in view.records if r.status is Verdict.EXPLODED and r is not record]
    exploded = _sum_counts(others)
    if exploded:
        edges, shares = _histogram(exploded)
        dark = outcomes.COLOURS[Verdict.EXPLODED]
        axes.stairs(shares, edges, color=dark, lw=1.6, label=f"steps before {len(others)} explosions")
    threshold = number(record.params.get("max_norm"))
    if threshold is not None and threshold > 0:
        axes.axvline(threshold, color=style.INK, lw=1.5, ls="--", label=f"threshold {threshold:.3g}")
        note = f"{clip_fraction(record):.0%} of the steps clipped"
        axes.annotate(
            note, (threshold, 0.97), xycoords=axes.get_xaxis_transform(), xytext=(6, 0),
            textcoords="offset points", va="top", fontsize=9, color=style.INK,
        )  # fmt: skip
    scale_log(axes.xaxis, edges[0], edges[-1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(y=0.15)
    axes.set(xlabel="gradient norm before clipping", ylabel="share of the steps")
    legend_above(axes)
    return figure


def _draw_folds(axes: Axes, trials: Sequence[TrialRecord], places: Sequence[float]) -> None:
    """Draw the folds of each trial with a marker for each fold, and a dash for the mean."""
    for fold in range(len(trials[0].folds)):
        heights = [np.nan if (score := r.folds[fold].score) is None else score for r in trials]
        marker = MARKERS[fold]
        axes.scatter(
            places, heights, s=30, lw=0, color=style.INK, marker=marker, label=f"fold {fold}", zorder=3
        )
    colours = [style.BEST_COLOUR, *[style.FAINT] * (len(trials) - 1)]
    means = [record.score or 0.0 for record in trials]
    starts, ends = [place - 0.3 for place in places], [place + 0.3 for place in places]
    axes.hlines(means, starts, ends, colors=colours, lw=3, label="mean")


def _draw_boxes(axes: Axes, scores: Sequence[Sequence[float]], places: Sequence[float]) -> None:
    """Draw a box for each trial with every fold in it."""
    boxes = axes.boxplot(
        scores, positions=places, widths=0.5, showfliers=False, patch_artist=True,
        medianprops={"color": style.INK},
    )  # fmt: skip
    for i, box in enumerate(boxes["boxes"]):
        box.set(facecolor=style.BEST_COLOUR if i == 0 else "#CFE3F2", edgecolor="#7B8794", alpha=0.75)
    for place, folds in zip(places, scores, strict=True):
        axes.scatter([place] * len(folds), folds, s=12, lw=0, color=style.INK, alpha=0.7, zorder=3)


def _draw_band(
    axes: Axes, curves: Sequence[list[EpochRecord]], key: str, colour: str, label: str, dashes: str = "-"
) -> None:
    """Draw each fold faintly, and mean and range over the epochs that every fold has."""
    for curve in curves:
        axes.plot([e["epoch"] + 1 for e in curve], [e[key] for e in curve], color=colour, lw=0.8, alpha=0.35)
    shared = min(len(curve) for curve in curves)
    values = np.array([[epoch[key] for epoch in curve[:shared]] for curve in curves])
    epochs = np.arange(1, shared + 1)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.16, lw=0)
    marker = "o" if shared == 1 else None
    axes.plot(epochs, values.mean(axis=0), dashes, color=colour, lw=2.2, marker=marker, label=label)


def _draw_next_best(axes: Axes, view: StudyView, key: str) -> None:
    label: str | None = f"the next {min(NEXT_BEST, len(view.ranked) - 1)}"
    for record in view.ranked[1 : 1 + NEXT_BEST]:
        curves = view.curves(record)
        if not curves:
            continue
        shared = min(len(curve) for curve in curves)
        means = np.mean([[epoch[key] for epoch in curve[:shared]] for curve in curves], axis=0)
        axes.plot(range(1, shared + 1), means, color=style.FAINT, lw=1.3, label=label)
        label = None


def _sum_counts(records: Iterable[TrialRecord]) -> Counter[int]:
    total: Counter[int] = Counter()
    for record in records:
        for fold in record.folds:
            total.update(fold.norm_counts)
    return total


def _histogram(counts: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return bin edges and the share of the steps per bin, from counts per tenth of a decade."""
    keys = np.arange(min(counts), max(counts) + 1)
    edges = 10.0 ** (np.arange(keys[0], keys[-1] + 2) / NORM_BINS_PER_DECADE)
    return edges, np.array([counts[int(key)] for key in keys]) / counts.total()
