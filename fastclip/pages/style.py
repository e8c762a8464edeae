"""How the pictures of a report look, and what they become: SVG for the page, PNG for files."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Of the palette of Okabe and Ito, which people with any colour vision can tell apart.
MAIN_COLOUR = "#0072B2"
BAD_COLOUR = "#D55E00"
BEST_COLOUR = "#E69F00"
SECOND_COLOUR = "#009E73"
FAINT = "#B8C0CC"
INK = "#1F2933"
SCORE_MAP = "viridis"

LOG_FROM_RATIO = 20.0
PNG_DPI = 200
LEGEND_COLUMNS = 4  # what fits over a picture of the usual width

STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures are the same everywhere
    "axes.edgecolor": "#9AA5B1",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E9EDF2",
    "xtick.color": "#52606D",
    "ytick.color": "#52606D",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fastclip",  # names inside the file are the same each time
}


class NothingToDrawError(Exception):
    """A picture has no data; the message tells the reader of the report why."""


def new_figure(width: float = 6.6, height: float = 3.7) -> Figure:
    """Return a figure that belongs to no window."""
    return Figure(figsize=(width, height), layout="constrained")


def is_wide(values: Iterable[float]) -> bool:
    """Tell whether values call for a logarithmic axis."""
    finite = list(values)
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= LOG_FROM_RATIO


def legend_above(axes: Axes, columns: int = LEGEND_COLUMNS) -> None:
    """Put the legend over the axes, where it hides no data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, handletextpad=0.4, columnspacing=1.4
    )


def to_svg(figure: Figure) -> bytes:
    """Return a figure as SVG with its text as outlines."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # equal data give equal files
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI)
    return buffer.getvalue()
