"""The operations on a list of which other ranks hold further parts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastclip import backends
from fastclip.backends import Backend
from fastclip.backends.base import Elementwise, measures_only
from fastclip.distributed import marks
from fastclip.distributed.marks import Ranks
from fastclip.distributed.payload import LARGEST_P, Encoding, constant
from fastclip.distributed.plan import Part, Plan, Planner, Reduction, UnknownLayoutError
from fastclip.distributed.reading import DTENSOR_MODULE, Found, dtensor_class, find, read, which_flattened
from fastclip.reference import NORM_EPSILON

# Lists that are clipped in turns: of a model or two, in a trainer and an optimizer.
_MAX_PLANS = 8
_plans: list[tuple[Any, Plan]] = []


GIVE_GROUP = (
    "expected group. Give group=torch.distributed.group.WORLD, or the group that the model is sharded over; "
    "or call the model's own clip_grad_norm_."
)


def shards(
    function: str,
    listed: list[Tensor],
    *,
    of_gradients: bool,
    group: Ranks | None = None,
    mesh: DeviceMesh | None = None,
    all_dims: bool = False,
    norm_type: float = 2.0,
    whole_norm: bool = False,
    remedy: str = GIVE_GROUP,
) -> Shards | None:
    """Return a list as what this rank holds of a larger one; None if it is whole here.

    Args:
        function: The public function, for messages.
        listed: Parameters, or the tensors themselves.
        of_gradients: Whether the gradients of the list are meant.
        group: Ranks that hold further parts.
        mesh: To reduce over at once.
        all_dims: Also reduce over copies, so that all ranks of a mesh come to the same verdict.
        norm_type: p, if there is a norm. torch's own operations take DTensors for p <= 0.
        whole_norm: No norm is asked for, so that only DTensors matter.
        remedy: What to do about shards of FullyShardedDataParallel that nothing is known of.

    Raises:
        RuntimeError: Parameters were sharded by FullyShardedDataParallel, and `group` does not say by whom.
        ValueError: `group` or `mesh` makes no sense for this list.
    """
    if backends.is_tracing():
        if group is not None or mesh is not None:
            raise RuntimeError(
                f"{function}: a compiler or a dispatch mode is at work, which sees no collective of group "
                f"and mesh; expected an eager call. Leave the clip out of the compiled function."
            )
        return None
    asked = not whole_norm and (group is not None or mesh is not None or marks.any_marked(listed))
    has_dtensor, has_flattened = find(listed)
    flattened = which_flattened(listed) if has_flattened else []
    if not whole_norm and group is None and mesh is None and any(flattened) and dist.get_world_size() > 1:
        raise _unknown_holders(function, flattened.index(True), remedy)
    if not (asked or has_dtensor):
        return None
    if not norm_type > 0:
        if group is not None or mesh is not None:
            raise ValueError(f"{function}: norm_type={norm_type} over several ranks; expected p > 0 or inf.")
        return None
    dtensor = dtensor_class()
    found = read(listed, of_gradients, dtensor)
    if not asked and len(found.plain) == len(listed):
        return None
    # Meshes of one process group after another are equal, and their groups are not.
    options = (group, mesh, all_dims, dist.group.WORLD if dist.is_initialized() else None)
    try:
        plan = _planned(function, listed, found, flattened, options)
    except UnknownLayoutError:
        if group is not None or mesh is not None:
            raise
        return None
    return Shards(listed, found, plan, dtensor)


def _unknown_holders(function: str, position: int, remedy: str) -> RuntimeError:
    return RuntimeError(
        f"{function}: parameter {position} is a shard of FullyShardedDataParallel, which does not say who "
        f"holds the others, so that each rank would have a norm of its own; {remedy}"
    )


def _planned(
    function: str, listed: list[Tensor], found: Found, flattened: list[bool], options: tuple[Any, ...]
) -> Plan:
    """Return the plan for these layouts, at once if it is a recent one's."""
    # Marks belong to parameters and not to layouts.
    identities = [id(x) for x in listed] if marks.any_marked(listed) else []
    specs = found.specs
    # A spec says of which dtype its tensors are.
    plain = [item.dtype for item in found.plain]
    key = (specs, identities, flattened, plain, *options)
    for position, (known, plan) in enumerate(_plans):
        if len(known[0]) == len(specs) and _same(known, key):
            if position:
                _plans.insert(0, _plans.pop(position))
            return plan
    group, mesh, all_dims, _ = options
    planner = Planner(function, listed, specs, flattened=flattened, group=group, mesh=mesh, all_dims=all_dims)
    plan = planner.plan()
    if not identities:  # a mark may be set anew
        _plans.insert(0, (key, plan))
        del _plans[_MAX_PLANS:]
    return plan


def _same(known: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    # Lists compare what is identical without a call: the layouts of a model are the same objects every step.
    return known[4:] == key[4:] and known[1:4] == key[1:4] and known[0] == key[0]


class Shards:
    """A list of which this rank holds a part, with the operations of `backends` on the whole.

    Norms are the same bits on all ranks that reduce together.
    """

    def __init__(
        self,
        listed: list[Tensor],
        found: Found,
        plan: Plan,
        dtensor: type[Tensor] | None,
    ) -> None:
        """Take the list, what it has on this rank, and the plan.

        Attributes:
            plan: Who reduces what with whom.
            dtensor: The class, if anybody has loaded it.
            locals: The memory on this rank of each, None without a gradient.
        """
        self._listed, self._values, self.plan, self.dtensor = listed, found.values, plan, dtensor
        self.locals: list[Tensor | None] = found.memory
        self._complete = found.arrived
        if not found.arrived:
            # What is on its way is of a class of torch's own, which can be waited for.
            self.locals = [x.wait() if hasattr(x, "wait") else x for x in found.memory]
        self._payloads: list[tuple[Reduction, Encoding, Tensor]] = []
        self._whole: dict[int, Tensor] | None = None

    def present(self) -> list[Tensor]:
        """Return the memory on this rank of all that there is."""
        return [local for local in self.locals if local is not None]

    def local_of(self) -> dict[Tensor, Tensor]:
        """Return the memory on this rank by what holds it."""
        pairs = zip(self._listed, self.locals, strict=True)
        return {item: local for item, local in pairs if local is not None}

    def total_norm(
        self, norm_type: float, found: Tensor | None = None, foreach: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of the whole, float64, and how often something was `found`; both plain and 0-dim.

        One collective for each reduction of the plan, and two for 4 < p < inf.
        """
        reduced = self._reduced()
        norms, weights, numbers = self._measured(reduced, norm_type, foreach)
        if norm_type > LARGEST_P and math.isfinite(norm_type):
            largest, count = self._combine(Encoding.of(math.inf), norms, weights, numbers, found)
            divisor = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
            scaled = (norms / divisor.to(norms.device)) ** norm_type
            total, _ = self._combine(Encoding.of(1.0), scaled, weights, numbers, None)
            return total ** (1 / norm_type) * divisor, count
        return self._combine(Encoding.of(norm_type), norms, weights, numbers, found)

    def returned(self, norm: Tensor) -> Tensor:
        """Return a norm as callers get it: a DTensor if all tensors are, of one mesh."""
        plain = norm.to(self._device(), self.plan.dtype)
        if self.plan.mesh is None or self.dtensor is None:
            return plain
        if self.plan.spec is not None:
            make: Any = self.dtensor
            again: Tensor = make(plain, self.plan.spec, requires_grad=False)
            return again
        placements = [_replicate()] * self.plan.mesh.ndim
        wrapped: Any = self.dtensor.from_local(plain, self.plan.mesh, placements, run_check=False)  # type: ignore[attr-defined]
        self.plan.spec = wrapped._spec
        result: Tensor = wrapped
        return result

    def scale(self, max_norm: float | Tensor, norm: Tensor, foreach: bool | None = None) -> None:
        """Multiply what this rank holds by min(1, max_norm / (norm + 1e-6))."""
        on_host = not isinstance(max_norm, Tensor) or max_norm.device.type == "cpu"
        if on_host and norm.device.type == "cpu" and float(norm) + NORM_EPSILON <= float(max_norm):
            return
        if (holders := self._holders()) and not measures_only(max_norm):
            norm = norm.to(holders[0].grad.device)
            self._write(Backend.clip_grads_with_norm_, holders, max_norm, norm, foreach=foreach)

    def multiply(self, coefs: Tensor) -> None:
        """Multiply what this rank holds by one coefficient, or each that is there by its own; 1-dim."""
        if holders := self._holders():
            self._write(Backend.scale_grads_, holders, coefs.to(holders[0].grad.device))

    def _write(
        self, operation: Callable[..., Any], holders: list[Any], *args: Any, foreach: bool | None = None
    ) -> None:
        before = [holder.grad._version for holder in holders]
        backends.run_foreach(foreach, operation, holders, *args)
        self._tell_autograd(holders, before)

    def elementwise(self, operation: Elementwise, value: float | Tensor, foreach: bool | None = None) -> None:
        """Change every element by itself; partial sums are reduced for it."""
        reduced = self._reduced()
        self._whole = None  # they are about to change
        holders = self._holders(reduced)
        if not holders:
            return
        before = [holder.grad._version for holder in holders]
        backends.run_foreach(foreach, Backend.elementwise_, holders, operation, value)
        for pending in self.plan.pending:
            # Still a sum over ranks: that of the first holds all of it, and the others nothing.
            first = all(dist.get_rank(group) == 0 for group in pending.groups)
            for position in pending.positions:
                if (local := self.locals[position]) is not None:
                    with torch.no_grad():
                        local.copy_(reduced[position] * (pending.divisor if first else 0.0))
        self._tell_autograd(holders, before)

    def norms(self, norm_type: float) -> Tensor:
        """Return the norm of each that is there, over all ranks, 1-dim; one collective for each reduction."""
        reduced = self._reduced()
        places = [i for i, local in enumerate(self.locals) if local is not None]
        present = set(places)
        of_part = {position: part for part in self.plan.parts for position in part.positions}
        counted = [i for i in range(len(self.locals)) if of_part[i].reduction is not None or i in present]
        row = {position: number for number, position in enumerate(counted)}
        found = torch.zeros(len(counted), dtype=torch.float64, device=self._device())
        if places:
            holders: list[Any] = [_Holder(reduced.get(i, self.locals[i])) for i in places]
            local = backends.run(Backend.grad_norms, holders, norm_type, torch.float64)
            found[[row[i] for i in places]] = local
        largest = found.clone()
        # Not over `last`: single tensors are not spread over stages.
        spread = [
            (reduction, [number for number, i in enumerate(counted) if of_part[i].reduction == index])
            for index, reduction in enumerate(self.plan.reductions)
        ]
        for reduction, numbers in spread:
            if numbers:
                part = largest[numbers]
                largest[numbers] = self._all_reduce(part, reduction, dist.ReduceOp.MAX, keep_nan=True)
        if math.isinf(norm_type):
            return largest[[row[i] for i in places]].to(self.plan.dtype)
        divisor = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        weights = found.new_tensor([of_part[i].weight or 1.0 for i in counted])
        sums = (found / divisor) ** norm_type * weights
        for reduction, numbers in spread:
            if numbers:
                sums[numbers] = self._all_reduce(sums[numbers], reduction, dist.ReduceOp.SUM)
        return (sums ** (1 / norm_type) * divisor)[[row[i] for i in places]].to(self.plan.dtype)

    def nonfinite(self, found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return what all ranks of the reductions in which something is not finite found, rank by rank.

        Collective: for after a norm that was not finite on every one of these ranks.
        """
        entries = {(dist.get_rank(), *entry) for entry in found}
        for reduction, encoding, payload in self._payloads:
            if bool(encoding.decode(payload).isfinite()):
                continue
            for group in reduction.groups:
                gathered: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(gathered, entries, group=group)
                entries = set().union(*gathered)
        return sorted(entries)

    def for_update(self) -> dict[Tensor, Tensor]:
        """Return, by parameter, what to update it with where that is not the memory of its gradient.

        That is the whole value of terms of a sum, and of a gradient that every rank has the shard that the
        parameter has; no rank needs another for it.
        """
        instead = {self._listed[position]: value for position, value in self._reduced().items()}
        pairs: list[tuple[Any, Any]] = list(zip(self._listed, self._values, strict=True))
        for item, value in pairs:
            kind: Any = type(value)
            if kind is not self.dtensor or item in instead:
                continue
            held, wanted = value._spec, item._spec
            if held is wanted or held.placements == wanted.placements or held.mesh != wanted.mesh:
                continue
            placements = zip(held.placements, wanted.placements, strict=True)
            if all(had.is_replicate() or had == want for had, want in placements):
                instead[item] = value.redistribute(placements=wanted.placements).to_local()
        return instead

    def _reduced(self) -> dict[int, Tensor]:
        """Return, by position, whole values in the place of partial sums; the gradients stay as they are."""
        if self._whole is not None:
            return self._whole
        reduced: dict[int, Tensor] = {}
        for pending in self.plan.pending:
            here = [(i, self.locals[i]) for i in pending.positions]
            there = [(i, local) for i, local in here if local is not None]
            if not there:
                continue
            flat = torch.cat([local.detach().reshape(-1) for _, local in there])
            flat = _on(flat, pending.device_type, pending.groups)
            for group in pending.groups:
                dist.all_reduce(flat, group=group)
            if pending.divisor != 1:
                flat /= pending.divisor
            flat = flat.to(there[0][1].device)
            pieces = torch.split(flat, [local.numel() for _, local in there])
            for (position, local), piece in zip(there, pieces, strict=True):
                reduced[position] = piece.view(local.shape)
        self._whole = reduced
        return reduced

    def _measured(
        self, reduced: dict[int, Tensor], norm_type: float, foreach: bool | None
    ) -> tuple[Tensor, Tensor, list[int | None]]:
        """Return norm, weight and reduction of each part, the norms not yet over other ranks."""
        norms, weights, numbers = [], [], []
        for part in self.plan.parts:
            there = self._there(part, reduced)
            if math.isinf(norm_type):  # of which an empty shard has none
                there = [x for x in there if x.numel()]
            numbers.append(part.reduction)
            weights.append(part.weight)
            if there:
                norm = backends.run_foreach(foreach, Backend.total_norm, there, norm_type, torch.float64)
                norms.append(norm.to(self._device()))
            else:
                norms.append(torch.zeros((), dtype=torch.float64, device=self._device()))
        if not norms:
            nothing = torch.zeros(0, dtype=torch.float64, device=self._device())
            return nothing, nothing, []
        measured = torch.stack(norms)
        return measured, constant(tuple(weights), torch.float64, measured.device), numbers

    def _there(self, part: Part, reduced: dict[int, Tensor]) -> list[Tensor]:
        """Return the memory on this rank of one part."""
        local: Sequence[Any] = self.locals
        if not reduced and self._complete and len(part.positions) == len(local):
            return list(local)
        if reduced or len(part.positions) < len(local):
            local = [reduced.get(i, self.locals[i]) for i in part.positions]
        return [x for x in local if x is not None]

    def _combine(
        self,
        encoding: Encoding,
        norms: Tensor,
        weights: Tensor,
        numbers: list[int | None],
        found: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return norm and count of all parts, from those of this rank."""
        # One reduction of all parts, as nearly every model has, is not to be taken apart.
        if len(self.plan.reductions) == 1 and self.plan.last is None and None not in numbers:
            payload = encoding.encode(norms, weights, found)
            payload = self._all_reduce(payload, self.plan.reductions[0], encoding.op)
            self._payloads = [(self.plan.reductions[0], encoding, payload)]
            return encoding.decode(payload), payload[-1]
        self._payloads = []
        alone = _rows(numbers, None, norms.device)
        payloads = [
            encoding.encode(norms[alone], weights[alone], found if not self.plan.reductions else None)
        ]
        flags: list[Tensor] = []
        for number, reduction in enumerate(self.plan.reductions):
            rows = _rows(numbers, number, norms.device)
            payload = encoding.encode(norms[rows], weights[rows], None if flags else found)
            # What is not finite in a smaller set is news to the larger one.
            payload = encoding.merge([payload, *flags])
            payload = self._all_reduce(payload, reduction, encoding.op)
            self._payloads.append((reduction, encoding, payload))
            payloads.append(payload)
            flags = [encoding.flags_of(payload)]
        total = payloads[0] if len(payloads) == 1 else encoding.merge(payloads)
        if self.plan.last is not None:
            total = self._all_reduce(total, self.plan.last, encoding.op)
            self._payloads.append((self.plan.last, encoding, total))
        return encoding.decode(total), total[-1]

    def _all_reduce(
        self, payload: Tensor, reduction: Reduction, op: Any, *, keep_nan: bool = False
    ) -> Tensor:
        home = payload.device
        if keep_nan:  # which MAX may drop
            payload = torch.stack((payload.nan_to_num(0.0, math.inf), payload.isnan().to(payload.dtype)))
        payload = _on(payload, reduction.device_type, reduction.groups)
        for group in reduction.groups:
            dist.all_reduce(payload, op, group)
        payload = payload.to(home)
        return torch.where(payload[1] > 0, math.nan, payload[0]) if keep_nan else payload

    def _device(self) -> torch.device:
        first = next((local for local in self.locals if local is not None), None)
        if first is not None:
            return first.device
        return self._listed[0].device if self._listed else torch.device("cpu")

    def _holders(self, instead: dict[int, Tensor] | None = None) -> list[Any]:
        return [
            _Holder((instead or {}).get(i, local)) for i, local in enumerate(self.locals) if local is not None
        ]

    def _tell_autograd(self, holders: list[Any], before: list[int]) -> None:
        """Raise the version of each DTensor whose memory has changed."""
        wholes = [value for value in self._values if value is not None]
        changed = [
            whole
            for whole, holder, version in zip(wholes, holders, before, strict=True)
            if type(whole) is self.dtensor and holder.grad._version != version
        ]
        if changed:
            torch.autograd.graph.increment_version(changed)


def _rows(numbers: list[int | None], wanted: int | None, device: torch.device) -> Tensor:
    """Return the places of the parts of one reduction, as an index on the device."""
    return constant(tuple(i for i, own in enumerate(numbers) if own == wanted), torch.int64, device)


class _Holder:
    """Stands for a parameter: the operations of `backends` look for `.grad` and no more."""

    __slots__ = ("grad",)

    def __init__(self, grad: Tensor | None) -> None:
        self.grad = grad


def _replicate() -> Any:
    return sys.modules[DTENSOR_MODULE].Replicate()


def _on(tensor: Tensor, device_type: str, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Return a tensor where these groups take it: of gradients on the CPU, only this hops to the device."""
    takes = all(tensor.device.type in [d.type for d in group._device_types] for group in groups)
    if takes or tensor.device.type == device_type:
        return tensor
    index = torch.get_device_module(device_type).current_device() if device_type != "cpu" else None
    return tensor.to(torch.device(device_type, index) if index is not None else device_type)
