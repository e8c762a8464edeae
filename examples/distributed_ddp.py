"""DDP: every rank has the whole averaged gradient, so fastclip has nothing to reduce; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_ddp.py

A batch of nan on one rank is in the average on all: each leaves that step out by itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import Digits, make_net
from torch.nn.parallel import DistributedDataParallel

import fastclip


def train() -> str:
    """Train on the digits, each rank on its share of every batch, and say what came of it."""
    digits, model = Digits(), DistributedDataParallel(make_net())
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0)
    return digits.train_on_ranks(model, optimizer)


def main() -> None:
    """Let the model go before its group: as the group's last owner, DDP now and then hangs (torch 2.13)."""
    dist.init_process_group("gloo")
    told = train()
    if dist.get_rank() == 0:
        print(told)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
