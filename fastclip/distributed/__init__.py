"""Norms and clipping where ranks hold different parts: DTensors, pipeline stages, experts, FSDP1.

`shards` says whether a list is of that kind, and then has the operations on it: `marks` is what only the
caller can know, `reading` what a list has here, `plan` who reduces what with whom, `payload` what they send
each other, `shards` the operations, `everywhere` what takes more than a norm.
Nothing here imports torch.distributed.tensor; a list can hold DTensors only where somebody else has.
"""

from fastclip.distributed.marks import count_zero, shard_over
from fastclip.distributed.shards import Shards, shards

__all__ = ["Shards", "count_zero", "shard_over", "shards"]
