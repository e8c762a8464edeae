"""The task of reading on: to predict each next character of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.demo.data import TextData
from fastclip.demo.models import CharRNN
from fastclip.demo.tasks.base import Marks, Part, Task
from fastclip.tuner.training.guessing import AT_GUESSING


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A recurrent network that reads a text in parallel columns and predicts each next character.

    `batch_size` of the recipe is the number of columns.

    Attributes:
        data: The text.
        backward_steps: Characters that the gradient looks back; the state goes on beyond them.
    """

    data: TextData
    backward_steps: int = 35

    def make_model(self) -> CharRNN:
        """Return a new network for the text's alphabet."""
        return CharRNN(len(self.data.alphabet))

    def losses(self, model: nn.Module, shuffle: torch.Generator) -> Iterator[Tensor]:
        """Yield the mean cross-entropy of each stretch of characters, in the order of the text."""
        del shuffle
        yield from self._read(model, self.data.train)

    @torch.no_grad()
    def judge(self, model: nn.Module, part: Part) -> Marks:
        """Return nats and bits per character; the training text is judged by as much as is held out."""
        text = self.data.test if part == "test" else self.data.train[: len(self.data.test)]
        loss = torch.stack(list(self._read(model, text))).mean().item()
        return Marks(loss=loss, value=loss / math.log(2))

    def is_guess(self, test: Marks) -> bool:
        """Tell whether the loss is no better than that of taking each character for equally likely."""
        return not test.loss < AT_GUESSING * self.guessing_loss

    def is_clearly_better(self, test: Marks, other: Marks) -> bool:
        """Tell whether the loss is lower, by more than a loss may be and still count as that of guessing."""
        return test.loss < AT_GUESSING * other.loss

    @property
    def guess(self) -> str:
        """The bits of one character among all."""
        return f"{self.measure.show(self.guessing_loss / math.log(2))}, every character equally likely"

    def _read(self, model: nn.Module, text: Tensor) -> Iterator[Tensor]:
        if not isinstance(model, CharRNN):
            raise TypeError(f"TextTask: model is a {type(model).__name__}; expected a CharRNN.")
        columns = text[: len(text) // self.recipe.batch_size * self.recipe.batch_size]
        columns = columns.view(self.recipe.batch_size, -1)
        state: Tensor | None = None
        # Only whole stretches, so that the mean over stretches is the mean over characters.
        for start in range(0, columns.shape[1] - self.backward_steps, self.backward_steps):
            stretch = columns[:, start : start + self.backward_steps + 1]
            scores, state = model.read_on(stretch[:, :-1], state)
            yield F.cross_entropy(scores.flatten(0, 1), stretch[:, 1:].flatten())
            state = state.detach()
