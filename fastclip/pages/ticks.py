"""Ticks that a reader can tell apart."""

from __future__ import annotations

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

MAX_LOG_TICKS = 7
STEPS = ((100.0, (1.0, 2.0, 5.0)), (1e4, (1.0, 3.0)))  # up to which ratio of the ends, which labels


def scale_log(axis: Axis, low: float, high: float) -> None:
    """Make an axis logarithmic, with few short labels: over a small range 1, 2, 5 or 1, 3 of a decade.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        low: The smallest value shown, above 0.
        high: The largest.
    """
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")  # type: ignore[attr-defined]
    steps = next((steps for ratio, steps in STEPS if high / low < ratio), (1.0,))
    axis.set_major_locator(LogLocator(subs=steps, numticks=MAX_LOG_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
