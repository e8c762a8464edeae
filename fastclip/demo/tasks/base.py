"""What a rescue needs to know of a task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = Literal["train", "test"]
"""What a network was trained on, or what was held out."""


@dataclass(frozen=True)
class Recipe:
    """What every run of one comparison has in common.

    Attributes:
        learning_rate: Rate of SGD, far above what the network stands unclipped.
        momentum: Momentum of SGD.
        max_norm: Threshold of the clipped runs.
        batch_size: Examples in a step; the last batch of an epoch may be smaller.
        epochs: Passes over the training examples.
        seed: Seed of the initial weights and of the order of the examples.
    """

    learning_rate: float
    momentum: float
    max_norm: float
    batch_size: int
    epochs: int
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """How a network is judged.

    Attributes:
        name: What it is on what was held out, "test accuracy" for example.
        train_name: What it is on what was trained on.
        template: Format of a value, with its unit.
        is_loss: Whether less is better.
    """

    name: str
    train_name: str
    template: str
    is_loss: bool = False

    def show(self, value: float) -> str:
        """Return a value with its unit."""
        return self.template.format(value)

    def is_at_least(self, value: float, bound: float) -> bool:
        """Tell whether a value is as good as the bound or better; nan never is."""
        return value <= bound if self.is_loss else value >= bound


@dataclass(frozen=True)
class Marks:
    """How well a network does on a part of the data.

    Attributes:
        loss: Mean cross-entropy, in nats.
        value: The measure.
        recall: Mean over the classes of the share that is sorted right; nan where there are none.
    """

    loss: float = math.nan
    value: float = math.nan
    recall: float = math.nan


@dataclass(frozen=True)
class Expectation:
    """How the runs of a task end when clipping rescues it.

    Attributes:
        unclipped: A network that is not rescued must score worse than this.
        clipped: One that is must score at least as well as this.
    """

    unclipped: float
    clipped: float


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A model with what it is trained and tested on.

    Attributes:
        name: Stem of the files that are written.
        title: The model in words, for the head of a table.
        recipe: How it is trained.
        measure: How it is judged.
        guessing_loss: Loss of guessing, in nats.
        expectation: How it ends, or None where that is unknown, as with a user's own images.
        with_nan_batch: Whether to train it with a batch of NaN, too; its inputs must be floating point.
    """

    name: str
    title: str
    recipe: Recipe
    measure: Measure
    guessing_loss: float
    expectation: Expectation | None = None
    with_nan_batch: bool = False

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return a new model, initialised from torch's random state."""

    @abstractmethod
    def losses(self, model: nn.Module, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the loss of each batch of one epoch, worked out when it is asked for."""

    @abstractmethod
    def judge(self, model: nn.Module, part: Part) -> Marks:
        """Return how well a model does on a part of the data."""

    @abstractmethod
    def is_guess(self, test: Marks) -> bool:
        """Tell whether these marks on what was held out are no better than those of guessing."""

    @abstractmethod
    def is_clearly_better(self, test: Marks, other: Marks) -> bool:
        """Tell whether these marks on what was held out are better than others by more than chance."""

    @property
    @abstractmethod
    def guess(self) -> str:
        """What guessing reaches, with its unit and how it is found."""
