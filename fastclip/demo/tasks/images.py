"""Tasks that sort images into classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.metrics import recall_score
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.demo.data import ClassificationData
from fastclip.demo.models import ImageModel
from fastclip.demo.tasks.base import Expectation, Marks, Measure, Part, Recipe, Task
from fastclip.tuner.data import TuningData
from fastclip.tuner.training.guessing import collapse, guess_loss
from fastclip.tuner.training.losses import default_loss

ACCURACY = Measure("test accuracy", "train accuracy", "{:.1%}")

JUDGED_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """A network that sorts images.

    Attributes:
        data: The images.
        model: Makes the network.
    """

    data: ClassificationData
    model: ImageModel

    def make_model(self) -> nn.Module:
        """Return a new network for the shape and the classes of the data."""
        return self.model({})

    def losses(self, model: nn.Module, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the mean cross-entropy of each batch, in a new order of the images."""
        data = self.data
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        model.train()
        for batch in torch.split(order, self.recipe.batch_size):
            yield F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])

    @torch.no_grad()
    def judge(self, model: nn.Module, part: Part) -> Marks:
        """Return the mean cross-entropy of a part's images, and the share that is sorted right."""
        model.eval()
        data = self.data
        inputs, labels = (
            (data.train_inputs, data.train_labels)
            if part == "train"
            else (data.test_inputs, data.test_labels)
        )
        scores = torch.cat([model(images) for images in torch.split(inputs, JUDGED_BATCH)])
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
        return collapse(record, self._guess_loss, self.data.test_labels.numpy()) is not None

    @property
    def guess(self) -> str:
        """The share of the largest class among the test images."""
        largest = int(torch.bincount(self.data.test_labels).max()) / len(self.data.test_labels)
        return f"{self.measure.show(largest)}, the share of the largest class"

    @cached_property
    def _guess_loss(self) -> float | None:
        """The loss on the test images of the class shares of the training images."""
        data = self.data
        view = TuningData(None, torch.cat([data.train_labels, data.test_labels]))
        train, test = np.split(np.arange(len(view)), [len(data.train_labels)])
        return guess_loss(torch.Size([data.num_classes]), view, train, test, default_loss)


def image_task(
    name: str,
    model: ImageModel,
    data: ClassificationData,
    recipe: Recipe,
    expectation: Expectation | None = None,
) -> ImageTask:
    """Return a task judged by its accuracy; an untrained network gives every class the same share."""
    return ImageTask(
        name=name,
        title=model.title,
        recipe=recipe,
        measure=ACCURACY,
        guessing_loss=math.log(data.num_classes),
        expectation=expectation,
        data=data,
        model=model,
    )
