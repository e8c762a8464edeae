"""Prove fastclip on a GPU, then time it: one command, no network, at most eight minutes.

    make gpu                                       # builds, checks, times, writes results/gpu-NAME.json
    python benchmarks/gpu.py --quick               # three minutes: correctness, key workloads and steps
    python benchmarks/gpu.py --checks-only         # for compute-sanitizer
    python benchmarks/gpu.py --cpu-dry-run         # every line that needs no GPU; its times mean nothing

Needs torch >= 2.10, numpy, pybind11 and setuptools; triton and nvcc for the backends that they make.
Whichever backends of fastclip run on the device are taken. Nothing is timed if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SCHEMA = "fastclip-gpu/1"
RESULTS = ROOT / "benchmarks" / "results"

# Seconds, of the eight and three minutes that a run may take.
FULL_S, QUICK_S, DRY_S = 460.0, 170.0, 600.0
ROW_S, QUICK_ROW_S, DRY_ROW_S = 1.5, 0.6, 0.02
# A row needs at least its rounds; below this, the rest of the workloads is left out.
MIN_LEFT_S = 25.0
# What torch.compile may take for one list of tensors.
COMPILE_S = 120.0

# Kept short in the file: a broken kernel fails in hundreds of cases.
MAX_FAILURES_SHOWN = 40


def main() -> int:
    """Run everything; return the exit code."""
    options = parse_arguments()
    if options.build:
        build()
    import torch
    from gpu_suite import device as devices
    from gpu_suite.subjects import backend_names
    from gpu_suite.timing import Deadline

    if not options.cpu_dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch sees no GPU. Run on one, or with --cpu-dry-run.")
    device = devices.DryDevice() if options.cpu_dry_run else devices.Device()
    deadline = Deadline(DRY_S if options.cpu_dry_run else QUICK_S if options.quick else FULL_S)
    names = backend_names(device)
    print(f"{device.describe()['gpu'] or 'CPU, dry run'}: {', '.join(names)}", flush=True)

    result: dict[str, Any] = {"schema": SCHEMA, "dry_run": options.cpu_dry_run, "quick": options.quick}
    result["environment"] = device.describe()
    failed = run_checks(device, names, result)
    if failed:
        print(f"{failed} checks failed; nothing was timed.", flush=True)
    elif not options.checks_only:
        run_timings(device, names, deadline, options, result)
    path = options.json or default_path(result)
    if not options.checks_only:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}", flush=True)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="correctness and the key workloads")
    parser.add_argument("--checks-only", action="store_true", help="time nothing, write nothing")
    parser.add_argument("--cpu-dry-run", action="store_true", help="use the CPU in place of the GPU")
    parser.add_argument("--no-build", dest="build", action="store_false", help="use what is built already")
    parser.add_argument(
        "--json", type=Path, help="where to write; by default benchmarks/results/gpu-NAME.json"
    )
    return parser.parse_args()


def build() -> None:
    """Build the extension and the CUDA library in place, as far as the compilers are there."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={"FASTCLIP_BUILD_CUDA": "auto", **os.environ}, check=True)


def run_checks(device: Any, names: list[str], result: dict[str, Any]) -> int:
    """Run every check of every backend; return how many failed."""
    from gpu_suite.capture import check_capture
    from gpu_suite.correctness import failures
    from gpu_suite.large import check_large
    from gpu_suite.launches import check_launches
    from gpu_suite.step_checks import check_step_capture, check_step_launches, step_failures
    from gpu_suite.subjects import fastclip_peer

    num_failed = 0
    result["checks"] = {}
    for name in names:
        complaints: dict[str, str] = {}
        num_cases = 0
        for check, complaint in chain(failures(device, name), step_failures(device, name)):
            num_cases += 1
            if complaint:
                complaints[check] = complaint
        checks: dict[str, Any] = {"cases": num_cases}
        peer = fastclip_peer(name)
        parts: dict[str, Callable[[], Any]] = {"large": partial(check_large, device, peer)}
        if device.is_accelerator:
            parts |= {
                "capture": partial(check_capture, device, peer),
                "launches": partial(check_launches, device, peer),
                "step_capture": partial(check_step_capture, device, name),
                "step_launches": partial(check_step_launches, device, name),
            }
        for part, check_part in parts.items():
            with noting(complaints, part):
                checks[part] = check_part()
        checks["failed"] = dict(list(complaints.items())[:MAX_FAILURES_SHOWN])
        result["checks"][name] = checks
        num_failed += len(complaints)
        for check, complaint in checks["failed"].items():
            print(f"FAILED {name}: {check}: {complaint}", flush=True)
        print(f"{name}: {num_cases} cases and {', '.join(parts)}; {len(complaints)} failed", flush=True)
    return num_failed


@contextmanager
def noting(complaints: dict[str, str], part: str) -> Iterator[None]:
    """Note a failed assertion and go on; anything else is an error of this program."""
    try:
        yield
    except AssertionError as error:
        complaints[part] = str(error)


def run_timings(
    device: Any, names: list[str], deadline: Any, options: argparse.Namespace, result: dict[str, Any]
) -> None:
    """Time clips and steps one after the other, the key ones first, until the time is up."""
    from gpu_suite.steps import needed_nbytes, step_workloads, time_steps
    from gpu_suite.targets import evaluate, evaluate_steps
    from gpu_suite.timing import time_workload
    from gpu_suite.workloads import DRY_WORKLOADS, NUM_KEY_WORKLOADS, WORKLOADS

    key, others = WORKLOADS[:NUM_KEY_WORKLOADS], () if options.quick else WORKLOADS[NUM_KEY_WORKLOADS:]
    row_s = QUICK_ROW_S if options.quick else ROW_S
    if not device.is_accelerator:
        key, others, row_s = DRY_WORKLOADS, (), DRY_ROW_S
    result["copy_gbps"] = device.copy_gbps()
    result |= {"rows": [], "step_rows": [], "left_out": {}}

    def fits(name: str, needed: int) -> bool:
        if device.is_accelerator and device.free_nbytes() < needed:
            result["left_out"][name] = f"needs {needed} bytes of free memory"
        elif deadline.left_s() < MIN_LEFT_S:
            result["left_out"][name] = "no time left"
        return name not in result["left_out"]

    def clips(workloads: Any) -> Iterator[Any]:
        for workload in workloads:
            # Gradients, a double of one block for the oracle, and torch's own temporaries.
            if fits(workload.workload.name, 2 * workload.nbytes + 2**30):
                with_compiled = not options.quick and deadline.left_s() > COMPILE_S + MIN_LEFT_S
                yield from time_workload(device, workload, names, budget_s=row_s, with_compiled=with_compiled)

    def steps() -> Iterator[Any]:
        for workload in step_workloads(device):
            if fits(f"step of {workload.workload.name}", needed_nbytes(workload)):
                yield from time_steps(device, workload, names, budget_s=row_s)

    for table, rows in (("rows", clips(key)), ("step_rows", steps()), ("rows", clips(others))):
        for row in rows:
            result[table].append(row.as_json())
            print_row(result[table][-1], result["copy_gbps"])
    result["targets"] = {}
    for name in names:
        checks, gbps = result["checks"][name], result["copy_gbps"]
        targets = [
            *evaluate(name, result["rows"], checks.get("launches", {}), gbps),
            *evaluate_steps(name, result["step_rows"], checks.get("step_launches", {}), gbps),
        ]
        result["targets"][name] = [target.as_json() for target in targets]
        print(f"\n{name}:", *targets, sep="\n  ", flush=True)


def print_row(row: dict[str, Any], copy_gbps: float) -> None:
    print(f"{row['title']}, {row['mode']}: {row['necessary_nbytes'] / 1e6:.1f} MB, copy {copy_gbps:.0f} GB/s")
    for peer, quantiles in row["device_ms"].items():
        print(
            f"  {peer:<20} {quantiles[50]:9.3f} ms on the device, "
            f"{row['host_ms'][peer][50]:9.3f} ms on the host, {row['gbps'][peer]:7.0f} GB/s, "
            f"{row['gbps'][peer] / copy_gbps:.0%} of a copy",
            flush=True,
        )


def default_path(result: dict[str, Any]) -> Path:
    """Return results/gpu-NAME.json; a dry run never lies beside results."""
    if result["dry_run"]:
        return ROOT / "build" / "gpu-dry-run.json"
    name = re.sub(r"[^a-z0-9]+", "-", result["environment"]["gpu"].lower()).strip("-")
    return RESULTS / f"gpu-{name}{'-quick' if result['quick'] else ''}.json"


if __name__ == "__main__":
    sys.exit(main())
