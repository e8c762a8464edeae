"""A run as one HTML file or as PNG pictures; needs `fastclip[report]`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np

import fastclip
from fastclip.files import atomic
from fastclip.monitor import pictures
from fastclip.monitor.reading import Run
from fastclip.monitor.records import describe
from fastclip.monitor.suggestion import Suggestion, suggest
from fastclip.pages.pictures import Picture, embed, save_pictures
from fastclip.pages.template import short, template

PICTURES = (
    Picture(
        "norms",
        "Norm and threshold",
        "The norm of all gradients at every step, before clipping: the line is the largest of the steps that "
        "share a column, the band reaches to the smallest. Crosses on the upper edge are skipped steps.",
        pictures.norms,
    ),
    Picture(
        "layers",
        "Norms by layer",
        "The median norm of a block of steps. A row that brightens before the others is where an explosion "
        "begins.",
        pictures.layers,
    ),
    Picture(
        "histogram",
        "Histogram of norms",
        "What lies right of a threshold would have been clipped by it, had the norms been the same.",
        pictures.histogram,
    ),
    Picture("loss", "Loss", "As it was given to the monitor.", pictures.loss),
)


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report as one HTML file that needs no network.

    Args:
        run: What `read` returned, finished or not.
        path: The file; an existing one is replaced once the new one is whole.

    Returns:
        The path.
    """
    drawn = {picture.name: embed(picture, run) for picture in PICTURES}
    page = template("fastclip.monitor", "monitor.html.jinja").render(
        version=fastclip.__version__,
        run=run,
        headline=_headline(run),
        tiles=_tiles(run),
        wide=[drawn["norms"], drawn["layers"]],
        pictures=[drawn["histogram"], drawn["loss"]],
        suggestion=_suggestion(run),
        events=[(event["step"], event["kind"], describe(event)) for event in reversed(run.events)],
        settings={name: value for name, value in run.settings.items() if name not in ("kind", "parameters")},
    )
    target = Path(path)
    with atomic(target) as file:
        file.write(page.encode())
    return target


def write_plots(run: Run, folder: str | Path) -> list[Path]:
    """Write every picture that has data as a PNG into a folder; return the files."""
    return save_pictures(PICTURES, run, Path(folder))


def _headline(run: Run) -> str:
    if not len(run):
        return "No step has been written"
    clipped, skipped = int(run.clipped.sum()), int(run.skipped.sum())
    return f"{len(run)} steps: {clipped / len(run):.0%} clipped, {skipped} skipped"


def _tiles(run: Run) -> list[tuple[str, str]]:
    """Return the figures at the top of the page with their names."""
    if not len(run):
        return []
    norms = run.finite_norms
    losses = run["loss"][np.isfinite(run["loss"])]
    tiles = [("steps", str(len(run)))]
    if len(losses):
        tiles.append(("last loss", short(float(losses[-1]))))
    if len(norms):
        tiles += [
            ("median norm", short(float(np.median(norms)))),
            ("largest norm", short(float(norms.max()))),
        ]
    return [
        *tiles,
        ("last threshold", short(float(run["threshold"][-1]))),
        ("clipped", f"{run.clipped.mean():.0%}"),
        ("skipped", str(int(run.skipped.sum()))),
        ("events", str(len(run.events))),
        ("time", str(timedelta(seconds=round(run["time"][-1] - run["time"][0])))),
    ]


def _suggestion(run: Run) -> Suggestion | str:
    try:
        return suggest(run)
    except ValueError as reason:
        return str(reason)
