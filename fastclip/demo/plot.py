"""The demo's figure: loss and gradient norm of every run, step by step, with the threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fastclip.demo.tasks import Measure
from fastclip.demo.training import History

_Style: TypeAlias = "tuple[str, str | tuple[int, tuple[int, int]], float]"

_SMOOTHING = 21
"""Steps in the running median that is drawn over the raw curve; odd."""

_RANGE = (1e-3, 1e3)
"""What the logarithmic axes may show. A value below lies on the lower edge, one above is marked."""

_STYLES: tuple[_Style, ...] = (("#D55E00", "-", 2.0), ("#0072B2", "-", 3.5), ("#F0C000", (0, (2, 2)), 2.0))
"""Colour, dashes and width of each run, so that a run which retraces the one before leaves both visible."""

_LEARNED = 0.8
"""A batch whose loss is below this share of the loss of guessing shows that something was learned."""


def plot_histories(
    histories: Mapping[str, History],
    path: Path,
    *,
    title: str,
    subtitle: str,
    measure: Measure,
    guessing_loss: float,
) -> None:
    """Write a PNG with the loss and the gradient norm of each run over its steps, both logarithmic.

    Faint lines are the steps, strong ones their running median. Triangles on the upper edge are steps
    that are not finite or too large for the axis. An arrow shows where a run fell back to guessing for
    good.

    Args:
        histories: One to three runs by name, in the order of the legend.
        path: File to write; an existing one is replaced.
        title: The result, in one line.
        subtitle: The setting, in one line.
        measure: Says how each run was judged.
        guessing_loss: Loss of guessing, in nats, where a line is drawn.
    """
    figure = Figure(figsize=(10, 7.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")

    for (name, history), style in zip(histories.items(), _STYLES, strict=False):
        losses = f"{name}: {measure.name} {measure.show(history.score)}"
        norms = (
            f"{name}: largest norm {history.largest_norm:.3g}, {history.clipped_share:.0%} of steps clipped"
        )
        _draw_curve(loss_axes, history.losses, style, losses)
        _draw_curve(norm_axes, history.norms, style, norms)
        _draw_collapse(loss_axes, history.losses, style, name, guessing_loss)

    _draw_level(loss_axes, guessing_loss, "guessing")
    for max_norm in sorted({history.max_norm for history in histories.values()} - {math.inf}):
        _draw_level(norm_axes, max_norm, f"threshold {max_norm:g}\nclipped above")

    loss_axes.set_ylabel("training loss (nats)")
    norm_axes.set_ylabel("gradient norm before clipping")
    norm_axes.set_xlabel("step")
    for axes, heading in ((loss_axes, subtitle), (norm_axes, None)):
        axes.set_yscale("log")
        axes.margins(x=0, y=0.12)
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            title=heading,
            alignment="left",
            loc="lower left",
            bbox_to_anchor=(0, 1),
            edgecolor="none",
            ncols=2,
        )
    figure.savefig(path)


def _draw_curve(axes: Axes, values: Sequence[float], style: _Style, label: str) -> None:
    """Draw one run's raw and smoothed values, and triangles where they leave the axis."""
    colour, dashes, width = style
    raw = np.asarray(values)
    visible = raw <= _RANGE[1]
    drawn = np.where(visible, raw.clip(min=_RANGE[0]), np.nan)
    axes.plot(drawn, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(_running_median(drawn), color=colour, linestyle=dashes, linewidth=width, label=label)
    (beyond,) = np.nonzero(~visible)
    if len(beyond):
        edge = np.full(len(beyond), 0.98)
        edge_label = "beyond the axis or not finite"
        axes.plot(
            beyond,
            edge,
            "^",
            markersize=4,
            color=colour,
            transform=axes.get_xaxis_transform(),
            label=edge_label,
        )


def _draw_collapse(axes: Axes, losses: Sequence[float], style: _Style, name: str, guessing: float) -> None:
    """Point at the step after which no batch beat guessing, if there is one."""
    (learned,) = np.nonzero(np.asarray(losses) < _LEARNED * guessing)
    step = learned[-1] + 1 if len(learned) else 0
    if step == len(losses):
        return
    axes.annotate(
        f"{name}: learns nothing from step {step} on",
        xy=(step, guessing),
        xytext=(24, 20),
        textcoords="offset points",
        color=style[0],
        arrowprops={"arrowstyle": "->", "color": style[0], "relpos": (0, 0.5)},
    )


def _draw_level(axes: Axes, value: float, label: str) -> None:
    """Draw a horizontal line with its label to the right of the panel."""
    axes.axhline(value, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(label, (1.005, value), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9)


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median around each value; a window with a gap (nan) gives a gap."""
    padded = np.pad(values, _SMOOTHING // 2, mode="reflect")
    return np.median(sliding_window_view(padded, _SMOOTHING), axis=-1)
