"""Networks that sort texts of different length, filled up to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

PADDING = 0
"""The token that fills a text up; it changes no score."""


class EmbeddingBag(nn.Module):
    """Sorts a text by the mean of its embedded tokens.

    Args:
        num_tokens: Tokens that occur, padding included.
        num_classes: Number of scores.
        embedding_size: Length of the vector that stands for a token.
    """

    def __init__(self, num_tokens: int, num_classes: int, embedding_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(num_tokens, embedding_size, mode="mean", padding_idx=PADDING)
        self.output = nn.Linear(embedding_size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of tokens of shape (n, length)."""
        scores: Tensor = self.output(self.embedding(tokens))
        return scores


class Recurrent(nn.Module):
    """Reads a text by a gated recurrent layer and sorts it by the state behind its last token.

    Args:
        num_tokens: Tokens that occur, padding included.
        num_classes: Number of scores.
        embedding_size: Length of the vector that stands for a token.
        hidden_size: Length of the state.
    """

    def __init__(
        self, num_tokens: int, num_classes: int, embedding_size: int = 64, hidden_size: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, embedding_size, padding_idx=PADDING)
        self.rnn = nn.GRU(embedding_size, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the class scores, shape (n, num_classes), of tokens of shape (n, length)."""
        states, _ = self.rnn(self.embedding(tokens))
        last = (tokens != PADDING).sum(dim=1).clamp(min=1) - 1
        scores: Tensor = self.output(states[torch.arange(len(tokens), device=tokens.device), last])
        return scores


@dataclass(frozen=True)
class TextNetwork:
    """A family of networks that sort texts into any number of classes.

    Attributes:
        title: What it is, in a word or two.
        make: Takes the number of tokens and of classes.
    """

    title: str
    make: Callable[[int, int], nn.Module]


TEXT_NETWORKS: Mapping[str, TextNetwork] = MappingProxyType(
    {
        "embedding-bag": TextNetwork("Bag of words", EmbeddingBag),
        "recurrent": TextNetwork("Recurrent network", Recurrent),
    }
)


@dataclass(frozen=True)
class TextModel:
    """Makes new networks of one family, vocabulary and number of classes, as `TunerCV` wants them.

    Attributes:
        name: One of `TEXT_NETWORKS`.
        num_tokens: Tokens that occur, padding included.
        num_classes: Number of scores.
    """

    name: str
    num_tokens: int
    num_classes: int

    def __post_init__(self) -> None:
        """Check that there is a network of this name.

        Raises:
            ValueError: there is none.
        """
        if self.name not in TEXT_NETWORKS:
            raise ValueError(
                f"TextModel: {self.name!r} is unknown; expected one of {', '.join(TEXT_NETWORKS)}."
            )

    @property
    def title(self) -> str:
        """What it is, in a word or two."""
        return TEXT_NETWORKS[self.name].title

    def __call__(self, params: dict[str, Any]) -> nn.Module:
        """Return a new network, initialised from torch's random state; no parameter concerns its layers."""
        del params
        return TEXT_NETWORKS[self.name].make(self.num_tokens, self.num_classes)
