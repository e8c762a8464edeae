"""FSDP2: wrap the model with fully_shard and the optimizer with ClippedOptimizer; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_fsdp2.py

One rank meets a batch of nan on the way, and all ranks leave that step out.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastclip

BATCH, EPOCHS = 64, 3


def main() -> None:
    """Train on the digits, each rank on its share of them."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    train = slice(rank, 1400, size)
    mine_x, mine_y = x[train], y[train]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0)

    step = 0
    for _ in range(EPOCHS):
        for first in range(0, len(mine_x) - BATCH // size + 1, BATCH // size):
            batch = mine_x[first : first + BATCH // size]
            if step == 10 and rank == size - 1:
                batch = batch * float("nan")
            loss = nn.functional.cross_entropy(model(batch), mine_y[first : first + BATCH // size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1

    with torch.no_grad():
        accuracy = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
    stats = optimizer.stats()
    if rank == 0:
        print(
            f"accuracy {accuracy:.3f} on {size} ranks: {stats.steps} steps, {stats.clipped} clipped, "
            f"{stats.skipped} skipped"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
