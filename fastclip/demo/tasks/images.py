"""Tasks that sort images into classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.demo.data import ClassificationData
from fastclip.demo.models.image_shape import ImageShape
from fastclip.demo.tasks.base import Expectation, Measure, Recipe, Task

Network: TypeAlias = Callable[[ImageShape, int], nn.Module]
"""Makes a model for images of a shape and a number of classes."""

ACCURACY = Measure("test accuracy", "{:.1%}")

TEST_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """A network that sorts images.

    Attributes:
        data: The images.
        network: Makes the model.
    """

    data: ClassificationData
    network: Network

    def make_model(self) -> nn.Module:
        """Return a new network for the shape and the classes of the data."""
        return self.network(self.data.image_shape, self.data.num_classes)

    def losses(self, model: nn.Module, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the mean cross-entropy of each batch, in a new order of the images."""
        data = self.data
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        model.train()
        for batch in torch.split(order, self.recipe.batch_size):
            yield F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Return the share of the test images that are sorted right."""
        model.eval()
        data = self.data
        batches = zip(
            torch.split(data.test_inputs, TEST_BATCH), torch.split(data.test_labels, TEST_BATCH), strict=True
        )
        num_correct = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in batches)
        return num_correct / len(data.test_labels)


def image_task(
    name: str,
    title: str,
    data: ClassificationData,
    network: Network,
    recipe: Recipe,
    expectation: Expectation | None = None,
) -> ImageTask:
    """Return a task judged by its accuracy, in which guessing gives every class the same share."""
    return ImageTask(
        name=name,
        title=title,
        recipe=recipe,
        measure=ACCURACY,
        guessing_loss=math.log(data.num_classes),
        expectation=expectation,
        data=data,
        network=network,
    )
