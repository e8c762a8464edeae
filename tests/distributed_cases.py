"""What each rank runs on tensors: layouts with their float64 oracle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fastclip


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh, made once: every one makes process groups, which stay."""
    return torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


SHAPES = ((6, 5), (7, 3), (4,), (1, 2), (9, 4))


def whole(seed: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """The gradients of all ranks together, the same on each."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in SHAPES]


def norm_of(tensors: list[Tensor], p: float) -> float:
    """The oracle: float64, scaled so that no power leaves its range."""
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    largest = flat.abs().max()
    if largest == 0 or not largest.isfinite():
        return float(torch.linalg.vector_norm(flat, p))
    return float(torch.linalg.vector_norm(flat / largest, p) * largest)


def parameter(grad: Tensor) -> nn.Parameter:
    """A parameter with this gradient, of its kind."""
    made = nn.Parameter(torch.zeros_like(grad))
    made.grad = grad
    return made


def placed(tensors: list[Tensor], mesh: DeviceMesh, placements: list[Any]) -> list[nn.Parameter]:
    from torch.distributed.tensor import distribute_tensor

    return [parameter(distribute_tensor(t, mesh, placements)) for t in tensors]


def partial(tensors: list[Tensor], mesh: DeviceMesh, op: str) -> list[nn.Parameter]:
    """Terms of a sum, whose local values are not those of the whole."""
    from torch.distributed.tensor import DTensor, Partial

    rank, size = dist.get_rank(), dist.get_world_size()
    share = (rank + 1) / (size * (size + 1) / 2) * (size if op == "avg" else 1)
    made = []
    for t in tensors:
        zeros = DTensor.from_local(torch.zeros_like(t), mesh, [Partial(op)], run_check=False)
        made.append(nn.Parameter(zeros))
        made[-1].grad = DTensor.from_local(t * share, mesh, [Partial(op)], run_check=False)
    return made


def layout(name: str, tensors: list[Tensor]) -> tuple[list[nn.Parameter], dict[str, Any], int]:
    """Parameters that have these as the whole gradients; what to call with; collectives of a clip."""
    from torch.distributed.tensor import Replicate, Shard

    size, rank = dist.get_world_size(), dist.get_rank()
    line = mesh_of((size,))
    if name == "shard":
        return placed(tensors, line, [Shard(0)]), {}, 1
    if name == "replicate":
        return placed(tensors, line, [Replicate()]), {}, 0
    if name == "mixed":
        some = placed(tensors[:2], line, [Shard(0)]) + placed(tensors[2:3], line, [Replicate()])
        return [*some, *map(parameter, tensors[3:])], {}, 1
    if name.startswith("partial"):
        op = name.removeprefix("partial_")
        return [*placed(tensors[:2], line, [Shard(0)]), *partial(tensors[2:], line, op)], {}, 2
    if name in ("stages", "stages_mesh", "empty_stage"):
        cut = 0 if name == "empty_stage" else 2
        own = tensors[:cut] if rank == 0 else tensors[cut:] if rank == 1 else []
        options: dict[str, Any] = {"group": dist.group.WORLD}
        if name == "stages_mesh":
            options["mesh"] = line
        return list(map(parameter, own)), options, 1
    if name == "local_experts":
        own = [tensors[i] for i in range(len(tensors)) if i % size == rank]
        made = list(map(parameter, own))
        fastclip.distributed.shard_over(made, dist.group.WORLD)
        return made, {}, 1
    square = mesh_of((2, size // 2), ("a", "b"))
    if name == "hsdp":
        return placed(tensors, square, [Replicate(), Shard(0)]), {}, 1
    if name == "two_dims":
        return placed(tensors, square, [Shard(0), Shard(0)]), {}, 1
    if name == "two_dims_part":
        both = placed(tensors[:3], square, [Shard(0), Shard(0)])
        return both + placed(tensors[3:], square["a"], [Shard(0)]), {}, 2
    if name == "two_dims_mesh":
        both = placed(tensors[:3], square, [Shard(0), Shard(0)])
        return both + placed(tensors[3:], square["a"], [Shard(0)]), {"mesh": square}, 1
    if name == "experts":
        dense = placed(tensors[:3], line, [Shard(0)])
        return dense + placed(tensors[3:], square, [Shard(0), Shard(0)]), {}, 1
    if name == "pipeline_of_shards":
        own = tensors[:2] if square.get_coordinate()[0] == 0 else tensors[2:]  # type: ignore[index]
        return placed(own, square["b"], [Shard(0)]), {"group": square["a"]}, 2
    raise ValueError(name)


ON_TWO = (
    *("shard", "replicate", "mixed", "partial_sum", "partial_avg"),
    *("stages", "stages_mesh", "empty_stage", "local_experts"),
)
ON_FOUR = (
    *("hsdp", "two_dims", "two_dims_part", "two_dims_mesh", "experts", "pipeline_of_shards"),
    *("shard", "mixed", "partial_sum", "local_experts"),
)


class Collectives:
    """Counts all-reduces and the bytes of the largest but those of partial sums."""

    def __enter__(self) -> Collectives:
        self.count, self.sizes = 0, []
        self._own = dist.all_reduce

        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.sizes.append(tensor.numel() * tensor.element_size())
            return self._own(tensor, *args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce = self._own


def value(norm: Any) -> float:
    """A norm as a number, with no collective: on every rank it is all there."""
    return float(norm.to_local() if hasattr(norm, "to_local") else norm)


def full(grad: Any) -> Tensor:
    gathered: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return gathered


def measure(name: str, p: float, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    """Norm and clip of one layout beside the oracle."""
    tensors = whole(0, dtype, scale)
    made, options, expected = layout(name, tensors)
    true = norm_of(tensors, p)
    before = [full_local(x.grad).clone() for x in made]
    with Collectives() as seen:
        idle = fastclip.clip_grad_norm_(made, 2 * true, p, **options)
    kept = all(torch.equal(full_local(x.grad), b) for x, b in zip(made, before, strict=True))
    limit = true / 4
    norm = fastclip.clip_grad_norm_(made, limit, p, **options)
    after = fastclip.clip_grad_norm_(made, math.inf, p, **options)
    alone = fastclip.get_total_norm([x.grad for x in made], p, **options) if "experts" not in name else after
    return {
        "true": true,
        "norm": value(norm),
        "idle": value(idle),
        "after": value(after) / limit,
        "alone": value(alone) / limit,
        "kept": kept,
        "collectives": seen.count,
        "expected": expected,
        "largest": max(seen.sizes[-1:], default=0),
        "type": type(norm).__name__,
    }


def only_measured(name: str, p: float, scale: float) -> tuple[float, float, int]:
    """Norm, oracle and collectives without a clip, which the 1e-6 in it makes of little use for the tiny."""
    tensors = whole(0, torch.float32, scale)
    made, options, _ = layout(name, tensors)
    with Collectives() as seen:
        norm = fastclip.clip_grad_norm_(made, math.inf, p, **options)
    return value(norm), norm_of(tensors, p), seen.count


def same_bits(name: str, trials: int) -> list[bytes]:
    """Norms of many lists, as bits."""
    found = []
    for seed in range(trials):
        made, options, _ = layout(name, whole(seed, torch.float32))
        norm = value(fastclip.clip_grad_norm_(made, 1.0, **options))
        found.append(torch.tensor(norm, dtype=torch.float64).numpy().tobytes())
    return found


def without_gradients(name: str) -> tuple[float, float]:
    """Rank 1 has no gradients at all, so its shards count nothing: the norm of the rest, and what is true."""
    tensors = whole(0, torch.float32)
    made, options, _ = layout(name, tensors)
    local = [full_local(x.grad) for x in made]
    if dist.get_rank() == 1:
        for x in made:
            x.grad = None
        local = []
    square = torch.tensor(sum(float(t.double().square().sum()) for t in local), dtype=torch.float64)
    dist.all_reduce(square)
    return value(fastclip.clip_grad_norm_(made, 1.0, **options)), math.sqrt(float(square))


def full_local(grad: Any) -> Tensor:
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad
    return local


def poisoned(name: str, bad: float, culprit: int, p: float) -> dict[str, Any]:
    """One element on one rank is not finite: what everybody says and does."""
    made, options, _ = layout(name, whole(0, torch.float32))
    if dist.get_rank() == culprit:
        local = next(x for x in (full_local(m.grad) for m in made) if x.numel())
        local.view(-1)[0] = bad
    before = [full_local(x.grad).clone() for x in made]
    try:
        fastclip.clip_grad_norm_(made, 1.0, p, error_if_nonfinite=True, **options)
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    kept = all(
        torch.equal(full_local(x.grad).nan_to_num(7.0), b.nan_to_num(7.0))
        for x, b in zip(made, before, strict=True)
    )
    norm = value(fastclip.clip_grad_norm_(made, math.inf, p, **options))
    for x in made:
        x.data.zero_()
    optimizer = fastclip.ClippedOptimizer(
        torch.optim.AdamW(made, 0.1) if made else torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
        1.0,
        norm_type=p,
        **options,
    )
    optimizer.step()
    assert optimizer.last is not None
    still = all(bool((full_local(x.data) == 0).all()) for x in made)
    return {
        "said": said,
        "kept": kept,
        "norm": norm,
        "skipped": bool(optimizer.last.skipped),
        "still": still,
        "state": len(optimizer.state),
    }


def values_clipped(name: str) -> bool:
    tensors = whole(0, torch.float32)
    made, _, _ = layout(name, tensors)
    fastclip.clip_grad_value_(made, 0.3)
    return all(
        torch.allclose(full(x.grad), t.clamp(-0.3, 0.3), rtol=1e-6, atol=1e-7)
        for x, t in zip(made, tensors, strict=True)
    )


def norms_of_each(name: str, p: float) -> tuple[list[float], list[float]]:
    tensors = whole(0, torch.float32)
    made, options, _ = layout(name, tensors)
    options.pop("group", None)
    norms = fastclip.grad_norms(made, p, **options)
    return norms.tolist(), [norm_of([t], p) for t in tensors]


def nonfinite_everywhere() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two nan on rank 1's shard and one inf in a copy of every rank."""
    made, _, _ = layout("mixed", whole(0, torch.float32))
    if dist.get_rank() == 1:
        full_local(made[0].grad).view(-1)[:2] = math.nan
    full_local(made[2].grad).view(-1)[0] = math.inf
    named = [(f"layer{i}", x) for i, x in enumerate(made)]
    return fastclip.find_nonfinite(named), fastclip.find_nonfinite(named, group=dist.group.WORLD)


def version_rises() -> tuple[bool, bool]:
    made, _, _ = layout("shard", whole(0, torch.float32))
    before = made[0].grad._version  # type: ignore[union-attr]
    fastclip.clip_grad_norm_(made, 1e9)
    idle = made[0].grad._version == before  # type: ignore[union-attr]
    fastclip.clip_grad_norm_(made, 1e-3)
    return idle, made[0].grad._version > before  # type: ignore[union-attr]


def counted_zero() -> tuple[float, float]:
    """Both stages hold the tied weight, and one says that it is counted on the other."""
    tensors = whole(0, torch.float32)
    own = [tensors[0], *(tensors[1:3] if dist.get_rank() == 0 else tensors[3:])]
    made = list(map(parameter, own))
    if dist.get_rank() == 1:
        fastclip.distributed.count_zero(made[0])
    return value(fastclip.clip_grad_norm_(made, math.inf, group=dist.group.WORLD)), norm_of(tensors, 2)


def patched() -> tuple[float, float]:
    tensors = whole(0, torch.float32)
    made, options, _ = layout("stages", tensors)
    with fastclip.patch_torch(**options):
        return float(nn.utils.clip_grad_norm_(made, math.inf)), norm_of(tensors, 2)


def refusals() -> list[str]:
    """What is said to calls that make no sense."""
    made, _, _ = layout("shard", whole(0, torch.float32))
    calls: list[Callable[[], object]] = [
        lambda: fastclip.clip_grad_norm_(made, 1.0, group=dist.group.WORLD),
        lambda: fastclip.clip_grad_norm_(made, 1.0, group=3),  # type: ignore[arg-type]
        lambda: fastclip.clip_grad_norm_(made, 1.0, mesh=dist.group.WORLD),  # type: ignore[arg-type]
        lambda: fastclip.clip_grad_norm_(made, 1.0, -1.0, mesh=made[0].grad.device_mesh),  # type: ignore[union-attr]
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (ValueError, TypeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def constants_made(name: str) -> int:
    """How many numbers a second clip of the same layouts copies anew."""
    made, options, _ = layout(name, whole(0, torch.float32))
    fastclip.clip_grad_norm_(made, 1e9, **options)
    calls = []
    tensor = torch.tensor

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return tensor(*args, **kwargs)

    torch.tensor = noting  # type: ignore[assignment]
    try:
        fastclip.clip_grad_norm_(made, 1e9, **options)
    finally:
        torch.tensor = tensor
    return len(calls)
