"""Mixed precision without `unscale_` or a clipping line: the step divides, clips and updates at once.

`fastclip.GradScaler` also leaves the search for overflows to that step; `torch.amp.GradScaler` does the same
with one more pass over the gradients.
"""

import torch
from digits import Digits, make_net
from torch.nn.functional import cross_entropy

import fastclip


def main() -> float:
    """Train under autocast with a GradScaler, print its scale, and return the accuracy."""
    digits, net = Digits(), make_net()
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), max_norm=1.0)
    # A scale far too large, to show that the steps that overflow are left out until it has come down.
    scaler = fastclip.GradScaler("cpu", init_scale=2.0**24)
    for _ in range(6):
        for x, y in digits.batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = cross_entropy(net(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    accuracy = digits.accuracy(net)
    num_skipped = optimizer.stats().skipped
    print(f"accuracy {accuracy:.3f}; scale {scaler.get_scale():.3g} after {num_skipped} skipped steps")
    return accuracy


if __name__ == "__main__":
    main()
