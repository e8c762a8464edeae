"""A run as one picture: how many times faster than torch foreach, case by case."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastclip.bench.peers import FOREACH
from fastclip.bench.results import Results, Row
from fastclip.files import write_whole

# Mode -> colour and what a reader who knows nothing of modes is told.
STYLES = {
    "inactive": ("#14746f", "nothing to clip"),
    "active": ("#e07a3f", "every gradient scaled"),
    "norm": ("#6b7a99", "norm only"),
}
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
TICKS = (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200)
BAR_HEIGHT = 0.38
INK = "#222222"
FAINT = "#7a7a7a"


def save_plot(results: Results, path: Path) -> None:
    """Draw a run and write the PNG, whole or not at all."""
    buffer = io.BytesIO()
    draw(results).savefig(buffer, format="png", dpi=160)
    write_whole(path, buffer.getvalue())


def draw(results: Results) -> Figure:
    """Return one pair of bars for each workload and dtype.

    Norms alone are drawn only where nothing else was timed.
    """
    rows = [row for row in results.rows if row.mode != "norm"] or results.rows
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.dtype), []).append(row)
    figure = Figure(figsize=(9.6, 1.6 + 0.48 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for position, group in enumerate(groups.values()):
        for index, row in enumerate(group):
            _bar(axes, row, position + (index - (len(group) - 1) / 2) * BAR_HEIGHT)
    labels = [f"{group[0].title}  {SHORT_DTYPES[group[0].dtype]}" for group in groups.values()]
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    _style(axes, rows)
    _annotate(axes, results, rows)
    return figure


def _bar(axes: Axes, row: Row, position: float) -> None:
    ratio = row.ratio(FOREACH.name)
    # From 1x to the ratio: on a logarithmic axis a bar has no zero to start at.
    axes.barh(position, ratio - 1, BAR_HEIGHT * 0.92, left=1, color=STYLES[row.mode][0], zorder=2)
    times = f"{row.measurements[FOREACH.name].median_ms:.3g} → {row.subject_ms:.3g} ms"
    behind: dict[str, Any] = {"xy": (max(ratio, 1), position), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{ratio:.1f}x", xytext=(5, 0), fontsize=8.5, fontweight="bold", color=INK, **behind)
    axes.annotate(times, xytext=(38, 0), fontsize=7.5, color=FAINT, **behind)


def _style(axes: Axes, rows: list[Row]) -> None:
    ratios = [row.ratio(FOREACH.name) for row in rows]
    bare_axes(axes, TICKS)
    # Room on the right for the text behind the longest bar.
    axes.set_xlim(min(0.9, 0.8 * min(ratios)), 2.2 * max(ratios))


def bare_axes(axes: Axes, ticks: Sequence[float]) -> None:
    """Leave of the axes a logarithmic one of ratios, and a line at 1."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _annotate(axes: Axes, results: Results, rows: list[Row]) -> None:
    env = results.environment
    axes.set_title(
        "Gradient clipping: how many times faster than torch foreach",
        loc="left",
        pad=24,
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    axes.annotate(
        f"{env.hardware.cpu}, {results.options['threads']} threads, {env.hardware.instruction_set} · "
        f"torch {env.versions['torch']} · fastclip {env.commit} · medians of one run · logarithmic axis",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
    )
    for mode in dict.fromkeys(row.mode for row in rows):
        axes.barh(0, 0, color=STYLES[mode][0], label=STYLES[mode][1])
    axes.figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)
