"""What a measurement was made on: hardware, versions, and the state of the code."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import fastclip
from fastclip import backends

UNKNOWN = "unknown"

# What a figure depends on; a change elsewhere (a README, an earlier result) leaves the commit clean.
MEASURED_PATHS = ("fastclip", "csrc", "setup.py", "pyproject.toml")


@dataclass(frozen=True)
class Hardware:
    """The machine as this process sees it.

    Attributes:
        cpu: Model name.
        num_cores: Cores that the process may run on.
        instruction_set: What the CPU kernels use.
    """

    cpu: str
    num_cores: int
    instruction_set: str


@dataclass(frozen=True)
class Environment:
    """Everything beside the options that a figure depends on.

    Attributes:
        commit: Abbreviated hash, with `-dirty` when the measured code differs from it.
        date: UTC, ISO 8601, to the minute.
        backend: What fastclip was told to use, `auto` unless someone chose.
        versions: Component -> version.
    """

    commit: str
    date: str
    backend: str
    hardware: Hardware
    versions: dict[str, str]


def environment() -> Environment:
    """Describe this machine, this installation and this checkout."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    return Environment(commit(), date, backends.chosen(), hardware(), versions())


def hardware() -> Hardware:
    """Describe the CPU."""
    return Hardware(cpu_model(), num_cores(), instruction_set())


def versions() -> dict[str, str]:
    """Return the versions of fastclip and of what it runs on."""
    return {
        "fastclip": fastclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(terse=True),
    }


def commit() -> str:
    """Return the commit of the checkout that the package lies in; `unknown` outside one."""
    root = Path(fastclip.__file__).resolve().parents[1]
    if _git(root, "ls-files", "--error-unmatch", "fastclip/__init__.py") is None:
        return UNKNOWN
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return UNKNOWN
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *MEASURED_PATHS)
    return f"{head}-dirty" if changes else head


def cpu_model() -> str:
    """Return the model name of the CPU, or the architecture where no name is told."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(root: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(root), *arguments)


def _output(*command: str) -> str | None:
    """Return what a command prints, None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def instruction_set() -> str:
    """Return the instruction set that the CPU kernels use; `none` without the extension."""
    return fastclip.backend_info()["cpu"].details.get("instruction set", "none")
