"""A plain training loop that records what clipping sees and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.demo.data import ClassificationData

Clip: TypeAlias = Callable[[Iterable[Tensor], float], Tensor]
"""A function with the contract of `torch.nn.utils.clip_grad_norm_`."""


@dataclass(frozen=True)
class Recipe:
    """What every run of one comparison has in common; the defaults are those of the digits rescue.

    Attributes:
        learning_rate: Rate of SGD, far above what the network stands unclipped.
        momentum: Momentum of SGD.
        batch_size: Examples in a step; the last batch of an epoch may be smaller.
        epochs: Passes over the training examples.
        seed: Seed of the initial weights and of the order of the examples.
    """

    learning_rate: float = 0.3
    momentum: float = 0.9
    batch_size: int = 32
    epochs: int = 10
    seed: int = 0


@dataclass
class History:
    """What happened in a run, step by step.

    Attributes:
        max_norm: The threshold; inf when the norm was only measured.
        losses: Mean cross-entropy of each batch, in nats, before the update.
        norms: Norm of each step's gradient before clipping.
        clip_seconds: Wall time that each step spent in the clipping call.
        accuracy: Share of the test examples classified correctly after the last step.
    """

    max_norm: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clip_seconds: list[float] = field(default_factory=list)
    accuracy: float = math.nan

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
    model_init: Callable[[], nn.Module],
    data: ClassificationData,
    recipe: Recipe,
    *,
    clip: Clip,
    max_norm: float,
    on_epoch: Callable[[], object] = lambda: None,
) -> History:
    """Train a new model by SGD and test it; a run that explodes goes on to its last epoch.

    Args:
        model_init: Makes the model; called under the recipe's seed.
        data: What to train and to test on.
        recipe: Rate, batches, epochs, seed.
        clip: Called once per step between backward and update.
        max_norm: Threshold handed to `clip`; inf to measure the norm and leave the gradient alone.
        on_epoch: Called after every epoch.

    Returns:
        The history of every step and the accuracy on the test examples. The same arguments give the
        same losses and norms on the same machine. Reads two scalars per step (a host synchronisation
        each, were the model on a GPU). The caller's random state is untouched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = model_init()
    shuffle = torch.Generator().manual_seed(recipe.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=recipe.momentum)
    history = History(max_norm)

    for _ in range(recipe.epochs):
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        for start in range(0, len(order), recipe.batch_size):
            batch = order[start : start + recipe.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])
            torch.autograd.backward(loss)
            before = time.perf_counter()
            norm = clip(parameters, max_norm)
            history.clip_seconds.append(time.perf_counter() - before)
            optimizer.step()
            history.losses.append(loss.item())
            history.norms.append(norm.item())
        on_epoch()

    history.accuracy = _accuracy(model, data.test_inputs, data.test_labels)
    return history


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    num_correct = int((model(inputs).argmax(dim=1) == labels).sum())
    return num_correct / len(labels)
