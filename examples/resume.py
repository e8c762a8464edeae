"""Stop in the middle, save, and go on: the result has the same bits as that of a run that never stopped."""

import tempfile
from pathlib import Path

import torch
from digits import Digits, make_net
from torch.nn.functional import cross_entropy

import fastclip


def make_optimizer(net: torch.nn.Module) -> fastclip.ClippedOptimizer:
    """Return the optimizer of both runs."""
    return fastclip.ClippedOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), max_norm=1.0)


def train(
    net: torch.nn.Module, optimizer: fastclip.ClippedOptimizer, digits: Digits, num_epochs: int
) -> None:
    """Take the steps of some epochs."""
    for _ in range(num_epochs):
        for x, y in digits.batches():
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()


def main() -> bool:
    """Train with and without a stop; return whether both ended the same."""
    whole = make_net()
    train(whole, make_optimizer(whole), Digits(), num_epochs=4)

    digits, net = Digits(), make_net()
    optimizer = make_optimizer(net)
    train(net, optimizer, digits, num_epochs=2)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        saved = torch.load(checkpoint, weights_only=True)
    net = make_net(seed=1)
    optimizer = make_optimizer(net)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    train(net, optimizer, digits, num_epochs=2)

    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))
    print(f"{optimizer.stats().steps} steps; the same bits: {same}")
    return same


if __name__ == "__main__":
    main()
