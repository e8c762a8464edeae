"""Networks that sort texts of different length, filled up to the longest of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.demo.models.named import NamedModel, Network

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


TEXT_NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        "embedding-bag": Network("Bag of words", EmbeddingBag),
        "recurrent": Network("Recurrent network", Recurrent),
    }
)


@dataclass(frozen=True)
class TextModel(NamedModel):
    """Makes networks for texts of one vocabulary.

    Attributes:
        name: One of `TEXT_NETWORKS`.
        num_tokens: Tokens that occur, padding included.
        num_classes: Number of scores.
    """

    networks = TEXT_NETWORKS

    num_tokens: int
    num_classes: int

    def __call__(self, params: dict[str, Any]) -> nn.Module:
        """Return a new network."""
        del params
        return self.networks[self.name].make(self.num_tokens, self.num_classes)
