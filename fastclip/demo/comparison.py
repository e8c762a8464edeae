"""Every strategy, as it comes, on small tasks: with a NaN batch, with outliers, at a rate that explodes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastclip import ClippedOptimizer, strategies
from fastclip.bench.environment import Environment, environment
from fastclip.bench.runner import torch_threads
from fastclip.bench.strategies import CostRow, run_costs
from fastclip.demo.clip_then_step import ClipThenStep
from fastclip.demo.runs import Clipping, Run
from fastclip.demo.tasks import Choices, Task, make_task
from fastclip.demo.training import train
from fastclip.files import atomic
from fastclip.monitor import read

NAN_STEP = 100
SPIKES, SPIKE = 0.05, 1e4
"""Share of the batches whose loss is multiplied, and by what."""

STABLE_EPOCHS = 20
"""Long enough for what shortens every step, too."""


def _clipped(max_norm: Any) -> Callable[[Optimizer], Clipping]:
    return lambda optimizer: ClippedOptimizer(optimizer, max_norm() if callable(max_norm) else max_norm)


CONTENDERS: dict[str, Callable[[Optimizer], Clipping]] = {
    "unclipped": lambda optimizer: ClippedOptimizer(optimizer, math.inf, nonfinite="propagate"),
    "torch's clip, 0.25": lambda optimizer: ClipThenStep(optimizer, 0.25),
    "Fixed(0.25)": _clipped(0.25),
    "Fixed(1)": _clipped(1.0),
    "Percentile(10)": _clipped(strategies.Percentile),
    "Percentile(10, window=100)": _clipped(partial(strategies.Percentile, 10, window=100)),
    "ZScore()": _clipped(strategies.ZScore),
    "MedianMAD()": _clipped(strategies.MedianMAD),
    "QuantileServo()": _clipped(strategies.QuantileServo),
    "Ema()": _clipped(strategies.Ema),
    "Ema(per_tensor=True)": _clipped(partial(strategies.Ema, per_tensor=True)),
    "AGC()": _clipped(strategies.AGC),
    "PerTensor()": _clipped(strategies.PerTensor),
    "Value()": _clipped(strategies.Value),
    "Value(0.01)": _clipped(partial(strategies.Value, 0.01)),
    "BlockRMS()": _clipped(strategies.BlockRMS),
    "BlockRMS(0.01)": _clipped(partial(strategies.BlockRMS, 0.01)),
    "NormStabilised()": _clipped(strategies.NormStabilised),
    "NormStabilised(limit=3)": _clipped(partial(strategies.NormStabilised, limit=3)),
    "Skip(MedianMAD())": _clipped(lambda: strategies.Skip(strategies.MedianMAD())),
}
"""Name -> makes an optimizer clip: nothing, torch, fixed thresholds, each strategy, some with settings."""


@dataclass(frozen=True)
class Trial:
    """A task under a condition.

    Attributes:
        task: "CNN", "MLP" or "characters".
        condition: What goes wrong.
        rate: Of SGD.
        epochs: Of the training; None is the task's own number.
    """

    task: str
    condition: str
    rate: float
    epochs: int | None = None


TRIALS = (
    Trial("CNN", "NaN batch", 0.05, STABLE_EPOCHS),
    Trial("MLP", "NaN batch", 0.02, STABLE_EPOCHS),
    Trial("CNN", "outliers", 0.05, STABLE_EPOCHS),
    Trial("MLP", "outliers", 0.02, STABLE_EPOCHS),
    Trial("CNN", "NaN batch", 0.3),
    Trial("characters", "as it is", 5.0),
)
"""The first four at rates at which unclipped training works; at the last two it explodes."""


@dataclass(frozen=True)
class Score:
    """How a contender ended in a trial.

    Attributes:
        contender: One of CONTENDERS.
        task: Of the trial, as are the next two.
        condition: What went wrong.
        rate: Of SGD.
        measure: What the scores are.
        scores: Test accuracy, or bits per character of held-out text, of each seed; None where it is nan.
        clipped: Share of the steps that were clipped, over all seeds.
        skipped: Steps that were left out, over all seeds.
    """

    contender: str
    task: str
    condition: str
    rate: float
    measure: str
    scores: list[float | None]
    clipped: float
    skipped: int


@dataclass(frozen=True)
class ComparisonResults:
    """A whole run.

    Attributes:
        environment: Where the scores were found.
        threads: Of the costs; trainings take one.
        seeds: Of every trial.
        scores: Every contender in every trial.
        costs: Every contender's step on GPT-2.
        costs_environment: Where that was timed.
    """

    environment: Environment
    threads: int
    seeds: list[int]
    scores: list[Score]
    costs: list[CostRow]
    costs_environment: Environment

    def content(self) -> dict[str, Any]:
        """Return what a results file holds."""
        return asdict(self)


class Spiked:
    """A task some of whose losses are multiplied."""

    def __init__(self, task: Task, seed: int) -> None:
        """Take the task; the seed says which of its batches."""
        self._task = task
        self._draw = torch.Generator().manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        """Look for everything else at the task."""
        return getattr(self._task, name)

    def losses(self, model: nn.Module, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the task's losses, a share of them far too large."""
        for loss in self._task.losses(model, shuffle):
            yield loss * SPIKE if float(torch.rand((), generator=self._draw)) < SPIKES else loss


def compare(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    trials: Sequence[Trial] = TRIALS,
    contenders: Sequence[str] = tuple(CONTENDERS),
    epochs: int | None = None,
    threads: int | None = None,
    time_budget_s: float = 60.0,
    told: Callable[[str], object] = lambda line: None,
) -> ComparisonResults:
    """Train with every contender in every trial, and time the steps of each on GPT-2.

    Args:
        seeds: Of data, weights and batches.
        trials: What to train.
        contenders: Names in CONTENDERS.
        epochs: Of each training; None leaves that of the trial.
        threads: Of the timing; None is torch's number.
        time_budget_s: For the timing.
        told: Takes a line for each score.
    """
    scores = []
    with torch_threads(1):  # as fast as several for networks this small, and the same on every machine
        for trial in trials:
            for name in contenders:
                scores.append(_score(trial, name, seeds, epochs))
                values = ", ".join("nan" if s is None else f"{s:.3f}" for s in scores[-1].scores)
                told(f"{trial.task}, {trial.condition}, {name}: {values}")
    threads = threads or torch.get_num_threads()
    costs = run_costs(threads=threads, time_budget_s=time_budget_s)
    return ComparisonResults(environment(), threads, list(seeds), scores, costs, environment())


def time_again(content: dict[str, Any], *, threads: int | None, time_budget_s: float) -> list[CostRow]:
    """Time the steps again, and put them into what a results file holds; its scores stay.

    Args:
        content: As `ComparisonResults.content` returns it; changed in place.
        threads: As in `compare`.
        time_budget_s: As in `compare`.
    """
    threads = threads or torch.get_num_threads()
    costs = run_costs(threads=threads, time_budget_s=time_budget_s)
    content["threads"], content["costs"] = threads, [asdict(row) for row in costs]
    content["costs_environment"] = asdict(environment())
    return costs


def picture(path: Path, *, strategy: str = "MedianMAD()", seed: int = 0) -> None:
    """Draw norm and threshold of the CNN with outliers and a NaN batch, as the monitor saw them.

    Args:
        path: PNG file; an existing one is replaced once the new one is whole.
        strategy: Name in CONTENDERS.
        seed: Of data, weights and batches.
    """
    import matplotlib as mpl

    from fastclip.monitor import pictures
    from fastclip.pages import style

    task: Any = Spiked(_task(TRIALS[0], seed, None), seed)
    run = Run(strategy, lambda optimizer, _: CONTENDERS[strategy](optimizer), math.inf, learns=True)
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        train(task, run, nan_step=NAN_STEP, watched=Path(folder))
        seen = read(folder)
    with mpl.rc_context(style.STYLE):
        drawn = style.to_png(pictures.norms(seen))
    with atomic(path) as file:
        file.write(drawn)


def _score(trial: Trial, name: str, seeds: Sequence[int], epochs: int | None) -> Score:
    found: list[float | None] = []
    clipped, skipped = 0.0, 0
    measure = ""
    for seed in seeds:
        task = _task(trial, seed, epochs)
        measure = task.measure.name
        make = CONTENDERS[name]
        run = Run(name, lambda optimizer, _, make=make: make(optimizer), math.inf, learns=True)  # type: ignore[misc]
        with_nan = "NaN" in trial.condition
        spiked: Any = Spiked(task, seed) if trial.condition == "outliers" else task
        history = train(spiked, run, nan_step=NAN_STEP if with_nan else None)
        found.append(history.score if math.isfinite(history.score) else None)
        clipped += history.stats.clip_fraction / len(seeds)
        skipped += history.stats.skipped
    return Score(name, trial.task, trial.condition, trial.rate, measure, found, clipped, skipped)


def _task(trial: Trial, seed: int, epochs: int | None) -> Task:
    epochs = epochs or trial.epochs
    if trial.task == "characters":
        task = make_task("charlm", seed=seed, epochs=epochs)
    else:
        choices = Choices(model="deep-mlp" if trial.task == "MLP" else None)
        task = make_task("digits", seed=seed, epochs=epochs, choices=choices)
    return replace(task, recipe=replace(task.recipe, learning_rate=trial.rate))
