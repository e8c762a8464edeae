"""The comparison of strategies as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastclip.bench.strategies import CostRow
from fastclip.bench.table import digits
from fastclip.demo.comparison import NAN_STEP, SPIKE, SPIKES, ComparisonResults, Score


def render(results: ComparisonResults) -> RenderableType:
    """Return scores, the mean over the seeds, by contender and trial; then what a step costs."""
    trials = list(dict.fromkeys((s.task, s.condition, s.rate) for s in results.scores))
    contenders = list(dict.fromkeys(s.contender for s in results.scores))
    scores = {(s.contender, s.task, s.condition, s.rate): s for s in results.scores}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("max_norm")
    for task, condition, rate in trials:
        table.add_column(f"{task}, rate {rate:g}\n{condition}", justify="right")
    for name in contenders:
        table.add_row(name, *(mean(scores[(name, *trial)]) for trial in trials))
    legend = Text(
        f"Mean over seeds {', '.join(map(str, results.seeds))}: test accuracy, and for characters bits per "
        f"character of held-out text (less is better). NaN batch: the inputs of step {NAN_STEP}. Outliers: "
        f"{SPIKES:.0%} of the losses times {SPIKE:g}.",
        style="dim",
    )
    return Group(table, legend, Text(), render_costs(results.costs))


def render_costs(costs: Sequence[CostRow]) -> RenderableType:
    """Return what a step costs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("AdamW step of GPT-2", "ms", "cost"):
        table.add_column(title, justify="left" if title.startswith("Adam") else "right")
    for row in costs:
        table.add_row(row.strategy, digits(row.measurement.median_ms), f"{row.cost:+.1%}")
    return table


def mean(score: Score) -> str:
    """Return the mean over the seeds, or that one of them is nan."""
    known = [value for value in score.scores if value is not None]
    return "nan" if len(known) < len(score.scores) else f"{sum(known) / len(known):.3f}"
