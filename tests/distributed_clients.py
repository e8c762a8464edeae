"""What each rank runs of real clients: a small model in the ways of torch's libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import full, full_local, layout, mesh_of, norm_of, value, whole
from torch import Tensor, nn

import fastclip


class Small(nn.Module):
    """A transformer's block in small: attention-like projections, a norm layer, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        out: Tensor = self.head(h)
        return out


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 16, (4, 6), generator=generator)
    return x, (x * 3 + 1) % 16


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    out: Tensor = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    return out


STEPS, LIMIT = 20, 0.25


def optimizer_of(kind: str, params: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer
    if kind == "sgd":
        made = torch.optim.SGD(params, 0.3, momentum=0.9)
    elif kind == "fused":
        made = torch.optim.AdamW(params, 0.01, fused=True)
    else:
        made = torch.optim.AdamW(params, 0.01)
    return made


def alone(kind: str) -> tuple[list[float], list[float], list[Tensor]]:
    """Losses, norms and parameters on one process, with a float64 norm and a plain clip."""
    model = small()
    optimizer = optimizer_of(kind, model.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        norm = norm_of([p.grad for p in model.parameters() if p.grad is not None], 2)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(min(1.0, LIMIT / (norm + 1e-6)))
        optimizer.step()
        losses.append(float(loss.detach()))
        norms.append(norm)
    return losses, norms, [p.detach().clone() for p in model.parameters()]


def parallel(way: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in one way of torch's libraries, and what to clip with."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, cpu = small(), torch.device("cpu")
    size = dist.get_world_size()
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model), {}
    if way == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu), {
            "group": dist.group.WORLD
        }
    if way == "fsdp1_flat":
        return FullyShardedDataParallel(model, device_id=cpu), {"group": dist.group.WORLD}
    if way in ("fsdp2", "fsdp2_mixed"):
        policy = (
            MixedPrecisionPolicy(torch.float64, torch.float64)
            if way == "fsdp2_mixed"
            else MixedPrecisionPolicy()
        )
        for layer in (model.up, model.down):
            fully_shard(layer, mp_policy=policy)
        return fully_shard(model, mp_policy=policy), {}
    if way == "hsdp":
        mesh = mesh_of((2, size // 2), ("replicate", "shard"))
        return fully_shard(model, mesh=mesh), {}
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if way == "tp":
        return parallelize_module(model, mesh_of((size,)), plan), {}
    if way == "tp_sp":
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import SequenceParallel

        sequence = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        return parallelize_module(model, mesh_of((size,)), sequence), {}
    if way == "fsdp2_tp":
        mesh = mesh_of((2, size // 2), ("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        return fully_shard(model, mesh=mesh["dp"]), {}
    raise ValueError(way)


def train(way: str, kind: str, how: str) -> dict[str, Any]:
    """Train in one way; losses, norms and parameters beside those of one process."""
    expected_losses, expected_norms, expected = alone(kind)
    model, options = parallel(way)
    inner = optimizer_of(kind, model.parameters())
    optimizer = fastclip.ClippedOptimizer(inner, LIMIT, **options) if how == "wrapper" else inner
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        if how == "function":
            norms.append(value(fastclip.clip_grad_norm_(model.parameters(), LIMIT, **options)))
        optimizer.step()
        if how == "wrapper":
            norms.append(float(optimizer.last.total_norm))  # type: ignore[union-attr]
        losses.append(value(loss.detach()))
    found = None
    if not way.startswith("fsdp1"):
        found = max(
            float((full(p.detach()) - e).abs().max())
            for p, e in zip(model.parameters(), expected, strict=True)
        )
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        "norms": max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True)),
        "parameters": found,
        "route": getattr(optimizer, "route", None),
        "bits": [torch.tensor(norm).numpy().tobytes() for norm in norms],
    }


def piped(schedule: str, how: str) -> tuple[float, list[float], list[float]]:
    """Two stages: the largest error of this one's parameters, the norms it clipped by, and the true ones."""
    from torch.distributed import pipelining

    def halves() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(6, 12), nn.Tanh()), nn.Linear(12, 2)]

    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 2, generator=generator)
    model = nn.Sequential(*halves())
    plain = torch.optim.AdamW(model.parameters(), 0.01)
    true = []
    for _ in range(STEPS):
        plain.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        true.append(norm_of([p.grad for p in model.parameters() if p.grad is not None], 2))
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(min(1.0, LIMIT / (true[-1] + 1e-6)))
        plain.step()

    rank = dist.get_rank()
    own = halves()[rank]
    stage = pipelining.PipelineStage(own, rank, 2, torch.device("cpu"))
    steps = getattr(pipelining, schedule)(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    options = {"group": dist.group.WORLD}
    inner = torch.optim.AdamW(own.parameters(), 0.01)
    optimizer = fastclip.ClippedOptimizer(inner, LIMIT, **options) if how == "wrapper" else inner
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        if rank == 0:
            steps.step(x)
        else:
            steps.step(target=y)
        if how == "function":
            norms.append(float(fastclip.clip_grad_norm_(own.parameters(), LIMIT, **options)))
        optimizer.step()
        if how == "wrapper":
            norms.append(float(optimizer.last.total_norm))  # type: ignore[union-attr]
    pairs = zip(own.parameters(), model[rank].parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs), norms, true


def zero_redundancy() -> float:
    """The largest difference to one process with ZeroRedundancyOptimizer, whose gradients are whole."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    _, _, expected = alone("adamw")
    model = nn.parallel.DistributedDataParallel(small())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        fastclip.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
    pairs = zip(model.parameters(), expected, strict=True)
    return max(float((p.detach() - e).abs().max()) for p, e in pairs)


def routed_experts(seed: int) -> tuple[list[float], list[float]]:
    """Experts that live on one rank each and are not DTensors: norms of a few steps, and the true ones."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Parameter(torch.randn(8, 4, generator=generator))
    experts = [nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(size)]
    own = nn.Parameter(experts[rank].detach().clone())
    fastclip.distributed.shard_over(own, dist.group.WORLD)
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD([dense, own], 0.1), LIMIT)
    norms, true = [], []
    for _ in range(5):
        grads = [torch.randn(p.shape, generator=generator) for p in (dense, *experts)]
        dense.grad, own.grad = grads[0], grads[1 + rank]
        optimizer.step()
        norms.append(float(optimizer.last.total_norm))  # type: ignore[union-attr]
        true.append(norm_of(grads, 2))
    return norms, true


def fsdp1_without_group() -> list[str]:
    """The four ways to ask for a norm of FSDP1's shards without saying whose they are."""
    model, _ = parallel("fsdp1")
    loss_of(model, 0).backward()
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters()), 1.0)
    attached = torch.optim.AdamW(model.parameters())
    fastclip.attach(attached, 1.0)
    said = []
    calls: list[Callable[[], object]] = [
        lambda: fastclip.clip_grad_norm_(model.parameters(), 1.0),
        lambda: fastclip.grad_norms(model.parameters()),
        optimizer.step,
        attached.step,
    ]
    for call in calls:
        try:
            call()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def scaled(bad_rank: int | None) -> tuple[float, list[bool], float]:
    """Three steps under a GradScaler, the second with inf on one rank: scale, skips, error of parameters."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(small())
    optimizer = fastclip.ClippedOptimizer(torch.optim.SGD(model.parameters(), 0.3), LIMIT)
    scaler = fastclip.GradScaler("cpu", init_scale=16.0)
    reference = small()
    plain = torch.optim.SGD(reference.parameters(), 0.3)
    skips = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        bad = bad_rank is not None and step == 1
        if bad and dist.get_rank() == bad_rank:
            full_local(next(model.parameters()).grad).view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        skips.append(bool(optimizer.last.skipped))  # type: ignore[union-attr]
        if not bad:
            plain.zero_grad()
            loss_of(reference, step).backward()
            fastclip.clip_grad_norm_(reference.parameters(), LIMIT)
            plain.step()
    far = max(
        float((full(p.detach()) - q).abs().max())
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )
    return scaler.get_scale(), skips, far


def attached(way: str) -> float:
    """The largest difference to one process after training with hooks."""
    _, _, expected = alone("adamw")
    model, options = parallel(way)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fastclip.attach(optimizer, LIMIT, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return max(
        float((full(p.detach()) - e).abs().max()) for p, e in zip(model.parameters(), expected, strict=True)
    )


def update_bits(way: str, kind: str) -> tuple[bool, list[str]]:
    """Whether the kernels' step over shards gives the bits of the same step with the norm of one process."""
    model, options = parallel(way)
    expected = small()
    inner = optimizer_of(kind, expected.parameters())
    optimizer = fastclip.ClippedOptimizer(optimizer_of(kind, model.parameters()), math.inf, **options)
    reference = fastclip.ClippedOptimizer(inner, math.inf)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            local = full_local(p.data)
            offset = dist.get_rank() * -(-q.shape[0] // dist.get_world_size())
            mine = q.grad[offset : offset + local.shape[0]]
            p.grad = torch.zeros_like(p)
            full_local(p.grad).copy_(mine)
        optimizer.step()
        reference.step()
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    same = all(torch.equal(full(p.detach()), q.detach()) for p, q in pairs)
    return same, [str(optimizer.route), str(reference.route)]


def raised(culprit: int) -> str:
    """What nonfinite="raise" says on this rank."""
    made, _, _ = layout("shard", whole(0, torch.float32))
    if dist.get_rank() == culprit:
        full_local(made[1].grad).view(-1)[0] = math.nan
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(made), 1.0, nonfinite="raise")
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def checkpointed(path: str, save: bool, strategy: str | None) -> dict[str, Any]:
    """Train, save and go on; or load, maybe on other ranks, and go on."""
    import torch.distributed.checkpoint as dcp
    from strategy_cases import STRATEGIES
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(small(0 if save else 1))
    limit = LIMIT if strategy is None else STRATEGIES[strategy]()
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 0.01), limit)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    if save:
        steps(0, 7)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    else:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps(7, 12)
    return {
        "parameters": [full(p.detach()).clone() for p in model.parameters()],
        "steps": optimizer.stats().steps,
    }


def strategies_on_ranks(name: str) -> dict[str, Any]:
    """Train by a strategy over FSDP2's shards, with a nan on one rank, beside one process."""
    from strategy_cases import STRATEGIES

    model, options = parallel("fsdp2")
    expected = small()
    optimizer = fastclip.ClippedOptimizer(
        torch.optim.AdamW(model.parameters(), 0.01), STRATEGIES[name](), **options
    )
    reference = fastclip.ClippedOptimizer(torch.optim.AdamW(expected.parameters(), 0.01), STRATEGIES[name]())
    thresholds, skipped = [], []
    for step in range(12):
        for one, net in ((optimizer, model), (reference, expected)):
            one.zero_grad()
            (loss_of(net, step) * (50.0 if step % 5 == 4 else 1.0)).backward()
        if step == 7:
            next(expected.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
            if dist.get_rank() == 0:
                full_local(next(model.parameters()).grad).view(-1)[0] = math.nan
        optimizer.step()
        reference.step()
        assert optimizer.last is not None
        limit = optimizer.last.threshold
        thresholds.append(None if limit is None else float(limit))
        skipped.append(bool(optimizer.last.skipped))
    far = max(
        float((full(p.detach()) - q.detach()).abs().max())
        for p, q in zip(model.parameters(), expected.parameters(), strict=True)
    )
    return {"far": far, "thresholds": thresholds, "skipped": skipped, "route": optimizer.route}


def monitored(directory: str, way: str, per_parameter: bool) -> dict[str, Any]:
    """Train with a monitor on every rank that writes on one, beside the records of one process."""
    from fastclip.monitor.reading import read

    def records_of(model: nn.Module, options: dict[str, Any], run: str | None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(model.parameters(), 0.01), LIMIT, **options)
        with fastclip.Monitor(
            optimizer,
            run,
            every=3,
            per_parameter=per_parameter,
            update_ratio=per_parameter,
            to=["jsonl", found.extend] if run else [found.extend],
        ) as monitor:
            for step in range(6):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                optimizer.step()
                monitor.step(loss)
        return [record for record in found if record["kind"] == "step"]

    model, options = parallel(way)
    run = str(Path(directory) / "run") if dist.get_rank() == 0 else None
    ours, theirs = records_of(model, options, run), records_of(small(), {}, None)
    return {
        "written": None if run is None else len(read(run)),
        "norms": [(a["norm"], b["norm"]) for a, b in zip(ours, theirs, strict=True)],
        "largest": [(a.get("largest"), b.get("largest")) for a, b in zip(ours, theirs, strict=True)],
        "ratios": [(a.get("update_ratio"), b.get("update_ratio")) for a, b in zip(ours, theirs, strict=True)],
    }
