"""DDP: every rank has the whole averaged gradient, so fastclip has nothing to reduce; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_ddp.py

A batch of nan on one rank is in the average on all: each leaves that step out by itself.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from digits import Digits, make_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastclip


def main() -> None:
    """Train on the digits, each rank on its share of every batch."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    digits, model = Digits(), DistributedDataParallel(make_net())
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 3e-3), max_norm=1.0)
    for epoch in range(4):
        for number, (x, y) in enumerate(digits.batches()):
            mine = slice(rank, None, size)
            if (epoch, number) == (1, 3) and rank == size - 1:
                x = torch.full_like(x, math.nan)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()

    accuracy = digits.accuracy(model)
    if rank == 0:
        stats = optimizer.stats()
        print(f"accuracy {accuracy:.3f} on {size} ranks: {stats.steps} steps, {stats.skipped} skipped")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
