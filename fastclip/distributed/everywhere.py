"""What all ranks have found, told to all of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastclip import backends
from fastclip.backends import Backend
from fastclip.distributed.marks import Ranks
from fastclip.distributed.shards import shards


def nonfinite_of_ranks(names: list[str], grads: list[Tensor], group: Ranks) -> dict[str, tuple[int, int]]:
    """Return name -> (nan, inf) of the gradients that are not finite on any rank of the group."""
    spread = shards("find_nonfinite", grads, of_gradients=False, whole_norm=True)
    local = grads if spread is None else spread.present()
    found = [
        (names[position], _place(grads[position]), nan, inf)
        for position, nan, inf in backends.run(Backend.count_nonfinite, local)
    ]
    groups = group.get_all_groups() if isinstance(group, DeviceMesh) else [group]
    entries = set(found)
    for one in groups:
        gathered: list[Any] = [None] * dist.get_world_size(one)
        dist.all_gather_object(gathered, entries, group=one)
        entries = set().union(*gathered)
    # Copies of a shard are one; they may differ, if one rank went wrong alone.
    shard: dict[tuple[str, Any], tuple[int, int]] = {}
    for name, place, nan, inf in sorted(entries, key=str):
        before = shard.get((name, place), (0, 0))
        shard[name, place] = max(before[0], nan), max(before[1], inf)
    total: dict[str, tuple[int, int]] = {}
    for (name, _), (nan, inf) in shard.items():
        before = total.get(name, (0, 0))
        total[name] = before[0] + nan, before[1] + inf
    return total


def _place(grad: Any) -> tuple[int, ...]:
    """Return which shard of a gradient this rank has; () if the gradient is whole here."""
    spec = getattr(grad, "_spec", None)
    if spec is None:
        return ()
    here = spec.mesh.get_coordinate() or ()
    return tuple(
        c for c, placement in zip(here, spec.placements, strict=True) if not placement.is_replicate()
    )
