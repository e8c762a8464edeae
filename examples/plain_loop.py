"""Wrap the optimizer, delete the clipping line: a batch of nan then costs one step and not the run."""

import math

import torch
from digits import Digits, make_net
from torch.nn.functional import cross_entropy

import fastclip


def main() -> float:
    """Train, print what happened, and return the accuracy."""
    digits, net = Digits(), make_net()
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), max_norm=1.0)
    for epoch in range(6):
        for number, (x, y) in enumerate(digits.batches()):
            if (epoch, number) == (2, 5):
                x = torch.full_like(x, math.nan)
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
    accuracy = digits.accuracy(net)
    stats = optimizer.stats()
    print(
        f"accuracy {accuracy:.3f}; of {stats.steps} steps, {stats.clipped} clipped, {stats.skipped} skipped"
    )
    return accuracy


if __name__ == "__main__":
    main()
