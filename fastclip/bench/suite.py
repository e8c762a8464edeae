"""A run on a GPU: the processes of its sections, and the file that grows with them.

Each section runs in a process of its own, and the file is written after each: one that fails, or loses the
device, is named and the rest still runs in a fresh process. What failed its checks is not timed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastclip
from fastclip.bench.results import read_run, write_json
from fastclip.bench.sections import unproven_peers
from fastclip.bench.targets import evaluate

SCHEMA = "fastclip-gpu/2"

# Section -> seconds after which it begins nothing more.
FULL_S = {"checks": 90, "clips": 130, "steps": 70, "training": 60, "distributed": 10, "compiled": 60}
QUICK_S = {"checks": 60, "clips": 30, "steps": 20, "training": 20, "distributed": 5}
DRY_S = dict.fromkeys(FULL_S, 60)
SECTIONS = tuple(FULL_S)
CHECKED = {"clips", "steps", "compiled"}
# What beginning a process and ending the row at hand may take on top.
GRACE_S = 90
MAX_LINES_SHOWN = 15


class NoDeviceError(Exception):
    """There is no GPU, or no backend of fastclip for it."""


@dataclass(frozen=True)
class SuiteOptions:
    """What to run.

    Attributes:
        sections: Of SECTIONS; none for all. Checks come before whatever times a backend.
        quick: Only the key workloads, for a shorter time.
        dry: The CPU in place of the GPU.
        json_path: Where to write.
        folder: Where to write a file that is named after the GPU, without json_path.
    """

    sections: tuple[str, ...] = ()
    quick: bool = False
    dry: bool = False
    json_path: Path | None = None
    folder: Path = Path()

    @property
    def budgets(self) -> dict[str, int]:
        """Return section -> seconds."""
        return DRY_S if self.dry else QUICK_S if self.quick else FULL_S

    @property
    def wanted(self) -> set[str]:
        """Return the sections to run."""
        wanted = set(self.sections or self.budgets)
        return wanted | {"checks"} if wanted & CHECKED else wanted


def run_suite(options: SuiteOptions) -> int:
    """Run sections, print what they find, write the file and its picture; return the exit code.

    Raises:
        NoDeviceError: There is nothing to run on.
        ValueError: There is no such section.
    """
    for name in options.sections:
        if name not in SECTIONS:
            raise ValueError(f"run_suite: no section {name!r}; expected one of {', '.join(SECTIONS)}.")
    if not options.dry and not torch.cuda.is_available():
        raise NoDeviceError("torch sees no GPU. Run on one, or `python benchmarks/gpu.py --cpu-dry-run`.")
    suite = Suite(options)
    suite.describe()
    for name in options.budgets:
        if name in options.wanted:
            suite.section(name)
    if options.dry:
        suite.section("fail")
    suite.summarize()
    return suite.exit_code()


class Suite:
    """One run."""

    def __init__(self, options: SuiteOptions) -> None:
        """Begin with nothing."""
        self.options = options
        self.names: list[str] = []
        self.path = options.json_path or options.folder / "gpu-dry-run.json"
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "dry_run": options.dry,
            "quick": options.quick,
            "environment": {},
            "checks": {},
            "failed_sections": {},
            "seconds": {},
        }

    def describe(self) -> None:
        """Ask a first process for the device and the backends.

        Raises:
            NoDeviceError: There is no device, or no backend for it.
        """
        complaint = self._child("describe", [])
        if complaint:
            raise NoDeviceError(complaint.splitlines()[0])
        self.names = self.result.pop("names")
        gpu = self.result["environment"]["gpu"]
        print(f"{gpu or 'CPU, dry run'}: {', '.join(self.names)}", flush=True)
        if gpu and not self.options.json_path:
            name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
            self.path = self.options.folder / f"gpu-{name}{'-quick' if self.options.quick else ''}.json"

    def section(self, name: str) -> None:
        """Run a section; of the checks, one process for each backend."""
        if name != "checks":
            self._note(name, self._child(name, self.names))
            return
        for backend in self.names:
            complaint = self._child(name, [backend])
            if complaint:
                parts = self.result["checks"].setdefault(backend, {"failed": {}})
                parts["failed"]["process"] = complaint
            self._note(f"{name} of {backend}", complaint)

    def _note(self, name: str, complaint: str | None) -> None:
        """Keep what is wrong with a section, and what the others have found."""
        if complaint:
            self.result["failed_sections"][name] = complaint
            print(f"FAILED section {name}: {complaint}", flush=True)
        self.save()

    def _child(self, name: str, names: list[str]) -> str | None:
        """Run one section in a process of its own and take what it found; return what went wrong."""
        seconds = self.options.budgets.get(name, GRACE_S)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            options = {
                "section": name,
                "path": str(found),
                "names": names,
                "unproven": unproven_peers(self.result["checks"], of_steps=name == "steps"),
                "seconds": seconds,
                "quick": self.options.quick,
                "dry": self.options.dry,
            }
            complaint = watch(
                [sys.executable, "-m", "fastclip.bench.sections", json.dumps(options)], seconds + GRACE_S
            )
            if found.exists():
                self.take(read_run(found))
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.result)

    def summarize(self) -> None:
        """Compare with the figures to reach, and say what failed and where everything is."""
        self.result["targets"] = {}
        for name in self.names:
            targets = list(evaluate(name, self.result))
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
        expected = {"fail"} if self.options.dry else set()
        return 0 if set(self.failures()) == expected else 1


def watch(command: list[str], limit_s: float) -> str | None:
    """Run a command, pass its output on, and return why it failed: its last lines, or the time limit.

    It finds the package where this process has found it, installed or not.
    """
    lines: list[str] = []
    root = Path(fastclip.__file__).parents[1]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
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
        from fastclip.bench.device_plot import save_plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: matplotlib is not installed", flush=True)
        return
    save_plot(read_run(path), path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}", flush=True)
