"""What is kept of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastclip.demo.runs import Run
from fastclip.demo.tasks import Marks
from fastclip.optim import Stats

NO_STEPS = Stats(steps=0, clipped=0, skipped=0, consecutive_skips=0, largest_norm=0.0)


@dataclass
class History:
    """What happened in a run, step by step.

    Attributes:
        run: Which run.
        nan_step: The step whose inputs were nan, if there was one.
        losses: Mean cross-entropy of each batch, in nats, before the update.
        norms: Norm of each step's gradient before clipping.
        skipped: The steps that the optimizer left out.
        step_seconds: Wall time that each step spent on clip and update.
        stats: What the optimizer counted.
        train: How well the network does, after the last step, on what it was trained on.
        test: How well it does on what was held out.
        outcome: Whether it learned, ends at guessing, or since which step it was lost.
        seconds: Wall time of the training, without judging.
    """

    run: Run
    nan_step: int | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    stats: Stats = NO_STEPS
    train: Marks = field(default_factory=Marks)
    test: Marks = field(default_factory=Marks)
    outcome: str = ""
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """The task's measure on what was held out."""
        return self.test.value
