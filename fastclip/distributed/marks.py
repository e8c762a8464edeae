"""What no layout says: which parameters have other values on other ranks, and which are counted elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

Ranks: TypeAlias = "dist.ProcessGroup | DeviceMesh"
"""Ranks to reduce over: a process group, or a device mesh, all of whose dimensions are meant."""

_sharded_over: WeakIdKeyDictionary = WeakIdKeyDictionary()
_counted_zero: WeakIdKeyDictionary = WeakIdKeyDictionary()


def shard_over(parameters: Tensor | Iterable[Tensor], group: Ranks) -> None:
    """Say that the ranks of `group` hold other values of these parameters, as experts of a layer do.

    A plain tensor counts as a copy that every rank has, and a DTensor as one that the ranks outside its mesh
    have, too: nothing in them says otherwise. Their norms are then added up over the group as well.

    Args:
        parameters: A tensor or an iterable of tensors; those that clipping will be given.
        group: The ranks that hold other parts.
    """
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        _sharded_over[parameter] = group


def count_zero(parameters: Tensor | Iterable[Tensor]) -> None:
    """Say that these parameters are counted on another rank, as weights are that two pipeline stages share.

    They are left out of the norm, and clipped like all others.
    """
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        _counted_zero[parameter] = True


def any_marked(parameters: Iterable[Tensor]) -> bool:
    """Whether one of these parameters has a mark; at once where none that is alive has."""
    # Their `data`, which may hold parameters that are gone: the length of such a dict is slow to tell.
    if not (_sharded_over.data or _counted_zero.data):
        return False
    return any(parameter in _sharded_over or parameter in _counted_zero for parameter in parameters)


def marked_group(parameter: Tensor) -> Ranks | None:
    """Return the group that holds other values of this parameter, if one was named."""
    group: Ranks | None = _sharded_over.get(parameter)  # type: ignore[no-untyped-call]
    return group


def is_counted_zero(parameter: Tensor) -> bool:
    """Whether this parameter is counted on another rank."""
    return parameter in _counted_zero
