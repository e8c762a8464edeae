"""The demo from start to end: backends, speed, and a network that only clipping saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from fastclip import bench
from fastclip.bench import report, table
from fastclip.bench.progress import ConsoleProgress
from fastclip.demo.rescue import CLIPS, rescue_digits
from fastclip.demo.training import Clip, Recipe


def run(output: Path, *, epochs: int = 10, seed: int = 0, clips: Mapping[str, Clip] = CLIPS) -> int:
    """Show what is installed, how fast it is beside torch, and a network that only clipping rescues.

    On a terminal a bar shows the progress; a log gets plain lines.

    Args:
        output: Folder for `digits.png`; made if it is missing.
        epochs: Passes over the digits in each run. With too few, clipping has no time to succeed.
        seed: Seed of the split, the initial weights and the order of the examples.
        clips: The functions to clip with, by name; one or two.

    Returns:
        0 if the unclipped run ended at chance and every clipped run learned the digits, otherwise 1.

    Raises:
        CheckError: fastclip gave a wrong norm; nothing was timed or trained.
    """
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(report.render(report.installation()))
    options = bench.Options(
        models=("resnet50", "tiny"), dtypes=("float32",), modes=("inactive", "active"), time_budget_s=0.5
    )
    speed = bench.run(options, peers=bench.PEERS[:2], progress=ConsoleProgress(console))
    table.console().print(table.render(speed))
    rescued = rescue_digits(console, output, Recipe(epochs=epochs, seed=seed), clips)
    return 0 if rescued else 1
