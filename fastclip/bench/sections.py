"""The sections of a run on a GPU. Each runs in a process of its own and writes down what it has so far.

python -m fastclip.bench.sections OPTIONS    # as `suite` starts it; OPTIONS is JSON
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fastclip.bench import models
from fastclip.bench.bandwidth import Bandwidth, of_copies
from fastclip.bench.cases import MODES, dtypes_of
from fastclip.bench.check import captured, check, compare_norms
from fastclip.bench.devices import Cuda, Dry
from fastclip.bench.models import Workload, gradients
from fastclip.bench.peers import (
    FOREACH,
    LOOP,
    Peer,
    compiled_peer,
    device_backends,
    fastclip_peer,
    multi_tensor_peers,
)
from fastclip.bench.results import Row, write_json
from fastclip.bench.runner import time_modes
from fastclip.bench.steps import STEP_KINDS, StepKind, check_captured_step, check_first_step, time_steps

# A row needs at least its rounds; below this, the rest of the workloads is left out.
MIN_LEFT_S = 5.0
ROW_S, QUICK_ROW_S, DRY_ROW_S = 1.5, 0.4, 0.02

LLAMA_DEPTH = 32
STEP_COPIES = 6
"""Times as many bytes as the parameters have: gradients, two moments, and two temporaries of torch's step."""


@dataclass
class Section:
    """What a section is given, and what it has found out.

    Attributes:
        device: The accelerator, or the CPU in a dry run.
        path: Where `found` is kept while the section runs.
        seconds: After which no further row begins.
        quick: Whether the key workloads are enough.
        names: Backends of fastclip, best first.
        unproven: Backend, or its `_graph`, -> why it is not timed.
        found: Key of the results file -> value, list of rows or dict.
    """

    device: Cuda
    path: Path
    seconds: float
    quick: bool
    names: list[str]
    unproven: dict[str, str]
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start counting the time."""
        self._bandwidth: Bandwidth | None = None
        self._end = time.monotonic() + self.seconds

    def save(self) -> None:
        """Write down what has been found."""
        write_json(self.path, self.found)

    def add_rows(self, key: str, rows: Iterable[dict[str, Any] | Row]) -> None:
        """Add rows as they come, keep and print each."""
        listed = self.found.setdefault(key, [])
        for row in rows:
            listed.append(row.of_device() if isinstance(row, Row) else row)
            self.save()
            for line in described(listed[-1]):
                print(line, flush=True)

    def bandwidth(self) -> Bandwidth:
        """Return that of a copy, which does not drift and is measured once."""
        if self._bandwidth is None:
            self._bandwidth = of_copies(self.device)
        return self._bandwidth

    @property
    def proven(self) -> list[str]:
        """Return the backends that may be timed."""
        return [name for name in self.names if name not in self.unproven]

    @property
    def row_s(self) -> float:
        """Return the seconds that a row's times on the device may take."""
        return DRY_ROW_S if not self.device.is_accelerator else QUICK_ROW_S if self.quick else ROW_S

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Return whose gradients are clipped."""
        if not self.device.is_accelerator:
            return models.DRY_WORKLOADS
        return models.DEVICE_WORKLOADS[: models.NUM_KEY_WORKLOADS if self.quick else None]

    def fits(self, name: str, workload: Workload, copies: int = 2) -> bool:
        """Whether there is memory and time for a workload; notes which is short."""
        left_out = self.found.setdefault("left_out", {})
        needed_nbytes = needed(workload, copies)
        if self.device.is_accelerator and self.device.free_nbytes() < needed_nbytes:
            left_out[name] = f"needs {needed_nbytes} bytes of free memory"
        elif time.monotonic() > self._end - MIN_LEFT_S:
            left_out[name] = "no time left"
        return name not in left_out


def needed(workload: Workload, copies: int) -> int:
    """Return the bytes of so many copies of a workload, with a margin for a fragmented heap."""
    return copies * workload.nbytes(*dtypes_of(workload.dtype)) + 2**30


def described(row: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a row for a log: medians in milliseconds."""
    mode = f", {row['mode']}" if "mode" in row else ", torch.compile" if row.get("compiled") else ""
    yield f"{row['title']}{mode}"
    clocks = {clock: row[clock] for clock in ("device_ms", "host_ms", "ms") if clock in row}
    for peer in dict.fromkeys(chain.from_iterable(clocks.values())):
        times = (f"{q[peer][50]:9.3f} {clock}" for clock, q in clocks.items() if peer in q)
        share = f" {row['gbps'][peer]:7.0f} GB/s" if "gbps" in row else ""
        yield f"  {peer:<26} {', '.join(times)}{share}"
    for peer, reason in {**row.get("left_out", {}), **row.get("failed", {})}.items():
        yield f"  {peer:<26} left out: {reason}"


def describe(section: Section) -> None:
    """Find out what everything runs on."""
    section.found["environment"] = section.device.describe()
    section.found["copy_gbps"] = section.bandwidth().update_gbps
    section.found["names"] = section.names
    section.save()


def check_backend(section: Section) -> None:
    """Check one backend on what will be timed, and captured in graphs; name what fails and count launches."""
    from fastclip.bench.launches import check_launches, check_step_launches

    (name,) = section.names
    device, peer = section.device, fastclip_peer(name)
    small = models.DRY_WORKLOADS[-1]
    parts: dict[str, Callable[[], Any]] = {}
    run: Callable[[], Any]
    large = (models.LARGE,) if device.is_accelerator else ()
    for workload in (*section.workloads, *large):
        if section.fits(f"check of {workload.name}", workload):
            parts[workload.name] = partial(check, workload, workload.dtype, [peer], device=device)
    for workload in step_workloads(device):
        for kind in STEP_KINDS.values():
            run = partial(check_first_step, workload, kind, device=device, backend=name)
            parts[f"step {kind.name} {workload.name}"] = run
    if device.captures:
        parts["capture"] = partial(check, small, small.dtype, [captured(peer, device)], device=device)
        for kind in STEP_KINDS.values():
            run = partial(check_captured_step, small, kind, device=device, backend=name)
            parts[f"step {kind.name} capture"] = run
        parts["launches"] = partial(check_launches, device, peer)
        parts["step_launches"] = partial(check_step_launches, device, name)
    complaints: dict[str, str] = {}
    checks: dict[str, Any] = {"parts": list(parts), "failed": complaints}
    section.found["checks"] = {name: checks}
    for part, check_part in parts.items():
        with noting(complaints, part):
            found = check_part()
            if "launches" in part:
                checks[part] = found
        section.save()
    for part, complaint in complaints.items():
        print(f"FAILED {name}: {part}: {complaint}", flush=True)
    print(f"{name}: {', '.join(parts)}; {len(complaints)} failed", flush=True)


@contextmanager
def noting(complaints: dict[str, str], part: str) -> Iterator[None]:
    """Note whatever goes wrong, and go on: the checks behind it may still say something."""
    try:
        yield
    except Exception as error:
        complaints[part] = f"{type(error).__name__}: {error}"


def unproven_peers(checks: dict[str, Any], *, of_steps: bool) -> dict[str, str]:
    """Return the peers that must not be timed, and which of their checks failed.

    The counts of launches are figures like the times, and keep nothing from being timed.
    """
    peers: dict[str, str] = {}
    for backend, parts in checks.items():
        for part, complaint in parts["failed"].items():
            if "launches" in part or (part.startswith("step") is not of_steps and part != "process"):
                continue
            reason = f"{part} failed: {complaint}"
            if part.endswith("capture"):
                peers.setdefault(f"{backend}_graph", reason)
            else:
                peers |= {backend: reason, f"{backend}_graph": reason}
    return peers


def time_clips(section: Section, *, with_compiled: bool = False) -> None:
    """Time clips, the key workloads first, until the time is up; some beside torch.compile's."""
    key = "compiled" if with_compiled else "clips"
    for workload in section.workloads:
        if with_compiled and section.device.is_accelerator and workload.name not in models.COMPILED_WORKLOADS:
            continue
        if section.fits(f"{workload.name}, {key}", workload):
            section.add_rows(key, clip_rows(section, workload, with_compiled=with_compiled))


def clip_rows(section: Section, workload: Workload, *, with_compiled: bool = False) -> Iterator[Row]:
    """Time every peer on one workload in every mode."""
    device, dtypes = section.device, dtypes_of(workload.dtype)
    others, absent = multi_tensor_peers(device.torch_device)
    peers: list[Peer] = [*map(fastclip_peer, section.proven), FOREACH, LOOP, *others]
    peers += [compiled_peer()] if with_compiled else []
    num_sets = device.num_sets(workload.nbytes(*dtypes))
    lists = [workload.parameters(*dtypes, device=device.torch_device) for _ in range(num_sets)]
    checked = compare_norms(workload, workload.dtype, peers, gradients(lists[0]), device)
    left_out = {**absent, **section.unproven}
    yield from time_modes(
        *(device, lists, checked, MODES, peers, section.bandwidth), budget_s=section.row_s, left_out=left_out
    )


def step_workloads(device: Cuda) -> Iterator[Workload]:
    """Yield what is stepped, the most telling first; of Llama 3 8B as many layers as the memory holds."""
    if not device.is_accelerator:
        many, mixed = models.DRY_WORKLOADS
        yield from (many, Workload("dry-bf16", "bfloat16", mixed.shapes, "bfloat16"))
        return
    if depth := fitting_depth(device.free_nbytes()):
        yield llama(depth)
    yield from (workload for workload in models.DEVICE_WORKLOADS if workload.name in ("gpt2", "2000-tiny"))


def fitting_depth(free_nbytes: int) -> int:
    """Return how many layers of Llama 3 8B can be stepped in so much memory; 0 if none can."""
    sizes = {depth: needed(llama(depth), STEP_COPIES) for depth in range(1, LLAMA_DEPTH + 1)}
    return max((depth for depth, nbytes in sizes.items() if nbytes <= free_nbytes), default=0)


def llama(depth: int) -> Workload:
    """Return so many layers of Llama 3 8B, between embedding and output."""
    layers = "" if depth == LLAMA_DEPTH else f", {depth} of {LLAMA_DEPTH} layers"
    return Workload("llama3-8b", f"Llama-3-8B{layers}, bfloat16", tuple(models.llama3_8b(depth)), "bfloat16")


def time_all_steps(section: Section) -> None:
    """Time clip and optimizer step together."""
    for workload in step_workloads(section.device):
        if section.fits(f"{workload.name}, steps", workload, STEP_COPIES):
            for kind in STEP_KINDS.values():
                section.add_rows("steps", step_rows(section, workload, kind))


def step_rows(section: Section, workload: Workload, kind: StepKind) -> Iterator[Row]:
    """Time every peer's steps of one optimizer on one workload in every mode."""
    subjects = {name: name for name in section.proven}
    yield from time_steps(
        *(section.device, workload, kind, subjects, section.bandwidth),
        budget_s=section.row_s,
        left_out=section.unproven,
    )


def time_training(section: Section) -> None:
    """Time whole training iterations; of a compiled model, too, where there is time."""
    from fastclip.bench.training import time_training

    compiled = (False,) if section.quick else (False, True)
    budget_s = 0.25 * section.seconds if section.device.is_accelerator else DRY_ROW_S
    section.add_rows("training", time_training(section.device, budget_s=budget_s, compiled=compiled))


def time_distributed(section: Section) -> None:
    """Time DTensors in a group of one rank."""
    from fastclip.bench.distributed import rows_of_device

    section.add_rows("distributed", rows_of_device(section.device, budget_s=section.row_s))


def fail(section: Section) -> None:
    """Write a row down and fail: a dry run shows that neither is lost.

    Raises:
        RuntimeError: Always.
    """
    section.add_rows("on_purpose", [{"title": "a row before the failure"}])
    raise RuntimeError("this section fails on purpose")


RUN: dict[str, Callable[[Section], None]] = {
    "describe": describe,
    "checks": check_backend,
    "clips": time_clips,
    "steps": time_all_steps,
    "training": time_training,
    "distributed": time_distributed,
    "compiled": partial(time_clips, with_compiled=True),
    "fail": fail,
}


def main() -> None:
    """Run the section that the command line names; without `names` for all backends there are.

    Raises:
        SystemExit: There is no backend for the device.
    """
    options = json.loads(sys.argv[1])
    device = Dry() if options.pop("dry") else Cuda()
    run, path = RUN[options.pop("section")], Path(options.pop("path"))
    try:
        options["names"] = options["names"] or device_backends(device.torch_device)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    run(Section(device, path, **options))


if __name__ == "__main__":
    main()
