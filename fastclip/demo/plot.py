"""The demo's figure: loss and gradient norm of every run, step by step, with threshold and skipped steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastclip.demo.history import History
from fastclip.demo.tasks import Measure

_Style: TypeAlias = "tuple[str, str | tuple[int, tuple[int, int]], float]"

_SMOOTHING = 21
"""Most steps in the running median that is drawn over the raw curve; odd."""

_RANGE = (1e-3, 1e3)
"""What the logarithmic axes may show. A value below lies on the lower edge, one above is marked."""

_STYLES: Mapping[str, _Style] = MappingProxyType(
    {
        "unclipped": ("#D55E00", "-", 2.0),
        "fastclip": ("#0072B2", "-", 3.5),
        "torch": ("#F0C000", (0, (2, 2)), 2.0),
    }
)
"""Colour, dashes and width by who clips, so that a run which retraces the one before leaves both visible."""

_LEARNED = 0.8
"""A batch whose loss is below this share of the loss of guessing shows that something was learned."""


def plot_histories(
    histories: Sequence[History],
    path: Path,
    *,
    title: str,
    subtitle: str,
    measure: Measure,
    guessing_loss: float,
) -> None:
    """Write a PNG with the loss and the gradient norm of each run over its steps, both logarithmic.

    Runs with a batch of NaN have a column of their own. Faint lines are the steps, strong ones their running
    median. Triangles on the upper edge are steps that are not finite or too large for the axis. Arrows show
    the step that was skipped, and where a run fell back to guessing for good.

    Args:
        histories: The runs, in the order of the legend.
        path: File to write; an existing one is replaced.
        title: The result, in one line.
        subtitle: The setting, in one line.
        measure: Says how each run was judged.
        guessing_loss: Loss of guessing, in nats, where a line is drawn.
    """
    sound = [history for history in histories if not history.run.has_nan]
    spoiled = [history for history in histories if history.run.has_nan]
    columns = [(subtitle, sound)]
    if spoiled:
        columns.append((f"The same with a batch of NaN at step {spoiled[0].nan_step}", spoiled))
    figure = Figure(figsize=(1 + 8 * len(columns), 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    for (loss_axes, norm_axes), (heading, drawn) in zip(grid.T, columns, strict=True):
        _draw_runs(loss_axes, norm_axes, drawn, heading, measure, guessing_loss)
    grid[0, 0].set_ylabel("training loss (nats)")
    grid[1, 0].set_ylabel("gradient norm before clipping")
    figure.savefig(path)


def _draw_runs(
    loss_axes: Axes,
    norm_axes: Axes,
    histories: Sequence[History],
    heading: str,
    measure: Measure,
    guessing_loss: float,
) -> None:
    """Draw one column: the losses above, the norms below."""
    for history in histories:
        name, stats, style = history.run.name, history.stats, _STYLES[history.run.clipper]
        counted = f"{stats.clip_fraction:.0%} of steps clipped, {stats.skipped} skipped"
        losses = f"{name}: {measure.name} {measure.show(history.score)}"
        norms = f"{name}: {counted}, largest norm {stats.largest_norm:.3g}"
        _draw_curve(loss_axes, history.losses, style, losses)
        _draw_curve(norm_axes, history.norms, style, norms)
        _draw_collapse(loss_axes, history, style[0], guessing_loss)
        _draw_skips(norm_axes, history, style[0])
    _draw_level(loss_axes, guessing_loss, "guessing")
    for max_norm in sorted({history.run.max_norm for history in histories} - {math.inf}):
        _draw_level(norm_axes, max_norm, f"threshold {max_norm:g}\nclipped above")
    norm_axes.set_xlabel("step")
    for axes, title in ((loss_axes, heading), (norm_axes, None)):
        for nan_step in {history.nan_step for history in histories if history.nan_step is not None}:
            axes.axvline(nan_step, color="0.6", linestyle="--", linewidth=1, zorder=0)
        axes.set_yscale("log")
        axes.margins(x=0, y=0.2)
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title=title, alignment="left", loc="lower left", bbox_to_anchor=(0, 1), edgecolor="none")


def _draw_curve(axes: Axes, values: Sequence[float], style: _Style, label: str) -> None:
    """Draw one run's raw and smoothed values, and triangles where they leave the axis."""
    colour, dashes, width = style
    raw = np.asarray(values)
    visible = raw <= _RANGE[1]
    drawn = np.where(visible, raw.clip(min=_RANGE[0]), np.nan)
    axes.plot(drawn, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(running_median(drawn), color=colour, linestyle=dashes, linewidth=width, label=label)
    (beyond,) = np.nonzero(~visible)
    if len(beyond):
        edge = np.full(len(beyond), 0.98)
        edge_label = "beyond the axis or not finite"
        axes.plot(
            beyond,
            edge,
            "^",
            markersize=2 + 2 * width,
            color=colour,
            transform=axes.get_xaxis_transform(),
            label=edge_label,
        )


def _draw_collapse(axes: Axes, history: History, colour: str, guessing: float) -> None:
    """Point at the step after which no batch beat guessing, if there is one."""
    (learned,) = np.nonzero(np.asarray(history.losses) < _LEARNED * guessing)
    step = learned[-1] + 1 if len(learned) else 0
    if step < len(history.losses):
        _point_at(axes, (step, guessing), f"{history.run.name}: learns nothing from step {step} on", colour)


def _draw_skips(axes: Axes, history: History, colour: str) -> None:
    """Point at each step that was left out."""
    for step in history.skipped:
        _point_at(axes, (step, _RANGE[0] * 2), f"{history.run.name}: skips step {step}", colour)


def _point_at(axes: Axes, point: tuple[float, float], text: str, colour: str) -> None:
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 2, "relpos": (0, 0.5)}
    background = {"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.8}
    axes.annotate(
        text, xy=point, xytext=(24, 14), textcoords="offset points", arrowprops=arrow, bbox=background
    )


def _draw_level(axes: Axes, value: float, label: str) -> None:
    """Draw a horizontal line with its label to the right of the panel."""
    axes.axhline(value, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(label, (1.005, value), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9)


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of the values (not nan) around each; a window that is mostly nan gives a gap.

    Towards the ends the window shrinks on both sides, so that a loss which falls to its end is drawn so.
    """
    medians = np.full(len(values), np.nan)
    for i in range(len(values)):
        reach = min(_SMOOTHING // 2, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        known = window[np.isfinite(window)]
        if len(known) > reach:
            medians[i] = np.median(known)
    return medians
