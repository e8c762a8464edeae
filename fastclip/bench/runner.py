"""A whole run: check everything, measure the memory, then time everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

import torch

from fastclip.bench.bandwidth import Memory
from fastclip.bench.cases import DTYPES, MODES, Case, Clipping
from fastclip.bench.check import Check, check
from fastclip.bench.environment import environment
from fastclip.bench.isolation import Apply, here
from fastclip.bench.models import SEED, WORKLOADS
from fastclip.bench.peers import PEERS, Peer
from fastclip.bench.results import Results, Row
from fastclip.bench.timing import interleave

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
    timed = (row for c in checks for row in apply(time_modes, options, c, bandwidth.fastest, peers))
    rows = list(progress(timed, num_groups * len(options.modes), "time"))
    return Results(environment(), asdict(options), bandwidth, rows)


def check_all(options: Options, peers: Sequence[Peer]) -> Iterator[Check]:
    """Check every workload in every dtype."""
    for model in options.models:
        for dtype in options.dtypes:
            yield check(WORKLOADS[model], dtype, peers, seed=options.seed)


def time_modes(
    options: Options, checked: Check, streams: tuple[str, str], peers: Sequence[Peer]
) -> list[Row]:
    """Time one workload in one dtype.

    The speed of memory drifts with what else runs on a machine, so that of the given streams is measured
    again before each mode.
    """
    with torch_threads(options.threads):
        memory = Memory()
        parameters = checked.workload.parameters(DTYPES[checked.dtype], seed=options.seed)
        rows = []
        # Active clipping changes the gradients' norm, so it comes last, as it does in MODES.
        for mode in sorted(options.modes, key=list(MODES).index):
            case = Case(checked.workload, checked.dtype, mode)
            clipping = Clipping(parameters, mode, checked.total_norm)
            bandwidth = memory.measure(budget_s=options.time_budget_s / 5, only=streams)
            measurements = interleave(
                {peer.name: clipping.call(peer) for peer in peers},
                before=clipping.next_threshold,
                budget_s=options.time_budget_s,
            )
            rows.append(Row.of(case, measurements, checked, bandwidth))
        return rows


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch use a number of threads, then what it used before."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
