"""Experts that live on one rank each, as plain tensors, which `shard_over` says; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_experts.py

The router is copied as in DDP; samples travel to the rank of their expert and back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import Digits
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single

import fastclip


class Experts(nn.Module):
    """A router that all ranks have, and the expert of this rank; sample i goes to that of rank i % ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(64, 64)
        torch.manual_seed(1 + dist.get_rank())
        self.expert = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of equally many samples on each rank, in their order."""
        size = dist.get_world_size()
        routed = torch.relu(self.router(x)).view(-1, size, 64).transpose(0, 1).contiguous()
        received = all_to_all_single(torch.empty_like(routed), routed)
        answered = self.expert(received)
        returned = all_to_all_single(torch.empty_like(answered), answered)
        return returned.transpose(0, 1).reshape(-1, 10)


def main() -> None:
    """Train on the digits, each rank on its share of every batch."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    digits, model = Digits(), Experts()
    fastclip.distributed.shard_over(model.expert.parameters(), dist.group.WORLD)
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 1e-2), max_norm=1.0)
    norms = torch.zeros(size, dtype=torch.float64)
    for _ in range(2):
        for x, y in digits.batches():
            count = len(x) // (size * size) * size  # as many on each rank, and as many for each expert
            mine = slice(rank * count, (rank + 1) * count)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            for param in model.router.parameters():
                dist.all_reduce(param.grad)
                param.grad /= size
            optimizer.step()
            dist.all_gather_into_tensor(norms, optimizer.last.total_norm.double().reshape(1))

    x, y = digits.test
    whole = len(x) // size * size  # equally many for each expert
    with torch.no_grad():
        accuracy = float((model(x[:whole]).argmax(1) == y[:whole]).float().mean())
    if rank == 0:
        print(f"accuracy {accuracy:.3f} on {size} ranks; one norm on all: {bool((norms == norms[0]).all())}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
