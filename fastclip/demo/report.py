"""The demo's table of runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich.table import Table

from fastclip.demo.tasks import Measure
from fastclip.demo.training import History


def runs_table(histories: Mapping[str, History], title: str, measure: Measure) -> Table:
    """Return how each run ended, what clipping saw and what it cost in wall time."""
    caption = "Equal clipping part ways once rounding differs: training amplifies the last bit."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("run", no_wrap=True)
    for heading in (measure.name, "clipped steps", "largest norm", "time clipping", "median per step"):
        table.add_column(heading, justify="right")
    for name, history in histories.items():
        table.add_row(
            name,
            measure.show(history.score),
            f"{history.clipped_share:.0%}",
            _largest_norm(history),
            f"{sum(history.clip_seconds) * 1e3:.1f} ms",
            f"{statistics.median(history.clip_seconds) * 1e6:.0f} us",
        )
    return table


def _largest_norm(history: History) -> str:
    step = history.first_nonfinite_step
    return f"{history.largest_norm:.3g}" + ("" if step is None else f", not finite from step {step}")
