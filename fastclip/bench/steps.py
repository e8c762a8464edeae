"""Clip and optimizer step together: fastclip's folded one beside torch's clip and torch's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fastclip
from fastclip import reference
from fastclip.bench.bandwidth import Bandwidth, Memory
from fastclip.bench.cases import Clipping, Traffic, dtypes_of
from fastclip.bench.check import CheckError, float64_norm, unit_roundoff
from fastclip.bench.devices import CPU, Cuda, Device
from fastclip.bench.environment import environment
from fastclip.bench.isolation import Apply, here
from fastclip.bench.models import SEED, WORKLOADS, Workload, gradients
from fastclip.bench.peers import within
from fastclip.bench.results import Results, Row
from fastclip.bench.runner import Progress, silent, torch_threads
from fastclip.bench.timing import Call

STEP_MODES = ("inactive", "active")
SUBJECT, FUSED, DEFAULT = "fastclip", "torch_fused", "torch_default"

LR = 1e-3
WEIGHT_DECAY = 0.01
MOMENTUM = 0.9
NUM_CHECKED = 1 << 18
"""Elements of each tensor that are compared with float64: more would cost copies of all of GPT-2."""

# Roundings on the path of a first step, see tests/optim_oracle.py for each: those of float32, and those that
# store moments in a narrower type.
CHECK_ROUNDINGS, STORED_ROUNDINGS = 32, 8


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

    def traffic(self, nbytes: int) -> Traffic:
        """Return the byte model: the gradients once for the norm, and what the update moves."""
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
    timed = (row for kind in kinds for row in apply(_check_and_time, options, *kind, bandwidth.fastest))
    rows = list(progress(timed, len(kinds) * len(STEP_MODES), "steps"))
    return Results(environment(), asdict(options), bandwidth, rows)


def _check_and_time(options: StepOptions, model: str, optimizer: str, streams: tuple[str, str]) -> list[Row]:
    workload, kind = replace(WORKLOADS[model], dtype="float32"), STEP_KINDS[optimizer]
    with torch_threads(options.threads):
        check_first_step(workload, kind, seed=options.seed)
        measure = partial(Memory().measure, budget_s=options.time_budget_s / 5, only=streams)
        budget_s = options.time_budget_s
        return list(
            time_steps(CPU, workload, kind, {SUBJECT: None}, measure, budget_s=budget_s, seed=options.seed)
        )


def time_steps(
    device: Device,
    workload: Workload,
    kind: StepKind,
    subjects: Mapping[str, str | None],
    bandwidth: Callable[[], Bandwidth],
    *,
    budget_s: float,
    seed: int = SEED,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Row]:
    """Time one optimizer on one workload in each mode, and captured in graphs where the device has them.

    Args:
        device: Where.
        workload: With a dtype.
        kind: The optimizer.
        subjects: Name -> backend of fastclip, None for whichever is in force.
        bandwidth: Returns that of the memory, for the row that follows.
        budget_s: Seconds for each mode.
        seed: Of values and gradients.
        left_out: Subject, or its `_graph`, -> why it is not timed.
    """
    steps = Steps(_parameters(workload, device, seed), kind, subjects, device)
    for mode in STEP_MODES:
        calls = steps.calls(mode)
        errors = {}
        for name in subjects:
            calls[name]()
            errors[name] = steps.norm_error(name)
            if isinstance(device, Cuda) and device.captures and f"{name}_graph" not in left_out:
                calls[f"{name}_graph"], _ = device.capture(calls[name])
        reached = bandwidth()
        times = device.time(calls, before=steps.prepare, budget_s=budget_s)
        traffic = kind.traffic(workload.nbytes(*dtypes_of(workload.dtype)))
        yield Row.of(
            *(workload, workload.dtype, f"{kind.name} {mode}", traffic, times, reached, errors),
            dict(left_out),
        )


class Steps:
    """One list of parameters, the threshold that all peers clip it by, and the peers.

    Every peer has an optimizer of its own, and all of them one state between them: the memory is that of one
    training run. Counters of steps are their own, each where its step keeps them.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        kind: StepKind,
        subjects: Mapping[str, str | None],
        device: Device,
    ) -> None:
        """Make the optimizers; arguments as those of `time_steps`."""
        self.parameters = parameters
        self.device = device
        self.total_norm = float64_norm(gradients(parameters), device)
        fused = kind.make(parameters, True)
        fused.step()  # makes the state
        self.torch = {FUSED: fused, DEFAULT: kind.make(parameters, None)}
        share_state(fused, self.torch[DEFAULT], counters=torch.device("cpu"))
        self.clipped: dict[str, fastclip.ClippedOptimizer] = {}
        self._steps: dict[str, Call] = {}
        for name, backend in subjects.items():
            inner = kind.make(parameters, None)
            share_state(fused, inner, counters=device.torch_device)
            self.clipped[name] = fastclip.ClippedOptimizer(inner, 1.0, fused=True)
            self._steps[name] = within(backend, self.clipped[name].step)

    def calls(self, mode: str) -> dict[str, Call]:
        """Return the steps of fastclip, and torch's clip and step, from here on in this mode."""
        self.clipping = Clipping([self.parameters], mode, self.total_norm, fixed=self.device.has_cold_caches)
        self._pass_threshold_on()
        torchs = {name: self.clipping.clipping(clip_and(step)) for name, step in self.torch.items()}
        return {**self._steps, **torchs}

    def prepare(self) -> None:
        """Make the call that follows like the others; not to be timed."""
        self.clipping.prepare()
        if not self.clipping.fixed:
            self._pass_threshold_on()

    def _pass_threshold_on(self) -> None:
        for optimizer in self.clipped.values():
            optimizer.max_norm = self.clipping.max_norm

    def norm_error(self, name: str) -> float:
        """Return how far the norm of fastclip's latest step was from float64's."""
        last = self.clipped[name].last
        assert last is not None  # it has stepped
        return abs(float(last.total_norm) - self.total_norm) / self.total_norm


def share_state(source: Optimizer, target: Optimizer, *, counters: torch.device) -> None:
    """Give an optimizer the state of another of the same parameters, with step counters of its own."""
    for parameter, state in source.state.items():
        target.state[parameter] = {
            name: tensor.to(counters, copy=True) if name == "step" else tensor
            for name, tensor in state.items()
        }


def clip_and(optimizer: Optimizer) -> Callable[[list[Parameter], float], None]:
    """Return torch's clip and an optimizer's step, of parameters and a threshold."""

    def call(parameters: list[Parameter], max_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return call


def check_first_step(
    workload: Workload,
    kind: StepKind,
    *,
    device: Device = CPU,
    backend: str | None = None,
    seed: int = SEED,
) -> float:
    """Compare fastclip's first clipped step with float64.

    Returns:
        The largest error, as a share of what rounding allows.

    Raises:
        CheckError: It is above 1, or the step was not folded.
    """
    parameters = _parameters(workload, device, seed)
    grads = gradients(parameters)
    total_norm = float64_norm(grads, device)
    max_norm = 0.7 * total_norm
    before = [p.detach().flatten()[:NUM_CHECKED].to(torch.float64, copy=True) for p in parameters]
    coef = reference.clip_coefficient(total_norm, max_norm)
    clipped = fastclip.ClippedOptimizer(kind.make(parameters, None), max_norm, fused=True)
    within(backend, clipped.step)()
    where = f"{workload.name} {kind.name}"
    if clipped.route != "native":
        raise CheckError(f"{where}: the step went the {clipped.route} route; expected native.")
    worst = 0.0
    for index, (parameter, start, grad) in enumerate(zip(parameters, before, grads, strict=True)):
        wanted = kind.first_update(start, coef * grad.flatten()[:NUM_CHECKED].double())
        allowed = CHECK_ROUNDINGS * unit_roundoff(torch.float32) * (start.abs() + (wanted - start).abs())
        if parameter.dtype != torch.float32:
            unit = unit_roundoff(parameter.dtype)
            allowed += unit * (wanted.abs() + STORED_ROUNDINGS * (wanted - start).abs())
        error = float(((parameter.detach().flatten()[:NUM_CHECKED] - wanted).abs() / allowed).max())
        if math.isnan(error) or error > 1:
            raise CheckError(
                f"{where}: parameter {index} is {error:.3g} times as far off as rounding explains."
            )
        worst = max(worst, error)
    return worst


def check_captured_step(workload: Workload, kind: StepKind, *, device: Cuda, backend: str) -> None:
    """Replay a captured step while the gradients change, beside the same steps taken one by one.

    Raises:
        CheckError: A replay gave other bits than a step, or another count.
    """
    replayed, single = (
        fastclip.ClippedOptimizer(kind.make(_parameters(workload, device, SEED), None), 1.0, fused=True)
        for _ in range(2)
    )
    step, beside = within(backend, replayed.step), within(backend, single.step)
    step(), beside()
    replay, _ = device.capture(step, warm_up=False)
    # Below the threshold, above it, and to be skipped.
    for number, factor in enumerate((1e-9, 1e9, math.nan)):
        for optimizer in (replayed, single):
            torch._foreach_mul_(gradients(optimizer.param_groups[0]["params"]), factor)
        replay()
        beside()
        where = f"{workload.name} {kind.name}, replay {number}"
        pairs = zip(_tensors(replayed), _tensors(single), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise CheckError(f"{where}: parameters or state differ from a step's.")
        if replayed.stats() != single.stats():
            raise CheckError(f"{where}: {replayed.stats()}; expected {single.stats()}.")


def _tensors(optimizer: Optimizer) -> Sequence[torch.Tensor]:
    return [tensor for p, state in optimizer.state.items() for tensor in (p.detach(), *state.values())]


def _parameters(workload: Workload, device: Device, seed: int) -> list[Parameter]:
    dtypes = dtypes_of(workload.dtype)
    return workload.parameters(*dtypes, device=device.torch_device, seed=seed, with_values=True)
