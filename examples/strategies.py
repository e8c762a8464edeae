"""Let the threshold find itself: a batch of nan or a loss that is far too large costs one step at most."""

import math

import torch
from digits import Digits, make_net
from torch.nn.functional import cross_entropy

import fastclip
from fastclip import strategies


def train(max_norm: float | strategies.Strategy) -> float:
    """Train with a nan and with outliers on the way, print what happened, and return the accuracy."""
    torch.manual_seed(0)
    digits, net = Digits(), make_net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = fastclip.ClippedOptimizer(sgd, max_norm)
    step = 0
    for _ in range(8):
        for x, y in digits.batches():
            step += 1
            if step == 60:
                x = torch.full_like(x, math.nan)
            loss = cross_entropy(net(x), y)
            if step % 20 == 19:
                loss = loss * 1e4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = digits.accuracy(net)
    stats = optimizer.stats()
    print(
        f"{max_norm}: accuracy {accuracy:.3f}; "
        f"of {stats.steps} steps, {stats.clipped} clipped, {stats.skipped} skipped"
    )
    return accuracy


def main() -> None:
    """Compare no threshold with two that find themselves."""
    train(math.inf)
    train(strategies.MedianMAD())
    train(strategies.Skip(strategies.MedianMAD(), factor=10))


if __name__ == "__main__":
    main()
