"""Prove fastclip on a GPU, then time it: one command, no network, at most ten minutes.

    make gpu                                       # builds, checks, times, writes results/gpu-NAME.json
    python benchmarks/gpu.py --quick               # three minutes: checks, key workloads, steps, training
    python benchmarks/gpu.py --section checks      # one section; may be given several times
    python benchmarks/gpu.py --cpu-dry-run         # every line that needs no GPU; its times mean nothing
    python benchmarks/gpu.py --plot FILE.json      # draws a run that was written before

Needs torch >= 2.10, numpy, pybind11 and setuptools; triton and nvcc for the backends that they make.
Whichever backends of fastclip run on the device are taken. Each section runs in a process of its own, and
the file is written after each: one that fails, or loses the device, is named and the rest still runs. What
failed its checks is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

SCHEMA = "fastclip-gpu/2"
RESULTS = ROOT / "benchmarks" / "results"

SECTIONS = ("checks", "clips", "steps", "training", "distributed", "compiled")
# Seconds after which a section begins nothing more.
FULL_S = {"checks": 90, "clips": 130, "steps": 70, "training": 60, "distributed": 10, "compiled": 60}
QUICK_S = {"checks": 60, "clips": 30, "steps": 20, "training": 20, "distributed": 5}
DRY_S = dict.fromkeys(SECTIONS, 60)
# What beginning a process and ending the row at hand may take on top.
GRACE_S = 90
MAX_LINES_SHOWN = 15


def main() -> int:
    """Run everything; return the exit code."""
    options = parse_arguments()
    if options.child:
        run_child(options)
        return 0
    if options.plot:
        plot(options.plot)
        return 0
    if options.build:
        build()
    budgets = DRY_S if options.cpu_dry_run else QUICK_S if options.quick else FULL_S
    run = Run(options, budgets)
    run.describe()
    for name in options.section or budgets:
        run.section(name)
    if options.cpu_dry_run:
        run.section("fail")
    run.summarize()
    return run.exit_code()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="correctness and the key workloads")
    parser.add_argument(
        "--section", action="append", choices=SECTIONS, help="only this one; may be given several times"
    )
    parser.add_argument("--cpu-dry-run", action="store_true", help="use the CPU in place of the GPU")
    parser.add_argument("--no-build", dest="build", action="store_false", help="use what is built already")
    parser.add_argument(
        "--json", type=Path, help="where to write; by default benchmarks/results/gpu-NAME.json"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw a run, beside its file")
    # What a section's own process is told.
    for name in ("--child", "--into", "--names", "--unproven", "--seconds"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def build() -> None:
    """Build the extension and the CUDA library in place, as far as the compilers are there."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={"FASTCLIP_BUILD_CUDA": "auto", **os.environ}, check=True)


def run_child(options: argparse.Namespace) -> None:
    """Run one section in this process."""
    import torch
    from gpu_suite import sections

    if not options.cpu_dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch sees no GPU. Run on one, or with --cpu-dry-run.")
    sections.run(
        options.child,
        dry=options.cpu_dry_run,
        names=json.loads(options.names),
        unproven=json.loads(options.unproven),
        path=Path(options.into),
        seconds=float(options.seconds),
        quick=options.quick,
    )


class Run:
    """A run: its sections' processes, and the file that grows with them."""

    def __init__(self, options: argparse.Namespace, budgets: dict[str, int]) -> None:
        self.options, self.budgets = options, budgets
        self.names: list[str] = []
        self.path: Path = options.json or ROOT / "build" / "gpu-dry-run.json"
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "dry_run": options.cpu_dry_run,
            "quick": options.quick,
            "environment": {},
            "checks": {},
            "failed_sections": {},
            "seconds": {},
        }

    def describe(self) -> None:
        """Ask a first process for the device and the backends.

        Raises:
            SystemExit: There is no device, or no backend for it.
        """
        complaint = self.child("describe", [])
        if complaint:
            raise SystemExit(f"gpu.py: {complaint}")
        self.names = self.result.pop("names")
        environment = self.result["environment"]
        print(f"{environment['gpu'] or 'CPU, dry run'}: {', '.join(self.names)}", flush=True)
        if not self.options.json and not self.options.cpu_dry_run:
            name = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-")
            self.path = RESULTS / f"gpu-{name}{'-quick' if self.options.quick else ''}.json"

    def section(self, name: str) -> None:
        """Run a section; of the checks, one process for each backend."""
        if name != "checks":
            self.note(name, self.child(name, self.names))
            return
        for backend in self.names:
            complaint = self.child(name, [backend])
            self.note(f"{name} of {backend}", complaint)
            if complaint:
                parts = self.result["checks"].setdefault(backend, {"failed": {}})
                parts["failed"]["process"] = complaint
        self.save()

    def note(self, name: str, complaint: str | None) -> None:
        """Keep what is wrong with a section, and what the others have found."""
        if complaint:
            self.result["failed_sections"][name] = complaint
            print(f"FAILED section {name}: {complaint}", flush=True)
        self.save()

    def child(self, name: str, names: list[str]) -> str | None:
        """Run one section in a process of its own and take what it found; return what went wrong."""
        from gpu_suite.sections import unproven_peers

        unproven = unproven_peers(self.result["checks"], of_steps=name == "steps")
        seconds = self.budgets.get(name, GRACE_S)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            into = Path(folder) / "found.json"
            command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--into", str(into)]
            command += ["--names", json.dumps(names), "--unproven", json.dumps(unproven)]
            command += ["--seconds", str(seconds)]
            command += ["--cpu-dry-run"] * self.options.cpu_dry_run + ["--quick"] * self.options.quick
            complaint = watch(command, seconds + GRACE_S)
            if into.exists():
                self.take(json.loads(into.read_text(encoding="utf-8")))
        self.result["seconds"][" ".join([name, *names[: name == "checks"]])] = time.monotonic() - start
        return complaint

    def take(self, found: dict[str, Any]) -> None:
        """Add what a section has found."""
        for key, value in found.items():
            if isinstance(value, dict):
                self.result.setdefault(key, {}).update(value)
            elif isinstance(value, list):
                self.result.setdefault(key, []).extend(value)
            else:
                self.result[key] = value

    def save(self) -> None:
        """Write the file, whole or not at all."""
        from fastclip.bench.results import write_json

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.result)

    def summarize(self) -> None:
        """Compare with the figures to reach, and say what failed and where everything is."""
        from gpu_suite.targets import evaluate, evaluate_steps

        self.result["targets"] = {}
        for name in self.names:
            checks, gbps = self.result["checks"].get(name, {}), self.result["copy_gbps"]
            clips, steps = (
                [row for row in self.result.get(key, []) if name in row["device_ms"]]
                for key in ("clips", "steps")
            )
            targets = [
                *evaluate(name, clips, checks.get("launches", {}), gbps),
                *evaluate_steps(name, steps, checks.get("step_launches", {}), gbps),
            ]
            self.result["targets"][name] = [target.as_json() for target in targets]
            print(f"\n{name}:", *targets, sep="\n  ", flush=True)
        self.save()
        for what, complaint in self.failures().items():
            print(f"FAILED {what}: {complaint.splitlines()[0]}", flush=True)
        print(f"wrote {self.path}", flush=True)
        if self.result.get("clips"):
            plot(self.path)

    def failures(self) -> dict[str, str]:
        """Return what failed -> why: sections and checks."""
        failed = dict(self.result["failed_sections"])
        for name, parts in self.result["checks"].items():
            failed |= {f"{name}: {part}": complaint for part, complaint in parts["failed"].items()}
        return failed

    def exit_code(self) -> int:
        """Return 0 if nothing failed, or, in a dry run, only what fails on purpose."""
        expected = {"fail"} if self.options.cpu_dry_run else set()
        return 0 if set(self.failures()) == expected else 1


def watch(command: list[str], limit_s: float) -> str | None:
    """Run a command, pass its output on, and return why it failed: its last lines, or the time limit."""
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        process.wait()
        timed_out = not timer.is_alive()
        timer.cancel()
    if process.returncode == 0:
        return None
    how = f"took more than {limit_s:.0f} s" if timed_out else f"exit code {process.returncode}"
    last = [line.rstrip() for line in lines[-MAX_LINES_SHOWN:]]
    return "\n".join([f"{how}: {last[-1] if last else 'no output'}", *last])


def plot(path: Path) -> None:
    """Draw a run beside its file, if matplotlib is there."""
    try:
        from gpu_suite.plot import save_plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: matplotlib is not installed", flush=True)
        return
    save_plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
