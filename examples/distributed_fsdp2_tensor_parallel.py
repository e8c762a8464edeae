"""FSDP2 over tensor parallelism, as large models are trained, with a parallel loss; run with torchrun.

    torchrun --nproc-per-node 4 examples/distributed_fsdp2_tensor_parallel.py

The norm that every rank clips by is that of the whole model, which the last line checks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from digits import Digits, norm_of_whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

import fastclip


def main() -> None:
    """Train on the digits: two groups of ranks share the batch, and within each the layers are in parts."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    digits = Digits()
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10, bias=False)
    )
    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(),
        # The scores stay in parts, each rank with some of the classes, and so does the loss.
        "4": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0)
    mine = slice(mesh["data"].get_local_rank(), None, 2)
    for _ in range(2):
        for x, y in digits.batches():
            optimizer.zero_grad()
            with loss_parallel():
                nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()

    whole = norm_of_whole(model)
    norm = float(optimizer.last.total_norm)
    x, y = digits.test
    with torch.no_grad():
        scores = model(x).redistribute(placements=[Replicate()]).to_local()
    accuracy = float((scores.argmax(1) == y).float().mean())
    if dist.get_rank() == 0:
        print(
            f"accuracy {accuracy:.3f} on {dist.get_world_size()} ranks; clipped by the norm of the whole: "
            f"{math.isclose(norm, whole, rel_tol=1e-5)}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
