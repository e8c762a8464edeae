"""Clip and optimizer step together: fastclip's folded one beside torch's clip and torch's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastclip
from fastclip import reference
from fastclip.bench.bandwidth import Bandwidth, Memory
from fastclip.bench.cases import Clipping, Traffic
from fastclip.bench.check import CheckError
from fastclip.bench.environment import environment
from fastclip.bench.isolation import Apply, here
from fastclip.bench.models import SEED, WORKLOADS, Workload, gradients
from fastclip.bench.results import Results, Row
from fastclip.bench.runner import Progress, silent, torch_threads
from fastclip.bench.timing import Call, interleave

STEP_MODES = ("inactive", "active")
SUBJECT, FUSED, DEFAULT = "fastclip", "torch_fused", "torch_default"

LR = 1e-3
WEIGHT_DECAY = 0.01
MOMENTUM = 0.9
NUM_CHECKED = 1 << 18
"""Elements of each tensor that are compared with float64: more would cost copies of all of GPT-2."""

# Roundings of float32 on the path of a first step; see tests/optim_oracle.py for each.
CHECK_ROUNDINGS = 32


@dataclass(frozen=True)
class StepKind:
    """One optimizer.

    Attributes:
        name: Key of STEP_KINDS.
        make: (parameters, fused) -> the optimizer.
        first_update: (parameter, clipped gradient), both float64 -> the parameter after the first step.
        passes: How many times the update reads or writes as many bytes as the gradients have.
    """

    name: str
    make: Callable[[list[Parameter], bool | None], Optimizer]
    first_update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    passes: int

    def traffic(self, workload: Workload) -> Traffic:
        """Return the byte model: the gradients once for the norm, and what the update moves."""
        nbytes = workload.numel * torch.float32.itemsize
        return Traffic(nbytes, self.passes * nbytes)


def _adamw(parameters: list[Parameter], fused: bool | None) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)


def _sgd(parameters: list[Parameter], fused: bool | None) -> Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, fused=fused)


STEP_KINDS = {
    kind.name: kind
    for kind in (
        # Parameter and two moments are read and written, the gradient is read.
        StepKind("adamw", _adamw, lambda p, g: p * (1 - LR * WEIGHT_DECAY) - LR * g / (g.abs() + 1e-8), 7),
        # Parameter and momentum are read and written, the gradient is read.
        StepKind("sgd-momentum", _sgd, lambda p, g: p - LR * g, 5),
    )
}


@dataclass(frozen=True)
class StepOptions:
    """What to run.

    Attributes:
        models: Keys of WORKLOADS.
        optimizers: Keys of STEP_KINDS.
        threads: For torch and for fastclip alike.
        time_budget_s: Seconds of timing per row; one with slow calls takes longer.
        seed: Of the gradients.
    """

    models: tuple[str, ...] = ("gpt2", "resnet50", "tiny")
    optimizers: tuple[str, ...] = tuple(STEP_KINDS)
    threads: int = field(default_factory=torch.get_num_threads)
    time_budget_s: float = 2.5
    seed: int = SEED


def run_steps(options: StepOptions, *, progress: Progress = silent, apply: Apply = here) -> Results:
    """Check and time every optimizer on every model, clipping inactive and active, in float32.

    Args:
        options: What to run.
        progress: Shows the items that it passes on.
        apply: Where each optimizer on each model is timed, see isolation.py.

    Raises:
        CheckError: fastclip's step is wrong somewhere; what comes after it has not been timed.
    """
    with torch_threads(options.threads):
        bandwidth = Memory().measure(budget_s=options.time_budget_s)
    kinds = [(model, optimizer) for model in options.models for optimizer in options.optimizers]
    timed = (row for kind in kinds for row in apply(_time_modes, options, *kind, bandwidth.fastest))
    rows = list(progress(timed, len(kinds) * len(STEP_MODES), "steps"))
    return Results(environment(), asdict(options), bandwidth, rows)


def _time_modes(options: StepOptions, model: str, optimizer: str, streams: tuple[str, str]) -> list[Row]:
    workload, kind = WORKLOADS[model], STEP_KINDS[optimizer]
    with torch_threads(options.threads):
        error = check_first_step(workload, kind, seed=options.seed)
        memory = Memory()
        rows = []
        for mode in STEP_MODES:
            bandwidth = memory.measure(budget_s=options.time_budget_s / 5, only=streams)
            rows.append(_row(workload, kind, mode, error, options, bandwidth))
        return rows


def _row(
    workload: Workload, kind: StepKind, mode: str, error: float, options: StepOptions, bandwidth: Bandwidth
) -> Row:
    parameters = _parameters(workload, options.seed)
    total_norm = float(fastclip.get_total_norm(gradients(parameters)))
    clipping = Clipping(parameters, mode, total_norm)
    clipped = fastclip.ClippedOptimizer(kind.make(parameters, None), total_norm, fused=True)

    def next_threshold() -> None:
        clipping.next_threshold()
        clipped.max_norm = clipping.max_norm

    measurements = interleave(
        {
            SUBJECT: clipped.step,
            FUSED: _torch_call(clipping, kind.make(parameters, True)),
            DEFAULT: _torch_call(clipping, kind.make(parameters, None)),
        },
        before=next_threshold,
        budget_s=options.time_budget_s,
    )
    traffic = kind.traffic(workload)
    return Row(
        model=workload.name,
        title=workload.title,
        dtype="float32",
        mode=f"{kind.name} {mode}",
        num_tensors=workload.num_tensors,
        numel=workload.numel,
        traffic=traffic,
        read_gbps=bandwidth.read_gbps,
        update_gbps=bandwidth.update_gbps,
        floor_ms=bandwidth.floor_ms(traffic),
        measurements=measurements,
        relative_errors={SUBJECT: error},
    )


def _torch_call(clipping: Clipping, optimizer: Optimizer) -> Call:
    def call() -> None:
        torch.nn.utils.clip_grad_norm_(clipping.parameters, clipping.max_norm)
        optimizer.step()

    return call


def _parameters(workload: Workload, seed: int) -> list[Parameter]:
    parameters = workload.parameters(torch.float32, seed=seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(generator=generator)
    return parameters


def check_first_step(workload: Workload, kind: StepKind, *, seed: int = SEED) -> float:
    """Compare fastclip's first clipped step with float64.

    Returns:
        The largest error, as a share of what rounding allows.

    Raises:
        CheckError: It is above 1, or the step was not folded.
    """
    parameters = _parameters(workload, seed)
    grads = gradients(parameters)
    max_norm = 0.7 * reference.total_norm(grads)
    before = [p.detach().flatten()[:NUM_CHECKED].double() for p in parameters]
    coef = reference.clip_coefficient(reference.total_norm(grads), max_norm)
    clipped = fastclip.ClippedOptimizer(kind.make(parameters, None), max_norm, fused=True)
    clipped.step()
    where = f"{workload.name} {kind.name}"
    if clipped.route != "native":
        raise CheckError(f"{where}: the step went the {clipped.route} route; expected native.")
    worst = 0.0
    unit = torch.finfo(torch.float32).eps / 2
    for index, (parameter, start, grad) in enumerate(zip(parameters, before, grads, strict=True)):
        wanted = kind.first_update(start, coef * grad.flatten()[:NUM_CHECKED].double())
        allowed = CHECK_ROUNDINGS * unit * (start.abs() + (wanted - start).abs())
        error = float(((parameter.detach().flatten()[:NUM_CHECKED] - wanted).abs() / allowed).max())
        if math.isnan(error) or error > 1:
            raise CheckError(
                f"{where}: parameter {index} is {error:.3g} times as far off as rounding explains."
            )
        worst = max(worst, error)
    return worst
