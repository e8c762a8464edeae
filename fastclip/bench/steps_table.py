"""The step rows as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastclip.bench.results import Results
from fastclip.bench.steps import DEFAULT, FUSED, SUBJECT
from fastclip.bench.table import about_memory, digits


def render(results: Results) -> RenderableType:
    """Return the table of a run of `run_steps`; times are medians in milliseconds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("parameters", "optimizer, clipping"):
        table.add_column(title)
    for title in ("fastclip\nms", "clip + fused\nms", "clip + default\nms", "vs\nfused", "vs\ndefault"):
        table.add_column(title, justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("of\nmemory", justify="right")
    for row in results.rows:
        table.add_row(
            row.title,
            row.mode,
            *(digits(row.measurements[name].median_ms) for name in (SUBJECT, FUSED, DEFAULT)),
            *(f"{row.ratio(name):.2f}x" for name in (FUSED, DEFAULT)),
            f"{row.gbps:.1f}",
            f"{row.share:.0%}",
        )
    legend = Text(
        "clip + fused, clip + default: torch.nn.utils.clip_grad_norm_, then torch's step with fused=True and "
        "as it is by default.\n"
        f"{about_memory(results)} The gradients are read once more than the update needs.",
        style="dim",
    )
    return Group(table, legend)
