"""What the examples train: scikit-learn's digits, and a small network for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor

import fastclip

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

    def train_on_ranks(self, model: torch.nn.Module, optimizer: fastclip.ClippedOptimizer) -> str:
        """Train for two epochs, each rank on its share of every batch, and say what came of it.

        The last rank meets one batch of nan.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        for epoch in range(2):
            for number, (x, y) in enumerate(self.batches()):
                mine = slice(rank, None, size)
                if (epoch, number) == (1, 3) and rank == size - 1:
                    x = torch.full_like(x, math.nan)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
                optimizer.step()
        stats = optimizer.stats()
        accuracy = self.accuracy(model)
        return f"accuracy {accuracy:.3f} on {size} ranks: {stats.steps} steps, {stats.skipped} skipped"

    def accuracy(self, net: torch.nn.Module) -> float:
        """Return the share of test pictures that the network names rightly."""
        x, y = self.test
        with torch.no_grad():
            return (net(x).argmax(1) == y).float().mean().item()


def norm_of_whole(model: torch.nn.Module) -> float:
    """Return the norm of the gradients of a model whose parameters are DTensors, from their whole values."""
    grads = [p.grad.full_tensor() for p in model.parameters()]
    return math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads))


def make_net(seed: int = 0) -> torch.nn.Module:
    """Return a network with one hidden layer."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
