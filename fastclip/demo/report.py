"""The demo's table of runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table

from fastclip.demo.tasks import Measure
from fastclip.demo.training import History


def runs_table(histories: Sequence[History], title: str, measure: Measure) -> Table:
    """Return how each run ended, what its optimizer counted, and what clip and step cost in wall time."""
    caption = "Equal clipping parts ways once rounding differs: training amplifies it."
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("run", no_wrap=True)
    for heading in (
        measure.name,
        "clipped steps",
        "skipped steps",
        "largest finite norm",
        "clip + step",
        "median",
    ):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for history in histories:
        stats, seconds = history.stats, history.step_seconds
        table.add_row(
            history.run.name,
            measure.show(history.score),
            f"{stats.clip_fraction:.0%}",
            f"{stats.skipped}",
            f"{stats.largest_norm:.3g}",
            f"{sum(seconds) * 1e3:.0f} ms",
            f"{statistics.median(seconds) * 1e6:.0f} us",
        )
    return table
