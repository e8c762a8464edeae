"""A whole run: check everything, measure the memory, then time everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeVar

import torch
from torch.nn import Parameter

from fastclip.bench.bandwidth import Bandwidth, Memory
from fastclip.bench.cases import DTYPES, MODES, Case, Clipping
from fastclip.bench.check import Check, check
from fastclip.bench.devices import CPU, Cuda, Device
from fastclip.bench.environment import environment
from fastclip.bench.isolation import Apply, here
from fastclip.bench.models import SEED, WORKLOADS
from fastclip.bench.peers import NOT_CAPTURED, PEERS, Peer
from fastclip.bench.results import Results, Row

T = TypeVar("T")


class Progress(Protocol):
    """Shows items to someone while it passes them on."""

    def __call__(self, items: Iterable[T], total: int, title: str) -> Iterable[T]:
        """Pass `total` items on; the title says what is done to them."""


def silent(items: Iterable[T], total: int, title: str) -> Iterable[T]:
    """Show nothing."""
    return items


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        models: Keys of WORKLOADS.
        dtypes: Keys of DTYPES.
        modes: Keys of MODES.
        threads: For torch and for fastclip alike.
        time_budget_s: Seconds of timing per case; one with slow calls takes longer.
        seed: Of the gradients.
    """

    models: tuple[str, ...] = tuple(WORKLOADS)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = tuple(MODES)
    threads: int = field(default_factory=torch.get_num_threads)
    time_budget_s: float = 2.5
    seed: int = SEED


def run(
    options: Options,
    *,
    peers: Sequence[Peer] = PEERS,
    progress: Progress = silent,
    apply: Apply = here,
) -> Results:
    """Run a benchmark.

    Args:
        options: What to run.
        peers: The implementation under test first, then those it is compared with.
        progress: Shows the items that it passes on.
        apply: Where each workload in each dtype is timed, see isolation.py.

    Raises:
        CheckError: The implementation under test is wrong somewhere; nothing has been timed.
    """
    num_groups = len(options.models) * len(options.dtypes)
    with torch_threads(options.threads):
        checks = list(progress(check_all(options, peers), num_groups, "check"))
        bandwidth = Memory().measure(budget_s=options.time_budget_s)
    timed = (row for c in checks for row in apply(time_workload, options, c, bandwidth.fastest, peers))
    rows = list(progress(timed, num_groups * len(options.modes), "time"))
    return Results(environment(), asdict(options), bandwidth, rows)


def check_all(options: Options, peers: Sequence[Peer]) -> Iterator[Check]:
    """Check every workload in every dtype."""
    for model in options.models:
        for dtype in options.dtypes:
            yield check(WORKLOADS[model], dtype, peers, seed=options.seed)


def time_workload(
    options: Options, checked: Check, streams: tuple[str, str], peers: Sequence[Peer]
) -> list[Row]:
    """Time one workload in one dtype on the CPU.

    The speed of memory drifts with what else runs on a machine, so that of the given streams is measured
    again before each mode.
    """
    with torch_threads(options.threads):
        measure = partial(Memory().measure, budget_s=options.time_budget_s / 5, only=streams)
        parameters = checked.workload.parameters(DTYPES[checked.dtype], seed=options.seed)
        budget_s = options.time_budget_s
        return list(time_modes(CPU, [parameters], checked, options.modes, peers, measure, budget_s=budget_s))


def time_modes(
    device: Device,
    lists: Sequence[list[Parameter]],
    checked: Check,
    modes: Iterable[str],
    peers: Sequence[Peer],
    bandwidth: Callable[[], Bandwidth],
    *,
    budget_s: float,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Row]:
    """Time one workload in each mode, and captured in graphs where the device has them.

    Args:
        device: Where.
        lists: Parameters whose gradients are copies of each other, as many as the device wants.
        checked: What is known about them.
        modes: Keys of MODES.
        peers: Whom to time.
        bandwidth: Returns that of the memory, for the row that follows.
        budget_s: Seconds for each mode.
        left_out: Peer, or its `_graph`, -> why it is not timed.
    """
    # Active clipping changes the gradients' norm, so it comes last, as it does in MODES.
    for mode in sorted(modes, key=list(MODES).index):
        clipping = Clipping(lists, mode, checked.total_norm, fixed=device.has_cold_caches)
        calls = {peer.name: clipping.call(peer) for peer in peers}
        if isinstance(device, Cuda) and device.captures and mode != "norm":
            captured = (p for p in peers if not {p.name, f"{p.name}_graph"} & {*NOT_CAPTURED, *left_out})
            calls |= {f"{peer.name}_graph": clipping.captured(peer, device) for peer in captured}
        reached = bandwidth()
        times = device.time(calls, before=clipping.prepare, budget_s=budget_s)
        traffic = Case(checked.workload, checked.dtype, mode).traffic
        yield Row.of(
            *(checked.workload, checked.dtype, mode, traffic, times, reached),
            *(checked.relative_errors, dict(left_out)),
        )


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch use a number of threads, then what it used before."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
