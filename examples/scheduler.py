"""A schedule over a wrapped optimizer: schedulers see an optimizer like any other."""

import torch
from digits import Digits, make_net
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

import fastclip


def main() -> float:
    """Train, print the learning rate of each epoch, and return the accuracy."""
    digits, net = Digits(), make_net()
    num_epochs, num_batches = 6, len(list(digits.batches()))
    sgd = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    optimizer = fastclip.ClippedOptimizer(sgd, max_norm=0.5)
    scheduler = OneCycleLR(optimizer, max_lr=0.3, total_steps=num_epochs * num_batches)
    for epoch in range(num_epochs):
        for x, y in digits.batches():
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch}: lr {scheduler.get_last_lr()[0]:.4f}, norm {optimizer.last.total_norm:.3f}")
    accuracy = digits.accuracy(net)
    print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
