"""The sections of a run, each of which runs in a process of its own and writes down what it has so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fastclip.bench.results import write_json
from gpu_suite.device import Device, DryDevice
from gpu_suite.subjects import backend_names
from gpu_suite.timing import Deadline

# Kept short in the file: a broken kernel fails in hundreds of cases.
MAX_FAILURES_SHOWN = 40
# A row needs at least its rounds; below this, the rest of the workloads is left out.
MIN_LEFT_S = 5.0
ROW_S, QUICK_ROW_S, DRY_ROW_S = 1.5, 0.4, 0.02


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

    device: Device
    path: Path
    seconds: float
    quick: bool
    names: list[str]
    unproven: dict[str, str]
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start counting the time."""
        self.deadline = Deadline(self.seconds)

    def save(self) -> None:
        """Write down what has been found."""
        write_json(self.path, self.found)

    def add_rows(self, key: str, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows as they come, keep and print each."""
        listed = self.found.setdefault(key, [])
        for row in rows:
            listed.append(row)
            self.save()
            for line in described(row):
                print(line, flush=True)

    @property
    def row_s(self) -> float:
        """Return the seconds that a row's times on the device may take."""
        return DRY_ROW_S if not self.device.is_accelerator else QUICK_ROW_S if self.quick else ROW_S

    def fits(self, name: str, needed_nbytes: int) -> bool:
        """Whether there is memory and time for a workload; notes which is short."""
        left_out = self.found.setdefault("left_out", {})
        free = self.device.free_nbytes()
        if self.device.is_accelerator and free < needed_nbytes:
            left_out[name] = f"needs {needed_nbytes} bytes of free memory"
        elif self.deadline.left_s() < MIN_LEFT_S:
            left_out[name] = "no time left"
        return name not in left_out


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
    section.found["copy_gbps"] = section.device.copy_gbps()
    section.found["names"] = section.names
    section.save()


def check(section: Section) -> None:
    """Run every check of one backend, and name those that fail."""
    from gpu_suite.capture import check_capture
    from gpu_suite.correctness import failures
    from gpu_suite.large import check_large
    from gpu_suite.launches import check_launches
    from gpu_suite.step_checks import check_step_capture, check_step_launches, step_failures
    from gpu_suite.subjects import fastclip_peer

    (name,) = section.names
    complaints: dict[str, str] = {}
    checks: dict[str, Any] = {"cases": 0, "failed": complaints}
    section.found["checks"] = {name: checks}
    with noting(complaints, "cases"):
        for case, complaint in chain(failures(section.device, name), step_failures(section.device, name)):
            checks["cases"] += 1
            if complaint and len(complaints) < MAX_FAILURES_SHOWN:
                complaints[case] = complaint
    section.save()
    peer = fastclip_peer(name)
    parts: dict[str, Callable[[], Any]] = {"large": partial(check_large, section.device, peer)}
    if section.device.is_accelerator:
        parts |= {
            "capture": partial(check_capture, section.device, peer),
            "launches": partial(check_launches, section.device, peer),
            "step_capture": partial(check_step_capture, section.device, name),
            "step_launches": partial(check_step_launches, section.device, name),
        }
    for part, check_part in parts.items():
        with noting(complaints, part):
            checks[part] = check_part()
        section.save()
    for case, complaint in complaints.items():
        print(f"FAILED {name}: {case}: {complaint}", flush=True)
    print(
        f"{name}: {checks['cases']} cases and {', '.join(parts)}; {len(complaints)} failed",
        flush=True,
    )


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
    peers = {}
    for backend, parts in checks.items():
        for part, complaint in parts["failed"].items():
            concerns_all = part in ("cases", "process")
            if "launches" in part or (part.startswith("step") is not of_steps and not concerns_all):
                continue
            reason = f"{part} failed: {complaint}"
            if part.endswith("capture"):
                peers.setdefault(f"{backend}_graph", reason)
            else:
                peers |= {backend: reason, f"{backend}_graph": reason}
    return peers


def time_clips(section: Section) -> None:
    """Time clips, the key workloads first, until the time is up."""
    from gpu_suite.timing import time_workload
    from gpu_suite.workloads import DRY_WORKLOADS, NUM_KEY_WORKLOADS, WORKLOADS

    workloads = WORKLOADS[:NUM_KEY_WORKLOADS] if section.quick else WORKLOADS
    for workload in workloads if section.device.is_accelerator else DRY_WORKLOADS:
        # Gradients, a double of one block for the oracle, and torch's own temporaries.
        if section.fits(workload.workload.name, 2 * workload.nbytes + 2**30):
            rows = time_workload(
                section.device, workload, section.names, budget_s=section.row_s, unproven=section.unproven
            )
            section.add_rows("clips", (row.as_json() for row in rows))


def time_compiled(section: Section) -> None:
    """Time clips beside torch.compile's of few tensors."""
    from gpu_suite.timing import time_workload
    from gpu_suite.workloads import COMPILED_WORKLOADS, DRY_WORKLOADS, WORKLOADS

    chosen = [w for w in WORKLOADS if w.workload.name in COMPILED_WORKLOADS]
    for workload in chosen if section.device.is_accelerator else DRY_WORKLOADS[1:]:
        if section.fits(f"{workload.workload.name} compiled", 2 * workload.nbytes + 2**30):
            rows = time_workload(
                section.device,
                workload,
                section.names,
                budget_s=section.row_s,
                with_compiled=True,
                unproven=section.unproven,
            )
            section.add_rows("compiled", (row.as_json() for row in rows))


def time_steps(section: Section) -> None:
    """Time clip and optimizer step together."""
    from gpu_suite import steps

    for workload in steps.step_workloads(section.device):
        if section.fits(f"step of {workload.workload.name}", steps.needed_nbytes(workload)):
            rows = steps.time_steps(
                section.device, workload, section.names, budget_s=section.row_s, unproven=section.unproven
            )
            section.add_rows("steps", (row.as_json() for row in rows))


def time_training(section: Section) -> None:
    """Time whole training iterations; of a compiled model, too, where there is time."""
    from gpu_suite.training import time_training

    compiled = (False,) if section.quick else (False, True)
    budget_s = 0.25 * section.seconds if section.device.is_accelerator else DRY_ROW_S
    section.add_rows("training", time_training(section.device, budget_s=budget_s, compiled=compiled))


def time_distributed(section: Section) -> None:
    """Time DTensors in a group of one rank."""
    from gpu_suite.distributed import time_distributed

    section.add_rows("distributed", time_distributed(section.device, budget_s=section.row_s))


def fail(section: Section) -> None:
    """Write a row down and fail: a dry run shows that neither is lost.

    Raises:
        RuntimeError: Always.
    """
    section.add_rows("on_purpose", [{"title": "a row before the failure"}])
    raise RuntimeError("this section fails on purpose")


RUN: dict[str, Callable[[Section], None]] = {
    "describe": describe,
    "checks": check,
    "clips": time_clips,
    "steps": time_steps,
    "training": time_training,
    "distributed": time_distributed,
    "compiled": time_compiled,
    "fail": fail,
}


def run(name: str, *, dry: bool, names: list[str], **options: Any) -> None:
    """Run one section in this process; `names` may be empty for all backends there are."""
    device = DryDevice() if dry else Device()
    RUN[name](Section(device, names=names or backend_names(device), **options))
