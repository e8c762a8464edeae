"""The rows over DTensors as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastclip.bench.distributed import NUM_FIRST, SIDE, DistributedResults
from fastclip.bench.table import digits


def render(results: DistributedResults) -> RenderableType:
    """Return the table of a run of `run_distributed`; times are medians in milliseconds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("DTensors", "what"):
        table.add_column(title)
    for title in ("fastclip\nms", "torch\nms", "vs"):
        table.add_column(title, justify="right")
    for row in results.rows:
        ours = row.measurements["fastclip"].median_ms
        for peer, measured in row.measurements.items():
            if peer != "fastclip":
                name = row.what + peer.removeprefix("torch").replace("_", ", ")
                times = digits(ours), digits(measured.median_ms), f"{row.ratio(peer):.1f}x"
                table.add_row(str(row.num_tensors), name, *times)
    legend = Text(
        f"{SIDE} x {SIDE} float32 on a mesh of one rank (gloo), nothing clipped, warm, {results.threads} "
        f"thread(s). The first call over {NUM_FIRST} takes {results.first_call_ms:.1f} ms.",
        style="dim",
    )
    return Group(table, legend)
