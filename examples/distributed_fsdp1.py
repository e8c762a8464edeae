"""FSDP1: its shards do not say who holds the rest, so fastclip is told by group; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_fsdp1.py

One rank meets a batch of nan on the way, and all ranks leave that step out.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import Digits, make_net
from torch.distributed.fsdp import FullyShardedDataParallel

import fastclip


def main() -> None:
    """Train on the digits, each rank on its share of every batch."""
    dist.init_process_group("gloo")
    digits = Digits()
    model = FullyShardedDataParallel(make_net(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = fastclip.ClippedOptimizer(
        torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0, group=dist.group.WORLD
    )
    told = digits.train_on_ranks(model, optimizer)
    if dist.get_rank() == 0:
        print(told)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
