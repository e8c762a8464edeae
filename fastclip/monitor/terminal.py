"""A run in the terminal: its norms against the threshold, shares, skips and events."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastclip.monitor.bins import Bins, bins
from fastclip.monitor.reading import Reader, Run
from fastclip.monitor.records import describe
from fastclip.monitor.suggestion import Suggestion

HEIGHT = 10
MARGIN = 10  # columns for the labels of the axis
NUM_EVENTS = 6
REFRESH_SECONDS = 1.0
DECADES = 2.5  # shown on either side of the threshold: an explosion must not flatten the rest
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def show(console: Console, run: Run) -> None:
    """Print a run."""
    console.print(render(run, console.width))


def follow(console: Console, reader: Reader, *, wait: Callable[[float], object] = time.sleep) -> None:
    """Show a run while it goes on, until it is interrupted.

    Args:
        console: Where to.
        reader: Of the run.
        wait: Called between two looks with the seconds to wait.
    """
    reader.update()
    with Live(render(reader.run(), console.width), console=console, auto_refresh=False) as live:
        try:
            while True:
                wait(REFRESH_SECONDS)
                if reader.update():
                    live.update(render(reader.run(), console.width), refresh=True)
        except KeyboardInterrupt:
            return


def render(run: Run, width: int) -> Panel:
    """Return a run as a panel that is `width` columns wide."""
    title = f"fastclip monitor · {run.path.parent}"
    if not len(run):
        return Panel("No step has been written yet.", title=title, title_align="left", box=box.ROUNDED)
    parts: list[RenderableType] = [_chart(bins(run, max(10, width - MARGIN - 6))), _figures(run)]
    if run.events:
        parts.append(_events(run))
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, width=width)


def suggestions(found: Suggestion) -> Table:
    """Return proposals as a table, the best one marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("write", no_wrap=True)
    table.add_column("threshold", justify="right", no_wrap=True)
    table.add_column("clips", justify="right", no_wrap=True)
    table.add_column("what it is")
    for proposal in found.proposals:
        is_best = proposal is found.best
        table.add_row(
            Text(proposal.code),
            f"{proposal.threshold:.3g}",
            f"{proposal.share:.1%}",
            proposal.reason,
            style="bold green" if is_best else "",
        )
    return table


def _chart(found: Bins) -> Text:
    """Draw the largest norm of each bin as a bar; red is what lies above the threshold, which is a line."""
    finite = np.concatenate([found.high, found.threshold])
    finite, threshold = (v[np.isfinite(v) & (v > 0)] for v in (finite, found.threshold))
    if not len(finite):
        return Text("No norm is finite and above 0.")
    middle = float(np.log10(np.median(threshold if len(threshold) else finite)))
    top = min(float(np.log10(finite.max())) + 0.02, middle + DECADES)
    bottom = max(float(np.log10(finite.min())) - 0.1, middle - DECADES)
    span = max(top - bottom, 0.3)
    with np.errstate(divide="ignore", invalid="ignore"):
        bars, lines = (
            np.nan_to_num((np.log10(values) - bottom) / span * HEIGHT, nan=0.0, posinf=2 * HEIGHT, neginf=0.0)
            for values in (found.high, found.threshold)
        )
    text = Text()
    for row in reversed(range(HEIGHT)):
        label = f"{10 ** (bottom + (row + 1) / HEIGHT * span):.3g}" if (HEIGHT - 1 - row) % 3 == 0 else ""
        text.append(f"{label:>{MARGIN - 2}} ┤" if label else " " * (MARGIN - 1) + "│", style="dim")
        for bar, line in zip(bars, lines, strict=True):
            fill = min(max(bar - row, 0.0), 1.0)
            if row <= line < row + 1 and fill < 1:
                text.append("─", style="yellow")
            else:
                text.append(_EIGHTHS[round(8 * fill)], style="red" if row >= line else "blue")
        text.append("\n")
    text.append(f"{'skipped':>{MARGIN - 2}} │", style="dim")
    text.append("".join("×" if skips else " " for skips in found.skipped) + "\n", style="bold magenta")
    first, last = f"{found.steps[0]:.0f}", f"{found.last_step:.0f}"
    text.append(" " * MARGIN + first + last.rjust(len(bars) - len(first)) + "\n", style="dim")
    text.append(" " * MARGIN)
    for sign, style, meaning in (
        ("█", "blue", "norm  "),
        ("█", "red", "clipped  "),
        ("─", "yellow", "threshold"),
    ):
        text.append(sign, style=style)
        text.append(f" {meaning}", style="dim")
    return text


def _figures(run: Run) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    seconds = run["time"][-1] - run["time"][0]
    window = int(run.settings.get("window", len(run)))
    losses = run["loss"][np.isfinite(run["loss"])]
    figures = {
        "step": f"{run['step'][-1]:.0f}",
        "norm": f"{run['norm'][-1]:.3g}",
        "threshold": f"{run['threshold'][-1]:.3g}",
        f"clipped, last {min(window, len(run))}": f"{run['clipped_share'][-1]:.0%}",
        "clipped, all": f"{run.clipped.mean():.0%}",
        "skipped": f"{run.skipped.sum()}",
        "loss": f"{losses[-1]:.4g}" if len(losses) else "–",
        "steps/s": f"{(len(run) - 1) / seconds:.3g}" if seconds > 0 else "–",
    }
    for name in figures:
        table.add_column(name, justify="right")
    table.add_row(*figures.values())
    return table


def _events(run: Run) -> Text:
    text = Text()
    for event in run.events[-NUM_EVENTS:]:
        is_warning = event["kind"] == "warning"
        prefix = f"step {event['step']}: " if is_warning else ""
        text.append(f"{prefix}{describe(event)}\n", style="yellow" if is_warning else "magenta")
    if len(run.events) > NUM_EVENTS:
        text.append(f"and {len(run.events) - NUM_EVENTS} events before\n", style="dim")
    return text
