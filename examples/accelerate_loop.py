"""accelerate: wrap the optimizer before `prepare`, and delete the line with `accelerator.clip_grad_norm_`."""

import math

import torch
from accelerate import Accelerator
from digits import BATCH_SIZE, Digits, make_net
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastclip


def main() -> float:
    """Train with accumulated gradients and a batch of nan, print what happened, and return the accuracy."""
    digits, net = Digits(), make_net()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    clipped = fastclip.ClippedOptimizer(torch.optim.AdamW(net.parameters(), lr=3e-3), max_norm=1.0)
    loader = DataLoader(TensorDataset(*digits.train), BATCH_SIZE, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, clipped, loader)
    for epoch in range(10):
        for number, (x, y) in enumerate(loader):
            with accelerator.accumulate(model):
                spoiled = math.nan if (epoch, number) == (2, 5) else 1.0
                accelerator.backward(cross_entropy(model(x), y) * spoiled)
                optimizer.step()
                optimizer.zero_grad()
    accuracy, stats = digits.accuracy(net), clipped.stats()
    print(
        f"accuracy {accuracy:.3f}; of {stats.steps} steps, {stats.clipped} clipped, {stats.skipped} skipped"
    )
    return accuracy


if __name__ == "__main__":
    main()
