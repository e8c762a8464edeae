"""Tasks that sort samples of any kind into classes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.metrics import recall_score
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.demo.models import ImageModel, TextModel
from fastclip.demo.tasks.base import Marks, Measure, Part, Task
from fastclip.tuner.data import TuningData
from fastclip.tuner.training.guessing import collapse, guess_loss
from fastclip.tuner.training.losses import default_loss

ACCURACY = Measure("test accuracy", "train accuracy", "{:.1%}")

JUDGED_BATCH = 512

CLEARLY = 3.0
"""Standard errors between two accuracies that tell them apart although each is of a single training."""


@dataclass(frozen=True, kw_only=True)
class SortingTask(Task):
    """A network that sorts samples into classes.

    Attributes:
        model: Makes the network.
    """

    model: ImageModel | TextModel

    @abstractmethod
    def labels(self, part: Part) -> Tensor:
        """Return the class of each sample of a part, int64."""

    @abstractmethod
    def inputs(self, part: Part, rows: Tensor) -> Tensor:
        """Return these samples of a part as one batch."""

    @abstractmethod
    def tuning_data(self, part: Part) -> Any:
        """Return a part in a form that `TunerCV` takes."""

    def make_model(self) -> nn.Module:
        """Return a new network for the shape of the samples and their classes."""
        return self.model({})

    def losses(self, model: nn.Module, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the mean cross-entropy of each batch, in a new order of the samples."""
        labels = self.labels("train")
        order = torch.randperm(len(labels), generator=shuffle)
        model.train()
        for batch in torch.split(order, self.recipe.batch_size):
            yield F.cross_entropy(model(self.inputs("train", batch)), labels[batch])

    @torch.no_grad()
    def judge(self, model: nn.Module, part: Part) -> Marks:
        """Return the mean cross-entropy of a part's samples, and the share that is sorted right."""
        model.eval()
        labels = self.labels(part)
        rows = torch.arange(len(labels))
        scores = torch.cat([model(self.inputs(part, batch)) for batch in torch.split(rows, JUDGED_BATCH)])
        guesses = scores.argmax(dim=1)
        return Marks(
            loss=F.cross_entropy(scores, labels).item(),
            value=int((guesses == labels).sum()) / len(labels),
            recall=float(
                recall_score(labels, guesses, labels=np.unique(labels), average="macro", zero_division=0.0)
            ),
        )

    def is_guess(self, test: Marks) -> bool:
        """Tell whether neither loss nor accuracy nor recall are beyond those of the class shares."""
        record = {"loss": test.loss, "accuracy": test.value, "recall_macro": test.recall}
        return collapse(record, self._guess_loss, self.labels("test").numpy()) is not None

    def is_clearly_better(self, test: Marks, other: Marks) -> bool:
        """Tell whether the accuracy is higher by three standard errors of the difference."""
        count = len(self.labels("test"))
        variance = sum(marks.value * (1 - marks.value) / count for marks in (test, other))
        return test.value - other.value > CLEARLY * math.sqrt(variance)

    @property
    def guess(self) -> str:
        """The share of the largest class among the test samples."""
        labels = self.labels("test")
        largest = int(torch.bincount(labels).max()) / len(labels)
        return f"{self.measure.show(largest)}, the share of the largest class"

    @cached_property
    def _guess_loss(self) -> float | None:
        """The loss on the test samples of the class shares of the training samples."""
        labels = self.labels("train")
        view = TuningData(None, torch.cat([labels, self.labels("test")]))
        train, test = np.split(np.arange(len(view)), [len(labels)])
        return guess_loss(torch.Size([self.model.num_classes]), view, train, test, default_loss)
