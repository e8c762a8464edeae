"""A recurrent network whose gradients grow with every character that it looks back."""

from __future__ import annotations

from torch import Tensor, nn


class CharRNN(nn.Module):
    """Two recurrent tanh layers that predict the next character.

    Args:
        num_characters: Characters that occur.
        embedding_size: Length of the vector that stands for a character.
        hidden_size: Length of each layer's state.
    """

    def __init__(self, num_characters: int, embedding_size: int = 64, hidden_size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters, embedding_size)
        self.rnn = nn.RNN(embedding_size, hidden_size, num_layers=2, nonlinearity="tanh", batch_first=True)
        self.output = nn.Linear(hidden_size, num_characters)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of each next character, shape (n, length, num_characters), from a blank state."""
        return self.read_on(characters, None)[0]

    def read_on(self, characters: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the scores of each next character, and the state to read on from.

        Args:
            characters: int64, shape (n, length).
            state: What the call before returned, or None at the beginning of a text.

        Returns:
            Scores of shape (n, length, num_characters) and a state of shape (2, n, hidden_size).
        """
        hidden, state = self.rnn(self.embedding(characters), state)
        return self.output(hidden), state
