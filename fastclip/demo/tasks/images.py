"""Tasks that sort images into classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastclip.demo.data import ClassificationData
from fastclip.demo.models import ImageModel
from fastclip.demo.tasks.base import Expectation, Part, Recipe
from fastclip.demo.tasks.sorting import ACCURACY, SortingTask


@dataclass(frozen=True, kw_only=True)
class ImageTask(SortingTask):
    """A network that sorts images.

    Attributes:
        data: The images.
    """

    data: ClassificationData

    def labels(self, part: Part) -> Tensor:
        """Return the class of each image of a part."""
        return self.data.train_labels if part == "train" else self.data.test_labels

    def inputs(self, part: Part, rows: Tensor) -> Tensor:
        """Return these images, shape (n, channels, height, width)."""
        return (self.data.train_inputs if part == "train" else self.data.test_inputs)[rows]

    def tuning_data(self, part: Part) -> Any:
        """Return the images and the classes of a part."""
        inputs = self.data.train_inputs if part == "train" else self.data.test_inputs
        return inputs, self.labels(part)


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
