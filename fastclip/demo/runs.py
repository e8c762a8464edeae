"""The trainings that the demo compares: who clips, and whether a batch is spoiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

from torch.optim import Optimizer

from fastclip import ClippedOptimizer
from fastclip.demo.clip_then_step import ClipThenStep
from fastclip.demo.tasks import Task
from fastclip.optim import Outcome, Stats


class Clipping(Protocol):
    """What a training needs of `ClippedOptimizer`, or of what takes its place."""

    @property
    def last(self) -> Outcome | None:
        """Return what happened in the latest step."""

    def step(self) -> Any:
        """Clip and update."""

    def zero_grad(self) -> None:
        """Reset the gradients."""

    def stats(self) -> Stats:
        """Return what happened in all steps."""


MakeClipping: TypeAlias = Callable[[Optimizer, float], Clipping]
"""Takes an optimizer and the threshold to clip at."""


@dataclass(frozen=True)
class Run:
    """One training of a comparison.

    Attributes:
        clipper: Who clips: "unclipped", "fastclip" or "torch".
        make: Makes the optimizer clip.
        max_norm: The threshold; inf measures only.
        learns: Whether the network is expected to learn, or to end at guessing.
        has_nan: Whether all inputs of one batch in the middle are nan.
    """

    clipper: str
    make: MakeClipping
    max_norm: float
    learns: bool
    has_nan: bool = False

    @property
    def name(self) -> str:
        """Who clips, at what threshold, and whether a batch is spoiled."""
        threshold = f" {self.max_norm:g}" if math.isfinite(self.max_norm) else ""
        return self.clipper + threshold + (" + NaN" if self.has_nan else "")

    @property
    def expected_skips(self) -> int:
        """How many steps are expected to be left out."""
        return int(self.has_nan and self.learns)


def runs_for(task: Task) -> list[Run]:
    """Return the runs of a task: unclipped, clipped by fastclip and by torch, and these two with a NaN batch.

    The unclipped run is a `ClippedOptimizer` that measures: with an infinite threshold and
    nonfinite="propagate" it does what the optimizer does.
    """
    max_norm = task.recipe.max_norm
    runs = [
        Run("unclipped", partial(ClippedOptimizer, nonfinite="propagate"), math.inf, learns=False),
        Run("fastclip", ClippedOptimizer, max_norm, learns=True),
        Run("torch", ClipThenStep, max_norm, learns=True),
    ]
    if task.with_nan_batch:
        runs += [
            Run("fastclip", ClippedOptimizer, max_norm, learns=True, has_nan=True),
            Run("torch", ClipThenStep, max_norm, learns=False, has_nan=True),
        ]
    return runs
