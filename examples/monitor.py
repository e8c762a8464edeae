"""Watch a training: every step on record, the batch of nan named, a threshold suggested at the end."""

import logging
import math
import tempfile
from pathlib import Path

import torch
from digits import Digits, make_net
from torch.nn.functional import cross_entropy

import fastclip


def main(run: Path) -> fastclip.monitor.Suggestion:
    """Train, print what the monitor says, and return what it suggests."""
    logging.basicConfig(format="%(message)s")  # where early warnings and bad steps are told
    digits, net = Digits(), make_net()
    # A threshold that never clips, to see the norms as they are.
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), max_norm=math.inf)
    with fastclip.Monitor(optimizer, run, model=net, per_parameter=True, update_ratio=True) as monitor:
        for epoch in range(6):
            for number, (x, y) in enumerate(digits.batches()):
                if (epoch, number) == (2, 5):
                    x[7] = math.nan
                optimizer.zero_grad()
                loss = cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                monitor.step(loss)
    seen = fastclip.monitor.read(run)
    found = fastclip.monitor.suggest(seen)
    print(
        f"accuracy {digits.accuracy(net):.3f}; {len(seen)} steps recorded, {seen.skipped.sum()} skipped; "
        f"{found.best.code} would have clipped {found.best.share:.1%}"
    )
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
