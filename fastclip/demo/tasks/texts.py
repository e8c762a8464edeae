"""The task of sorting texts of different length into classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastclip.demo.data import LabelledTexts
from fastclip.demo.data.texts import as_loader, pad
from fastclip.demo.models import TextModel
from fastclip.demo.tasks.base import Part, Recipe
from fastclip.demo.tasks.sorting import ACCURACY, SortingTask


@dataclass(frozen=True, kw_only=True)
class TextsTask(SortingTask):
    """A network that sorts texts, each batch filled up to its longest.

    Attributes:
        data: The texts.
    """

    data: LabelledTexts

    def labels(self, part: Part) -> Tensor:
        """Return the class of each text of a part, numbered by the order of the names."""
        return self._labels[part]

    def inputs(self, part: Part, rows: Tensor) -> Tensor:
        """Return the word numbers of these texts, shape (n, length of the longest)."""
        texts = self.data.train if part == "train" else self.data.test
        return pad([texts[int(row)] for row in rows])[0]

    def tuning_data(self, part: Part) -> Any:
        """Return a loader of a part, with the classes by name."""
        return as_loader(self.data.train if part == "train" else self.data.test)

    @cached_property
    def _labels(self) -> dict[Part, Tensor]:
        numbers = {name: number for number, name in enumerate(sorted(set(self.data.train.targets)))}
        return {
            "train": torch.tensor([numbers[name] for name in self.data.train.targets]),
            "test": torch.tensor([numbers[name] for name in self.data.test.targets]),
        }


def texts_task(name: str, network: str, data: LabelledTexts, recipe: Recipe) -> TextsTask:
    """Return a task judged by its accuracy; an untrained network gives every class the same share."""
    model = TextModel(network, data.train.num_tokens, len(set(data.train.targets)))
    return TextsTask(
        name=name,
        title=model.title,
        recipe=recipe,
        measure=ACCURACY,
        guessing_loss=math.log(model.num_classes),
        data=data,
        model=model,
    )
