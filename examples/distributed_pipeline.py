"""Two pipeline stages with GPipe: `group` says that the ranks hold different parts; run with torchrun.

    torchrun --nproc-per-node 2 examples/distributed_pipeline.py

Without it, each stage would clip by the norm of its own half.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import fastclip


def main() -> None:
    """Take twenty steps of a regression, and print the norm that both stages clip by."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    device = torch.device("cpu")
    torch.manual_seed(0)
    halves = [nn.Sequential(nn.Linear(8, 32), nn.Tanh()), nn.Linear(32, 1)]
    own = halves[rank]
    schedule = ScheduleGPipe(
        PipelineStage(own, rank, 2, device), n_microbatches=4, loss_fn=nn.functional.mse_loss
    )
    optimizer = fastclip.ClippedOptimizer(
        torch.optim.AdamW(own.parameters(), 1e-2), max_norm=0.5, group=dist.group.WORLD
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    y = x.prod(1, keepdim=True).sign()
    for _ in range(20):
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            losses: list[torch.Tensor] = []
            schedule.step(target=y, losses=losses)
        optimizer.step()

    assert optimizer.last is not None
    norms = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(norms, optimizer.last.total_norm)
    if rank == 0:
        print(f"norms of the two stages: {norms[0]:.6f} {norms[1]:.6f}, equal: {bool(norms[0] == norms[1])}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
