"""A plain training loop that records what clipping sees and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fastclip.demo.tasks.base import Task

Clip: TypeAlias = Callable[[Iterable[Tensor], float], Tensor]
"""A function with the contract of `torch.nn.utils.clip_grad_norm_`."""


@dataclass
class History:
    """What happened in a run, step by step.

    Attributes:
        max_norm: The threshold; inf when the norm was only measured.
        losses: Mean cross-entropy of each batch, in nats, before the update.
        norms: Norm of each step's gradient before clipping.
        clip_seconds: Wall time that each step spent in the clipping call.
        score: The task's measure on what was held out, after the last step.
    """

    max_norm: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clip_seconds: list[float] = field(default_factory=list)
    score: float = math.nan

    @property
    def clipped_share(self) -> float:
        """Share of the steps whose norm was above the threshold."""
        return sum(norm > self.max_norm for norm in self.norms) / len(self.norms)

    @property
    def largest_norm(self) -> float:
        """Largest norm of any step; inf counts, nan does not."""
        return max((norm for norm in self.norms if not math.isnan(norm)), default=math.nan)

    @property
    def first_nonfinite_step(self) -> int | None:
        """First step whose loss or norm was inf or nan."""
        for step, (loss, norm) in enumerate(zip(self.losses, self.norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return step
        return None


def train(
    task: Task, *, clip: Clip, max_norm: float, on_epoch: Callable[[], object] = lambda: None
) -> History:
    """Train a new model by SGD and test it; a run that explodes goes on to its last epoch.

    Args:
        task: The model, what to train it on, and the recipe.
        clip: Called once per step between backward and update.
        max_norm: Threshold handed to `clip`; inf to measure the norm and leave the gradient alone.
        on_epoch: Called after every epoch.

    Returns:
        The history of every step and the score at the end. The same arguments give the same losses and
        norms on the same machine with the same number of threads. Reads two scalars per step (a host
        synchronisation each, were the model on a GPU). The caller's random state is untouched.
    """
    recipe = task.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = task.make_model()
    shuffle = torch.Generator().manual_seed(recipe.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=recipe.momentum)
    history = History(max_norm)

    for _ in range(recipe.epochs):
        for loss in task.losses(model, shuffle):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            before = time.perf_counter()
            norm = clip(parameters, max_norm)
            history.clip_seconds.append(time.perf_counter() - before)
            optimizer.step()
            history.losses.append(loss.item())
            history.norms.append(norm.item())
        on_epoch()

    history.score = task.score(model)
    return history
