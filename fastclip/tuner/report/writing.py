"""Put the pictures, the advice and the tables into files, each written whole or not at all."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import fastclip
from fastclip.files import atomic
from fastclip.pages.pictures import Picture, embed, save_pictures
from fastclip.pages.template import short, template
from fastclip.tuner.report import fold_plots, search_plots
from fastclip.tuner.report.classes import class_rows, train_score
from fastclip.tuner.report.explosion_map import explosion_map
from fastclip.tuner.report.next_steps import next_steps
from fastclip.tuner.report.study_view import StudyView, clip_fraction
from fastclip.tuner.study.records import TrialRecord
from fastclip.tuner.training.explosion import Verdict

TEMPLATES = "fastclip.tuner.report"
TEMPLATE = "report.html.jinja"

PICTURES = (
    Picture(
        "search_history",
        "Search history",
        "The score of every trial in the order in which they ran. Trials without one stand at the bad edge, "
        "and triangles point at scores beyond the axis.",
        search_plots.search_history,
    ),
    Picture(
        "explosion_map",
        "Explosion map",
        "Every trial at its learning rate and threshold: dots trained, coloured by their score; crosses "
        "exploded. The border between them is what a good space keeps to its safe side.",
        explosion_map,
    ),
    Picture(
        "fold_scores",
        "Fold scores",
        "How far the folds of the best trials agree. Trials whose folds overlap are not told apart by this "
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
    page = template(TEMPLATES, TEMPLATE).render(
        version=fastclip.__version__,
        view=view,
        headline=_headline(view),
        tiles=_tiles(view),
        best_params=_rounded(view.best.params) if view.best else {},
        train_score=train_score(view),
        classes=class_rows(view),
        steps=next_steps(view),
        pictures=[embed(picture, view) for picture in PICTURES],
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
    return save_pictures(PICTURES, view, Path(folder))


def _headline(view: StudyView) -> str:
    if view.best is not None:
        return f"{view.settings['primary']} {short(view.best.score)} in trial {view.best.number}"
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
        tiles.insert(0, (f"best {view.settings['primary']}", short(best.score)))
        tiles.insert(1, ("its folds", f"{short(min(scores))} … {short(max(scores))}"))
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
    return {name: short(value) for name, value in params.items()}
