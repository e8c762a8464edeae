"""HSDP: shards within a node, copies across nodes, reduced over the shards alone; run with torchrun.

    torchrun --nproc-per-node 4 examples/distributed_hsdp.py

One copy alone meets a batch of nan: both copies leave that step out, and stay equal.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import Digits, make_net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastclip


def main() -> None:
    """Train on the digits, each rank on its share of every batch."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))
    torch.manual_seed(0)
    digits, model = Digits(), fully_shard(make_net(), mesh=mesh)
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0)
    told = digits.train_on_ranks(model, optimizer)
    if dist.get_rank() == 0:
        print(told)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
