"""What a list has on this rank: the memory of DTensors, and who is a shard of FullyShardedDataParallel."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from fastclip.backends import cpu

DTENSOR_MODULE = "torch.distributed.tensor"
"""Which has the class DTensor; this package never loads it."""

_FSDP1_MODULE = "torch.distributed.fsdp._flat_param"
_FSDP1_MARK = "_fsdp_flattened"


def dtensor_class() -> type[Tensor] | None:
    """Return the class DTensor if anybody has loaded it."""
    module = sys.modules.get(DTENSOR_MODULE)
    return None if module is None else getattr(module, "DTensor", None)


class Found(NamedTuple):
    """What a list has on this rank.

    Attributes:
        values: What is meant of each; None where there is no gradient.
        memory: Of each value on this rank; it may be on its way still.
        specs: The DTensorSpec of each value, or of the parameter without one; None of what is no DTensor.
        plain: The items without one.
        arrived: Whether all memory is there.
    """

    values: list[Any]
    memory: list[Any]
    specs: list[Any]
    plain: list[Tensor]
    arrived: bool


def read(listed: list[Tensor], of_gradients: bool, dtensor: type[Tensor] | None) -> Found:
    """Return what the list, or its gradients, has here; `dtensor` is the class."""
    if _reads_natively():
        return Found(*cpu._C.read_shards(listed, of_gradients, dtensor))
    kind: Any = dtensor
    values: list[Any] = [x.grad for x in listed] if of_gradients else list(listed)
    shown: list[Any] = [item if value is None else value for item, value in zip(listed, values, strict=True)]
    specs = [x._spec if type(x) is kind else None for x in shown]
    memory = [x._local_tensor if type(x) is kind else x for x in values]
    plain = [item for item, spec in zip(listed, specs, strict=True) if spec is None]
    return Found(values, memory, specs, plain, all(type(local) is Tensor for local in memory))


def find(listed: list[Tensor]) -> tuple[bool, bool]:
    """Return whether there is a DTensor, and else whether there is a shard of FullyShardedDataParallel."""
    dtensor = dtensor_class()
    mark = _FSDP1_MARK if _FSDP1_MODULE in sys.modules and dist.is_initialized() else None
    if dtensor is None and mark is None:
        return False, False
    if _reads_natively():
        found: tuple[bool, bool] = cpu._C.find_shards(listed, dtensor, mark)
        return found
    return dtensor in set(map(type, listed)), mark is not None and any(which_flattened(listed))


def which_flattened(listed: list[Tensor]) -> list[bool]:
    """Return whether each is a shard that FullyShardedDataParallel made."""
    return [getattr(x, _FSDP1_MARK, False) for x in listed]


def _reads_natively() -> bool:
    return cpu.unavailable_reason() is None
