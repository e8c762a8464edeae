"""The demo from start to end: backends, speed, a network that only clipping saves, and a search."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastclip import bench
from fastclip.bench import report, table
from fastclip.bench.progress import ConsoleProgress
from fastclip.demo.data import DataError
from fastclip.demo.data.errors import told
from fastclip.demo.rescue import rescue
from fastclip.demo.runs import runs_for
from fastclip.demo.search import search as search_task
from fastclip.demo.tasks import Choices, ImageTask, SortingTask, Task, TextsTask, make_task
from fastclip.files import atomic

DIGITS = "digits"

SKIPPED = "skipped.txt"
"""File, in the folder of the figure, of what was left out of a folder of images."""


def run(
    output: Path,
    *,
    task: str = DIGITS,
    data: Path | None = None,
    epochs: int | None = None,
    seed: int = 0,
    search: bool | None = None,
    model: str | None = None,
    size: int | None = None,
    skip_unreadable: bool = False,
) -> int:
    """Show what is installed, how fast it is beside torch, and a network that only clipping rescues.

    On a terminal a bar shows the progress; a log gets plain lines.

    Args:
        output: Folder for the figure, the search and the list of what was skipped; made if it is missing.
        task: One of `fastclip.demo.tasks.TASKS`.
        data: Folder of the data, for a task that reads one.
        epochs: Passes over the training data in each run of the comparison; None leaves the task's own
            number. With too few, clipping has no time to succeed.
        seed: Seed of the splits, the initial weights and the order of the examples.
        search: Whether to end with a search for rate, threshold and initialisation; None searches for the
            digits alone, which takes half a minute.
        model: The network, one of `fastclip.demo.models.IMAGE_NETWORKS`, or of `TEXT_NETWORKS` for `text`;
            None is the task's own.
        size: Height and width to which the images of `imagefolder` are resized.
        skip_unreadable: Whether to leave out what is foreign or broken in `imagefolder` and `text`; it is
            listed in `skipped.txt`.

    Returns:
        0 if every run, and the search, ended as the task expects, otherwise 1. The user's own data expects
        nothing.

    Raises:
        CheckError: fastclip gave a wrong norm; nothing was timed or trained.
        DataError: the data is missing, truncated or of another kind, or a choice does not fit the task;
            nothing was written.
    """
    choices = Choices(model=model, size=size, skip_unreadable=skip_unreadable)
    chosen = make_task(task, data, seed=seed, epochs=epochs, choices=choices)
    searched = _searched(chosen, search)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    if isinstance(chosen, (ImageTask, TextsTask)) and chosen.data.skipped:
        _list_skipped(console, output / SKIPPED, chosen.data.skipped)
    console.print(report.render(report.installation()))
    options = bench.Options(
        models=("resnet50", "tiny"), dtypes=("float32",), modes=("inactive", "active"), time_budget_s=0.5
    )
    speed = bench.run(options, peers=bench.PEERS[:2], progress=ConsoleProgress(console))
    table.console().print(table.render(speed))
    is_well = rescue(console, output, chosen, runs_for(chosen))
    if searched is not None:
        is_well &= search_task(console, output, searched)
    return 0 if is_well else 1


def _searched(task: Task, search: bool | None) -> SortingTask | None:
    """Return the task if a search is to end it."""
    if search is None:
        search = task.name == DIGITS
    if not search:
        return None
    if not isinstance(task, SortingTask):
        raise DataError(
            f"run: a search is asked of {task.name}; expected a task that sorts. Leave --search away."
        )
    return task


def _list_skipped(console: Console, path: Path, skipped: tuple[str, ...]) -> None:
    with atomic(path) as file:
        file.write("".join(f"{sentence}\n" for sentence in skipped).encode())
    console.print(f"Left out {told(skipped)}. All of them: {path}", markup=False, soft_wrap=True)
