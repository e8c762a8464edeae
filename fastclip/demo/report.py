"""The demo's tables of runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from fastclip.demo.history import History
from fastclip.demo.tasks import Measure

OUTCOME = "outcome"


def runs_table(histories: Sequence[History], title: str, measure: Measure) -> Group:
    """Return how each run ended; below, what its optimizer counted and what clip and step cost in wall time.

    The columns of losses are left out where the measure is a loss.
    """
    return Group(_ends(histories, title, measure), _steps(histories))


def _ends(histories: Sequence[History], title: str, measure: Measure) -> Table:
    losses = () if measure.is_loss else ("train loss", "test loss")
    table = _table((measure.train_name, measure.name, *losses, OUTCOME))
    table.title, table.title_justify = title, "left"
    for history in histories:
        train, test = history.train, history.test
        shown = () if measure.is_loss else (f"{train.loss:.3g}", f"{test.loss:.3g}")
        values = (measure.show(train.value), measure.show(test.value))
        table.add_row(history.run.name, *values, *shown, history.outcome)
    return table


def _steps(histories: Sequence[History]) -> Table:
    table = _table(("clipped steps", "skipped steps", "largest finite norm", "clip + step", "median"))
    table.caption = "Equal clipping parts ways once rounding differs: training amplifies it."
    table.caption_justify = "left"
    for history in histories:
        stats, seconds = history.stats, history.step_seconds
        table.add_row(
            history.run.name,
            f"{stats.clip_fraction:.0%}",
            f"{stats.skipped}",
            f"{stats.largest_norm:.3g}",
            f"{sum(seconds) * 1e3:.0f} ms",
            f"{statistics.median(seconds) * 1e6:.0f} us",
        )
    return table


def _table(headings: Sequence[str]) -> Table:
    """Return a table of runs without rows, whose headings may break between words."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for heading in headings:
        is_text = heading == OUTCOME
        width = max(map(len, heading.split()))
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=is_text, min_width=width)
    return table
