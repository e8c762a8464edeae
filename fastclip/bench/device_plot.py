"""A run on a GPU as one picture: how far each implementation is from what the memory allows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastclip.bench.plot import FAINT, INK, bare_axes
from fastclip.bench.results import MIN_NBYTES, quoted_backend
from fastclip.files import write_whole

# Peer -> colour, marker and name; whatever backend of fastclip is quoted comes first.
STYLES = {
    "fastclip": ("#14746f", "D", "fastclip"),
    "torch_foreach": ("#e07a3f", "o", "torch foreach"),
    "apex": ("#6b7a99", "s", "Apex"),
    "transformer_engine": ("#a05195", "^", "TransformerEngine"),
    "nemo": ("#c2a83e", "v", "NeMo Automodel"),
}
MODES = {"inactive": "nothing to clip: read once", "active": "every gradient scaled: read, read and write"}
TICKS = (1, 1.5, 2, 3, 5, 7, 10, 15, 20)


def save_plot(run: dict[str, Any], path: Path) -> None:
    """Draw a run on a GPU and write the PNG, whole or not at all."""
    buffer = io.BytesIO()
    draw(run).savefig(buffer, format="png", dpi=160)
    write_whole(path, buffer.getvalue())


def draw(run: dict[str, Any]) -> Figure:
    """Return time over floor for each workload and peer, without clipping on the left, with it on the right.

    The floor is the bytes that must move over the bandwidth of a copy in the same run.
    """
    rows = [row for row in run["clips"] if row["mode"] in MODES and row["nbytes"] >= MIN_NBYTES]
    titles = list(dict.fromkeys(row["title"] for row in rows))
    figure = Figure(figsize=(11, 1.9 + 0.42 * len(titles)), layout="constrained")
    panels = figure.subplots(1, len(MODES), sharey=True)
    backend = quoted_backend(run)
    for axes, (mode, subtitle) in zip(panels, MODES.items(), strict=True):
        for row in (row for row in rows if row["mode"] == mode):
            _points(axes, row, backend, titles.index(row["title"]), run["copy_gbps"])
        _style(axes, subtitle)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].set_ylim(max(len(titles), 1) - 0.5, -0.5)
    env = run["environment"]
    figure.suptitle(
        f"Clipping by norm: time over what a copy's bandwidth allows\n{env['gpu']}, torch {env['torch']}, "
        f"fastclip {backend} {env['commit']}; medians on the device, cold caches, logarithmic axis",
        x=0.01,
        ha="left",
        fontsize=10,
        color=INK,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=len(by_label), frameon=False)
    return figure


def _points(axes: Axes, row: dict[str, Any], backend: str, position: int, copy_gbps: float) -> None:
    floor_ms = row["necessary_nbytes"] / copy_gbps / 1e6
    times = {peer: quantiles["50"] / floor_ms for peer, quantiles in row["device_ms"].items()}
    shown = {"fastclip": times[backend], **{peer: times[peer] for peer in STYLES if peer in times}}
    ends = [min(shown.values()), max(shown.values())]
    axes.plot(ends, [position] * 2, color="#dddddd", linewidth=2, zorder=1)
    for peer, ratio in shown.items():
        colour, marker, label = STYLES[peer]
        axes.scatter(ratio, position, s=42, color=colour, marker=marker, label=label, zorder=3)
    axes.annotate(
        f"{shown['fastclip']:.2f}",
        (shown["fastclip"], position),
        xytext=(5, 5),
        textcoords="offset points",
        fontsize=7.5,
        color=STYLES["fastclip"][0],
    )


def _style(axes: Axes, subtitle: str) -> None:
    bare_axes(axes, TICKS)
    axes.set_title(subtitle, loc="left", fontsize=9.5, color=FAINT)
