"""What the examples train: scikit-learn's digits, and a small network for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor

NUM_TRAIN = 1400
BATCH_SIZE = 32


class Digits:
    """1797 pictures of handwritten digits, split into training and test."""

    def __init__(self, seed: int = 0) -> None:
        """Load and split them; the seed decides on the split and on the order of the batches."""
        data = load_digits()
        self._generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data.target), generator=self._generator)
        x = torch.tensor(data.images / 16, dtype=torch.float32).flatten(1)[order]
        y = torch.tensor(data.target)[order]
        self.train, self.test = (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch in random order."""
        x, y = self.train
        for batch in torch.randperm(len(x), generator=self._generator).split(BATCH_SIZE):
            yield x[batch], y[batch]

    def accuracy(self, net: torch.nn.Module) -> float:
        """Return the share of test pictures that the network names rightly."""
        x, y = self.test
        with torch.no_grad():
            return (net(x).argmax(1) == y).float().mean().item()


def make_net(seed: int = 0) -> torch.nn.Module:
    """Return a network with one hidden layer."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
