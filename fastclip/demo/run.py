"""The demo from start to end: backends, speed, a network that only clipping saves, and a search."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastclip import bench
from fastclip.bench import report, table
from fastclip.bench.progress import ConsoleProgress
from fastclip.demo.rescue import rescue
from fastclip.demo.runs import runs_for
from fastclip.demo.search import search_digits
from fastclip.demo.tasks import make_task

DIGITS = "digits"


def run(
    output: Path,
    *,
    task: str = DIGITS,
    data: Path | None = None,
    epochs: int | None = None,
    seed: int = 0,
    search: bool = True,
) -> int:
    """Show what is installed, how fast it is beside torch, and a network that only clipping rescues.

    On a terminal a bar shows the progress; a log gets plain lines.

    Args:
        output: Folder for the figure and the search; made if it is missing.
        task: One of `fastclip.demo.tasks.TASKS`.
        data: Folder of the data, for a task that reads one.
        epochs: Passes over the training data in each run of the comparison; None leaves the task's own
            number. With too few, clipping has no time to succeed.
        seed: Seed of the splits, the initial weights and the order of the examples.
        search: Whether the digits end with a search for rate, threshold and initialisation.

    Returns:
        0 if every run, and the search, ended as the task expects, otherwise 1.

    Raises:
        CheckError: fastclip gave a wrong norm; nothing was timed or trained.
        DataError: the data is missing, truncated or of another kind; nothing was written.
    """
    chosen = make_task(task, data, seed=seed, epochs=epochs)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(report.render(report.installation()))
    options = bench.Options(
        models=("resnet50", "tiny"), dtypes=("float32",), modes=("inactive", "active"), time_budget_s=0.5
    )
    speed = bench.run(options, peers=bench.PEERS[:2], progress=ConsoleProgress(console))
    table.console().print(table.render(speed))
    is_well = rescue(console, output, chosen, runs_for(chosen))
    if search and task == DIGITS:
        is_well &= search_digits(console, output, seed=seed)
    return 0 if is_well else 1
