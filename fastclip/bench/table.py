"""A run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastclip.bench.distributed import NUM_FIRST, SIDE
from fastclip.bench.peers import PEERS
from fastclip.bench.results import Results, Row
from fastclip.bench.steps import DEFAULT, FUSED, SUBJECT
from fastclip.bench.timing import Measurement

TITLES = {peer.name: peer.title for peer in PEERS}

# A row on one line; a terminal that is narrower breaks the lines itself, which keeps every figure.
WIDTH = 160


def console() -> Console:
    """Return a console for standard output that is wide enough for the table."""
    wide = Console()
    wide.width = max(WIDTH, wide.width)
    return wide


def render(results: Results) -> RenderableType:
    """Return the table of a run, with the environment above and the reading aid below.

    Times are medians in milliseconds with the 20th and 80th percentile.
    """
    subject, *others = (TITLES.get(name, name) for name in results.rows[0].measurements)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("gradients", "dtype", "clipping"):
        table.add_column(title, no_wrap=True)
    for title in (subject, *others):
        table.add_column(f"{title}\nms", justify="right", no_wrap=True)
    for title in others:
        table.add_column(f"vs {title.rpartition(' ')[2]}", justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("of\nmemory", justify="right")
    table.add_column("relative\nerror", justify="right")
    for title in others[:1]:
        table.add_column(f"{title}'s\nerror", justify="right")
    previous: Row | None = None
    for row in results.rows:
        if previous is not None and previous.model != row.model:
            table.add_section()
        table.add_row(*_cells(row, previous))
        previous = row
    return Group(_heading(results), table, _legend(results, subject))


def _cells(row: Row, previous: Row | None) -> list[RenderableType]:
    same_model = previous is not None and previous.model == row.model
    same_dtype = same_model and previous is not None and previous.dtype == row.dtype
    return [
        "" if same_model else row.title,
        "" if same_dtype else row.dtype,
        row.mode,
        *(_time(measurement) for measurement in row.measurements.values()),
        *(_ratio(ratio) for ratio in row.ratios.values()),
        f"{row.gbps:.1f}",
        f"{row.share:.0%}",
        *(f"{error:.1e}" for error in list(row.relative_errors.values())[:2]),
    ]


def _time(measurement: Measurement) -> Text:
    text = Text(digits(measurement.median_ms))
    text.append(f" {digits(measurement.p20_ms)}–{digits(measurement.p80_ms)}", style="dim")
    return text


def digits(value: float) -> str:
    """Return about three significant digits, without an exponent."""
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _ratio(ratio: float) -> Text:
    return Text(f"{ratio:.2f}x", style="green" if ratio >= 1 else "red")


def _heading(results: Results) -> Text:
    env = results.environment
    return Text(
        f"{env.hardware.cpu}, {env.hardware.num_cores} cores, {results.options['threads']} threads, "
        f"{env.hardware.instruction_set} · torch {env.versions['torch']} · "
        f"fastclip {env.versions['fastclip']} ({env.commit})"
    )


def _legend(results: Results, subject: str) -> Text:
    return Text(
        f"Times: median, 20th to 80th percentile. vs: the peer's median over {subject}'s. "
        f"GB/s: of the bytes that must move, N to read, 2 N more to scale.\n"
        f"{about_memory(results)} Caches can lift it above 100 %, the cost of a call lowers it for small "
        f"lists.\nErrors: of the norm, against float64.",
        style="dim",
    )


def about_memory(results: Results) -> str:
    """Explain the column that compares a row with the memory."""
    read = _range([row.read_gbps for row in results.rows])
    update = _range([row.update_gbps for row in results.rows])
    return (
        f"of memory: against {read} GB/s read ({results.bandwidth.read_by}) and {update} GB/s read and "
        f"written ({results.bandwidth.update_by}), measured before each row;\n"
        f"'vs' divided by it is the most that this memory allows."
    )


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low}–{high}"


def render_steps(results: Results) -> RenderableType:
    """Return the table of a run of `run_steps`; times are medians in milliseconds."""
    table = _plain(
        ("parameters", "optimizer, clipping"),
        *("fastclip\nms", "clip + fused\nms", "clip + default\nms", "vs\nfused", "vs\ndefault"),
        *("GB/s", "of\nmemory"),
    )
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


def render_distributed(results: dict[str, Any]) -> RenderableType:
    """Return the table of a run of `run_distributed`; times are medians in milliseconds."""
    table = _plain(("DTensors", "what"), "fastclip\nms", "torch\nms", "vs")
    for row in results["rows"]:
        for peer, ratio in row["derived"]["ratios"].items():
            times = (digits(row["measurements"][name]["quantiles_ms"][50]) for name in ("fastclip", peer))
            name = row["what"] + peer.removeprefix("torch").replace("_", ", ")
            table.add_row(str(row["num_tensors"]), name, *times, f"{ratio:.1f}x")
    legend = Text(
        f"{SIDE} x {SIDE} float32 on a mesh of one rank (gloo), nothing clipped, warm, {results['threads']} "
        f"thread(s). The first call over {NUM_FIRST} takes {results['first_call_ms']:.1f} ms.",
        style="dim",
    )
    return Group(table, legend)


def _plain(left: Iterable[str], *right: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in left:
        table.add_column(title)
    for title in right:
        table.add_column(title, justify="right")
    return table
