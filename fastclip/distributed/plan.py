"""Who reduces what with whom: from the layouts of all tensors to collectives and weights.

The plan follows from parameters alone, those without a gradient included, so that every rank comes to the
same one without asking. A part of a norm is the local tensors of one weight: their sum of powers is divided
by the number of ranks in the reducing set that hold the same elements. So copies need no collective of their
own, and one that is nan on a single rank is seen by all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastclip.distributed.marks import Ranks, is_counted_zero, marked_group

_SHARDS = ("Shard", "_StridedShard")
_LINEAR = ("sum", "avg")


class UnknownLayoutError(Exception):
    """A placement that nothing is known of; torch's own operations are to take the list."""


@dataclass(frozen=True)
class Reduction:
    """One set of ranks that add up their parts.

    Attributes:
        ranks: Global ranks, sorted.
        groups: To reduce over, one after the other: one, unless no group has all ranks.
        device_type: Where these groups take tensors, if not everywhere.
    """

    ranks: tuple[int, ...]
    groups: tuple[dist.ProcessGroup, ...]
    device_type: str


@dataclass(frozen=True)
class Part:
    """Tensors that count the same.

    Attributes:
        positions: In the list.
        weight: What their sum of powers is multiplied by.
        reduction: Index of the set that adds them up; None if they are whole on this rank.
    """

    positions: tuple[int, ...]
    weight: float
    reduction: int | None


@dataclass(frozen=True)
class Pending:
    """Gradients that are still to be reduced themselves: partial sums.

    Attributes:
        positions: In the list.
        groups: To reduce over.
        divisor: Of the sums: 1, or the number of ranks where the average is meant.
        device_type: As in `Reduction`.
    """

    positions: tuple[int, ...]
    groups: tuple[dist.ProcessGroup, ...]
    divisor: float
    device_type: str


@dataclass
class Plan:
    """All that clipping one list takes.

    Attributes:
        parts: Of the list, together all of it.
        reductions: In the order in which every rank takes them: small sets first.
        last: The caller's `group`, over which the total is reduced; None without.
        pending: What is to be reduced before.
        mesh: The one mesh of all tensors, if there is.
        dtype: Of the norm that is returned.
        spec: Of that norm as a DTensor, once one was made.
    """

    parts: list[Part] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    last: Reduction | None = None
    pending: list[Pending] = field(default_factory=list)
    mesh: DeviceMesh | None = None
    dtype: torch.dtype = torch.float32
    spec: Any = None


@dataclass
class _Layout:
    """What one tensor's placements say.

    Attributes:
        mesh: Of the tensor; None if it is a plain one.
        sharded: Dimensions of the mesh along which ranks hold different elements.
        partial: Those along which they hold terms of a sum.
        divisor: Of that sum.
    """

    mesh: DeviceMesh | None = None
    sharded: tuple[int, ...] = ()
    partial: tuple[int, ...] = ()
    divisor: float = 1.0


def _layout(spec: Any) -> _Layout:
    if spec is None:
        return _Layout()
    mesh, sharded, partial, divisor = spec.mesh, [], [], 1.0
    for dim, placement in enumerate(spec.placements):
        kind = type(placement).__name__
        size = mesh.size(dim)
        if kind in _SHARDS:
            sharded += [dim] * (size > 1)
        elif kind == "Partial" and placement.reduce_op in _LINEAR:
            if size > 1:
                partial.append(dim)
                divisor *= size if placement.reduce_op == "avg" else 1
        elif kind != "Replicate":
            raise UnknownLayoutError(f"placement {placement}")
    return _Layout(mesh, tuple(sharded), tuple(partial), divisor)


class Planner:
    """Builds the plan of one list."""

    def __init__(
        self,
        function: str,
        items: Sequence[Tensor],
        specs: Sequence[Any],
        *,
        flattened: Sequence[bool],
        group: Ranks | None,
        mesh: DeviceMesh | None,
        all_dims: bool,
    ) -> None:
        """Take the list.

        Args:
            function: The public function, for messages.
            items: Parameters or tensors.
            specs: The DTensorSpec of each, None for plain tensors.
            flattened: Whether each is a shard that FullyShardedDataParallel made; empty if none is.
            group: Ranks that hold further parts.
            mesh: To reduce over, at once and whatever the layouts.
            all_dims: Also reduce over dimensions that hold copies, so that all ranks come to one verdict.
        """
        self._function = function
        self._items, self._flattened = items, flattened
        self._group, self._mesh, self._all_dims = group, mesh, all_dims
        known: dict[int, _Layout] = {}
        for spec in specs:
            if id(spec) not in known:
                known[id(spec)] = _layout(spec)
        self._layouts = [known[id(spec)] for spec in specs]
        self._meshes = list({id(x.mesh): x.mesh for x in self._layouts if x.mesh is not None}.values())

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            UnknownLayoutError: A placement is not one of torch's Shard, Replicate and Partial (sum, avg).
            ValueError: `group` or `mesh` cannot be reduced over, or counts twice.
        """
        plan = Plan(dtype=self._dtype(), pending=self._pending(), mesh=self._one_mesh())
        if self._group is not None and self._mesh is None:
            plan.last = self._reduction_over(self._group)
        if self._mesh is not None:
            whole = self._whole(self._mesh)
            plan.reductions = [whole]
            chosen: list[tuple[int | None, float]] = [
                (0, self._weight_of_all(i, whole)) for i in range(len(self._items))
            ]
        else:
            chosen = self._choose(plan)
        alike: dict[tuple[int | None, float], list[int]] = {}
        for position, (reduction, weight) in enumerate(chosen):
            if is_counted_zero(self._items[position]):
                weight = 0.0
            alike.setdefault((reduction, weight), []).append(position)
        plan.parts = [Part(tuple(at), weight, number) for (number, weight), at in alike.items()]
        return plan

    def _choose(self, plan: Plan) -> list[tuple[int | None, float]]:
        """Fill in the reductions; return which takes each tensor, and its weight."""
        dims = {id(mesh): self._dims_of(mesh) for mesh in self._meshes}
        wanted: dict[Any, Reduction] = {}
        of_mesh: dict[int, Any] = {}
        for mesh in self._meshes:
            if over := dims[id(mesh)]:
                reduction = self._over_dims(mesh, over)
                self._check_apart(reduction, plan.last)
                of_mesh[id(mesh)] = reduction.ranks
                wanted.setdefault(reduction.ranks, reduction)
        main = max(of_mesh.values(), key=len, default=None)
        keys: list[tuple[Any, float]] = []
        for position, (item, layout) in enumerate(zip(self._items, self._layouts, strict=True)):
            key, weight = self._place(position, layout, dims, of_mesh, main, plan.last)
            if (group := marked_group(item)) is not None:
                own = wanted.get(of_mesh.get(id(layout.mesh)))
                weight = weight if layout.mesh is not None else 1.0
                further = self._reduction_over(group)
                ranks = tuple(sorted({*(own.ranks if own else ()), *further.ranks}))
                key = ranks if own is None else ("marked", ranks)
                groups = (*(own.groups if own else ()), *further.groups)
                wanted.setdefault(key, Reduction(ranks, groups, further.device_type))
            keys.append((key, weight))
        order = sorted(wanted, key=lambda key: (len(wanted[key].ranks), wanted[key].ranks, str(key)))
        plan.reductions = [wanted[key] for key in order]
        number = {key: i for i, key in enumerate(order)}
        return [(None if key is None else number[key], weight) for key, weight in keys]

    def _place(
        self,
        position: int,
        layout: _Layout,
        dims: dict[int, tuple[int, ...]],
        of_mesh: dict[int, Any],
        main: tuple[int, ...] | None,
        last: Reduction | None,
    ) -> tuple[Any, float]:
        if layout.mesh is not None:
            copies = [d for d in dims[id(layout.mesh)] if d not in layout.sharded]
            return of_mesh.get(id(layout.mesh)), 1 / math.prod(layout.mesh.size(d) for d in copies)
        if main is not None:
            return main, 1 / len(main)
        if last is not None and any(self._flattened) and not self._flattened[position]:
            return None, 1 / len(last.ranks)
        return None, 1.0

    def _weight_of_all(self, position: int, whole: Reduction) -> float:
        """Return the share of the ranks of `mesh` that hold other elements than this one."""
        layout = self._layouts[position]
        different = 1
        if layout.mesh is not None:
            different = math.prod(layout.mesh.size(d) for d in layout.sharded)
        if (group := marked_group(self._items[position])) is not None:
            different *= len(_ranks_of(group))
        if self._group is not None and (self._flattened[position] if any(self._flattened) else True):
            different *= len(_ranks_of(self._group))
        return different / len(whole.ranks)

    def _dims_of(self, mesh: DeviceMesh) -> tuple[int, ...]:
        if self._all_dims:
            return tuple(d for d in range(mesh.ndim) if mesh.size(d) > 1)
        used = {d for layout in self._layouts if layout.mesh is mesh for d in layout.sharded}
        return tuple(sorted(used))

    def _over_dims(self, mesh: DeviceMesh, dims: tuple[int, ...]) -> Reduction:
        ranks = _ranks_along(mesh, dims)
        if len(dims) == 1:
            return Reduction(ranks, (mesh.get_group(dims[0]),), mesh.device_type)
        spanning = _spanning(mesh, ranks)
        groups = (spanning,) if spanning else tuple(mesh.get_group(d) for d in dims)
        return Reduction(ranks, groups, mesh.device_type)

    def _reduction_over(self, group: Ranks) -> Reduction:
        if isinstance(group, DeviceMesh):
            dims = tuple(d for d in range(group.ndim) if group.size(d) > 1) or (0,)
            return self._over_dims(group, dims)
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{self._function}: group is a {type(group).__name__}; expected a process group or a "
                f"DeviceMesh. For all ranks give torch.distributed.group.WORLD."
            )
        return Reduction(_ranks_of(group), (group,), _device_type_of(group))

    def _whole(self, mesh: DeviceMesh) -> Reduction:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"{self._function}: mesh is a {type(mesh).__name__}; expected a DeviceMesh.")
        whole = self._over_dims(mesh, tuple(range(mesh.ndim)))
        if len(whole.groups) > 1:
            raise ValueError(
                f"{self._function}: no process group has all ranks of mesh={mesh}; expected a mesh of all "
                f"ranks, of one dimension, or one that was flattened. "
                f"Call mesh._flatten() once, on every rank."
            )
        inside = [*self._meshes, *([self._group] if self._group is not None else [])]
        if astray := {rank for ranks in inside for rank in _ranks_of(ranks)} - set(whole.ranks):
            raise ValueError(
                f"{self._function}: rank {min(astray)} holds a part, but is not in mesh={mesh}; expected a "
                f"mesh that has the ranks of every parameter's mesh and of group."
            )
        return whole

    def _check_apart(self, reduction: Reduction, last: Reduction | None) -> None:
        shared = set(reduction.ranks) & set(last.ranks) if last is not None else set()
        if len(shared) > 1:
            raise ValueError(
                f"{self._function}: ranks {sorted(shared)} of group hold shards of the same DTensors, whose "
                f"mesh is reduced over anyhow; expected a group of ranks with further parts, such as the "
                f"other pipeline stages. Leave group out if there are none."
            )

    def _pending(self) -> list[Pending]:
        alike: dict[Any, list[int]] = {}
        for position, layout in enumerate(self._layouts):
            if layout.partial:
                key = (id(layout.mesh), layout.partial, layout.divisor, self._items[position].dtype)
                alike.setdefault(key, []).append(position)
        pending = []
        for (_, dims, divisor, _), positions in alike.items():
            mesh = self._layouts[positions[0]].mesh
            assert mesh is not None  # a plain tensor has no partial dimensions
            over = self._over_dims(mesh, dims)
            pending.append(Pending(tuple(positions), over.groups, divisor, over.device_type))
        return pending

    def _one_mesh(self) -> DeviceMesh | None:
        whole = len(self._meshes) == 1 and all(x.mesh is not None for x in self._layouts)
        return self._meshes[0] if whole else None

    def _dtype(self) -> torch.dtype:
        wide = (torch.float64, torch.complex128)
        counted = (x for x in self._items if x.requires_grad or x.grad_fn is not None or x.grad is None)
        return torch.float64 if any(x.dtype in wide for x in counted) else torch.float32


def _ranks_of(ranks: Ranks) -> tuple[int, ...]:
    if isinstance(ranks, DeviceMesh):
        return tuple(sorted(ranks.mesh.flatten().tolist()))
    return tuple(sorted(dist.get_process_group_ranks(ranks)))


def _ranks_along(mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks that differ from this one in these dimensions of the mesh alone."""
    here = mesh.get_coordinate()
    if here is None:
        raise ValueError(f"fastclip: rank {dist.get_rank()} is not in {mesh}, on which it has a DTensor.")
    index = tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[index].flatten().tolist()))


def _device_type_of(group: dist.ProcessGroup) -> str:
    types = [device.type for device in group._device_types]
    return "cpu" if "cpu" in types or not types else types[0]


def _spanning(mesh: DeviceMesh, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Return a group that exists and has exactly these ranks: that of all, or of a flattened mesh."""
    world = dist.group.WORLD
    types = [device.type for device in world._device_types] if world is not None else []
    if world is not None and mesh.device_type in types and _ranks_of(world) == ranks:
        return world
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    for flat in getattr(root, "_flatten_mapping", {}).values():
        if _ranks_of(flat) == ranks:
            return cast(dist.ProcessGroup, flat.get_group())
    return None
