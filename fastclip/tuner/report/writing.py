"""Put the pictures, the advice and the tables into files, each written whole or not at all."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

import fastclip
from fastclip.tuner.files import atomic
from fastclip.tuner.report import fold_plots, search_plots, style
from fastclip.tuner.report.next_steps import next_steps
from fastclip.tuner.report.study_view import StudyView, clip_fraction
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.explosion import Verdict

TEMPLATE = "report.html.jinja"
DIGITS = 4


@dataclass(frozen=True)
class Picture:
    """One picture of the report: its file name, its words, and the function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[StudyView], Figure]


PICTURES = (
    Picture(
        "search_history",
        "Search history",
        "The score of every trial in the order in which they ran. Trials without one stand at the bad edge.",
        search_plots.search_history,
    ),
    Picture(
        "explosion_map",
        "Explosion map",
        "Every trial at its learning rate and threshold: dots trained, coloured by their score; crosses "
        "exploded. The border between them is what a good space keeps to its safe side.",
        search_plots.explosion_map,
    ),
    Picture(
        "fold_scores",
        "Fold scores",
        "How far the folds of the best trials agree. Trials whose boxes overlap are not told apart by this "
        "search.",
        fold_plots.fold_scores,
    ),
    Picture(
        "learning_curves",
        "Learning curves",
        "The mean over the folds in the band from the worst fold to the best; thin lines are single folds.",
        fold_plots.learning_curves,
    ),
    Picture(
        "gradient_norms",
        "Gradient norms",
        "The norm of all gradients at every optimizer step, before clipping. What lies right of the "
        "threshold is scaled down to it.",
        fold_plots.gradient_norms,
    ),
    Picture(
        "importances",
        "Parameter importances",
        "How much each parameter decides, among those that every trial has. With few trials this is a hint, "
        "not a measurement.",
        search_plots.importances,
    ),
)


def write_report(view: StudyView, path: str | Path) -> Path:
    """Write the report as one HTML file that needs no network.

    Args:
        view: The study as it stands: finished, interrupted, or exploded in every trial.
        path: The file; an existing one is replaced once the new one is whole.

    Returns:
        The path.
    """
    page = _template().render(
        version=fastclip.__version__,
        view=view,
        headline=_headline(view),
        tiles=_tiles(view),
        best_params=_rounded(view.best.params) if view.best else {},
        steps=next_steps(view),
        pictures=[_embed(picture, view) for picture in PICTURES],
        metric=view.settings["primary"],
        names=_varied(view.records),
        rows=[_row(record) for record in view.records],
        settings={name: value for name, value in view.settings.items() if name != "space"} | view.run,
        space=view.settings["space"],
    )
    target = Path(path)
    with atomic(target) as file:
        file.write(page.encode())
    return target


def write_plots(view: StudyView, folder: str | Path) -> list[Path]:
    """Write every picture that has data as a PNG into a folder; return the files."""
    files = []
    for picture in PICTURES:
        drawn = _draw(picture, view, style.to_png)
        if isinstance(drawn, bytes):
            files.append(Path(folder) / f"{picture.name}.png")
            with atomic(files[-1]) as file:
                file.write(drawn)
    return files


def _draw(picture: Picture, view: StudyView, render: Callable[[Figure], bytes]) -> bytes | str:
    """Return the rendered picture, or why there is none."""
    with matplotlib.rc_context(style.STYLE):
        try:
            return render(picture.draw(view))
        except style.NothingToDrawError as reason:
            return str(reason)


def _embed(picture: Picture, view: StudyView) -> dict[str, str]:
    drawn = _draw(picture, view, style.to_svg)
    words = {"name": picture.name, "title": picture.title, "caption": picture.caption}
    if isinstance(drawn, str):
        return {**words, "absent": drawn}
    return {**words, "source": f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}"}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastclip.tuner.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    return environment.get_template(TEMPLATE)


def _headline(view: StudyView) -> str:
    if view.best is not None:
        return f"{view.settings['primary']} {_short(view.best.score)} in trial {view.best.number}"
    if not view.records:
        return "No trial has finished"
    if view.counts[Verdict.EXPLODED] == len(view.records):
        return f"All {len(view.records)} trials exploded"
    return f"None of {len(view.records)} trials has a score"


def _tiles(view: StudyView) -> list[tuple[str, str]]:
    """Return the figures at the top of the page with their names."""
    best = view.best
    planned = view.run.get("n_trials")
    finished = str(len(view.records)) + (f" of {planned}" if planned else "")
    tiles = [("trials finished", finished)]
    if best is not None and best.score is not None:
        scores = [fold.score for fold in best.folds if fold.score is not None]
        tiles.insert(0, (f"best {view.settings['primary']}", _short(best.score)))
        tiles.insert(1, ("its folds", f"{_short(min(scores))} … {_short(max(scores))}"))
    tiles += [(str(status), str(count)) for status, count in view.counts.items() if status is not Verdict.OK]
    if view.num_under_way:
        tiles.append(("under way", str(view.num_under_way)))
    if best is not None:
        tiles.append(("steps clipped", f"{clip_fraction(best):.0%}"))
    elif view.shown is not None:
        tiles.append(("steps survived at most", str(view.shown.steps_survived)))
    tiles.append(("training time", str(timedelta(seconds=round(view.fit_seconds)))))
    return tiles


def _varied(records: list[TrialRecord]) -> list[str]:
    """Return the parameters that differ between trials; of a single trial all of them."""
    names = dict.fromkeys(name for record in records for name in record.params)
    return [
        name
        for name in names
        if len(records) == 1 or len({str(record.params.get(name)) for record in records}) > 1
    ]


def _row(record: TrialRecord) -> dict[str, Any]:
    messages = [fold.message.strip().splitlines()[-1] for fold in record.folds if fold.message.strip()]
    return {
        "number": record.number,
        "status": str(record.status),
        "score": record.score if record.has_score else None,
        "folds": [fold.score for fold in record.folds],
        "params": record.params,
        "clipped": clip_fraction(record),
        "steps": record.steps_survived,
        "seconds": sum(fold.fit_seconds + fold.score_seconds for fold in record.folds),
        "message": messages[0] if messages else "",
    }


def _rounded(params: dict[str, Any]) -> dict[str, str]:
    return {name: _short(value) for name, value in params.items()}


def _short(value: Any) -> str:
    """Return a value as a reader wants it: numbers with four digits, nothing as a dash."""
    if value is None:
        return "–"
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
