"""The pictures of a run."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastclip.monitor.bins import Bins, bins
from fastclip.monitor.reading import Run
from fastclip.monitor.suggestion import suggest
from fastclip.pages import style
from fastclip.pages.style import NothingToDrawError, is_wide, legend_above, new_figure

NUM_BINS = 600
MAX_LAYERS = 40
HISTOGRAM_BINS = 60
WIDE = 11.0


def norms(run: Run) -> Figure:
    """Draw norm and threshold over the steps, with clipped and skipped steps, and the clipped share below."""
    found = _bins(run)
    figure = new_figure(WIDE, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.fill_between(
        found.steps, found.low, found.high, color=style.MAIN_COLOUR, alpha=0.25, lw=0, step="mid"
    )
    above.plot(found.steps, found.high, color=style.MAIN_COLOUR, lw=1, label="norm before clipping")
    if np.isfinite(found.threshold).any():
        above.plot(found.steps, found.threshold, color=style.INK, lw=1.5, ls="--", label="threshold")
    is_clipped = found.clipped > 0
    if is_clipped.any():
        above.scatter(
            found.steps[is_clipped], found.high[is_clipped],
            s=9, lw=0, color=style.BAD_COLOUR, label="clipped", zorder=3,
        )  # fmt: skip
    _mark_skips(above, found)
    if is_wide(run.finite_norms):
        above.set_yscale("log")
    above.set_ylabel("norm")
    legend_above(above)
    below.plot(run["step"], run["clipped_share"], color=style.BAD_COLOUR, lw=1.3)
    below.set(ylim=(0, 1), xlabel="step", ylabel="clipped share")
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def loss(run: Run) -> Figure:
    """Draw the loss over the steps."""
    known = np.isfinite(run["loss"])
    if not known.any():
        raise NothingToDrawError("No loss was given to Monitor.step.")
    figure = new_figure()
    axes = figure.subplots()
    axes.plot(run["step"][known], run["loss"][known], color=style.MAIN_COLOUR, lw=1)
    if is_wide(run["loss"][known]):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    return figure


def layers(run: Run) -> Figure:
    """Draw a map of the norms: a row per layer, a column per block of steps."""
    if not run.parameter_norms.size or not (run.parameter_norms > 0).any():
        raise NothingToDrawError("Norms of single parameters were not measured: Monitor(per_parameter=True).")
    names, table = _by_layer(run)
    figure = new_figure(WIDE, 1.6 + 0.22 * len(names))
    axes = figure.subplots()
    edges = np.append(run.norm_steps, run["step"][-1] + 1)
    shown = np.ma.masked_invalid(np.where(table > 0, table, np.nan)).T
    mesh = axes.pcolormesh(
        edges, np.arange(len(names) + 1), shown, cmap=style.SCORE_MAP, norm=LogNorm(), rasterized=True
    )
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xlabel("step")
    figure.colorbar(mesh, label="norm", pad=0.01)
    return figure


def histogram(run: Run) -> Figure:
    """Draw how often which norm occurred, with the thresholds that are suggested."""
    positive = run.finite_norms[run.finite_norms > 0]
    if not len(positive):
        raise NothingToDrawError("No norm is finite and above 0.")
    figure = new_figure()
    axes = figure.subplots()
    low, high = np.log10(positive.min()) - 0.02, np.log10(positive.max()) + 0.02
    edges = np.logspace(low, high, HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(positive, edges)
    axes.stairs(counts / len(positive), edges, fill=True, color=style.MAIN_COLOUR, alpha=0.75)
    try:
        found = suggest(run)
    except ValueError as reason:
        axes.set_title(str(reason).partition(";")[0], fontsize=8)
    else:
        colours = style.INK, style.SECOND_COLOUR, style.BEST_COLOUR, style.BAD_COLOUR
        fixed = [proposal for proposal in found.proposals if "strategies" not in proposal.code]
        for proposal, colour in zip(fixed, colours, strict=True):
            is_best = proposal is found.best
            label = f"{proposal.threshold:.3g} clips {proposal.share:.1%}" + (
                " (suggested)" if is_best else ""
            )
            axes.axvline(proposal.threshold, color=colour, lw=2.4 if is_best else 1.3, ls="--", label=label)
        legend_above(axes, columns=2)
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="norm before clipping", ylabel="share of the steps")
    return figure


def _bins(run: Run) -> Bins:
    if not len(run):
        raise NothingToDrawError("No step has been written yet.")
    return bins(run, NUM_BINS)


def _mark_skips(axes: Axes, found: Bins) -> None:
    """Mark skipped steps on the upper edge: their norm has no place on the axis."""
    steps = found.steps[found.skipped > 0]
    if len(steps):
        axes.scatter(
            steps, np.ones(len(steps)),
            s=42, marker="X", lw=0, color="#CC79A7", label="skipped",
            transform=axes.get_xaxis_transform(), clip_on=False, zorder=4,
        )  # fmt: skip


def _by_layer(run: Run) -> tuple[list[str], np.ndarray]:
    """Return layers and their norms: modules, put together from the deepest name up until they fit."""
    paths = [name.split(".")[:-1] or [name] for name in run.parameters]
    depth = max(len(path) for path in paths)
    while depth > 1 and len({tuple(path[:depth]) for path in paths}) > MAX_LAYERS:
        depth -= 1
    rows: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        rows.setdefault(".".join(path[:depth]), []).append(index)
    squares = np.nan_to_num(run.parameter_norms) ** 2
    return list(rows), np.sqrt(
        np.stack([squares[:, columns].sum(axis=1) for columns in rows.values()], axis=1)
    )
