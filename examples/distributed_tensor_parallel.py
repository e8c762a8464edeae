"""Tensor and sequence parallelism: nothing to tell fastclip, the DTensors say it; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_tensor_parallel.py

The norm that every rank clips by is that of the whole model, which the last line checks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from digits import Digits, norm_of_whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastclip


def main() -> None:
    """Train on the digits; every rank sees every batch and holds a part of each layer."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    digits = Digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10))
    plan = {
        "0": ColwiseParallel(use_local_output=False),
        "1": SequenceParallel(sequence_dim=0),
        "3": RowwiseParallel(),
    }
    model = parallelize_module(model, mesh, plan)
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0)
    for _ in range(2):
        for x, y in digits.batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    whole = norm_of_whole(model)
    norm = float(optimizer.last.total_norm)
    accuracy = digits.accuracy(model)
    if dist.get_rank() == 0:
        print(
            f"accuracy {accuracy:.3f} on {dist.get_world_size()} ranks; clipped by the norm of the whole: "
            f"{math.isclose(norm, whole, rel_tol=1e-5)}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
