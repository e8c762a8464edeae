"""The accelerator under test, or the CPU in its place for a dry run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastclip.bench.environment import commit, hardware, num_cores

Call = Callable[[], object]

# The most that a spinning kernel delays the device, so that the host is ahead of it whatever it launches.
MAX_DELAY_MS = 60.0
# Above every clock that a multiprocessor runs at, so the delay is at least what was asked for.
CYCLES_PER_MS = 2_200_000


class Device:
    """A CUDA or ROCm device.

    Times are taken with cold caches: before each call a buffer of twice the second-level cache is written.
    """

    is_accelerator = True

    def __init__(self) -> None:
        """Take the current device."""
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch_device)
        cache_nbytes = getattr(self.properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(2 * cache_nbytes, dtype=torch.int8, device=self.torch_device)
        self.delay_ms = 1.0

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize()

    def free_nbytes(self) -> int:
        """Return how much memory torch could still allocate."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def device_seconds(self, call: Call) -> float:
        """Time a call on the device, without what the host needs to launch it.

        A kernel that spins lets the host queue the whole call before its first kernel starts.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cold()
        torch.cuda._sleep(int(min(self.delay_ms, MAX_DELAY_MS) * CYCLES_PER_MS))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def host_seconds(self, call: Call) -> float:
        """Time a call until it returns, on an idle device, without waiting for the device."""
        self._cold()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed

    def wall_seconds(self, call: Call) -> float:
        """Time a call until the device has done all of it."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def copy_gbps(self, nbytes: int = 2**31) -> float:
        """Return the bandwidth of a device-to-device copy, bytes read and bytes written together."""
        source = torch.empty(nbytes // 4, dtype=torch.float32, device=self.torch_device).normal_()
        target = torch.empty_like(source)
        seconds = [self.device_seconds(lambda: target.copy_(source)) for _ in range(12)]
        return 2 * source.nbytes / statistics.median(seconds[2:]) / 1e9

    def describe(self) -> dict[str, Any]:
        """Return what figures depend on."""
        return {
            **_describe(),
            "gpu": self.properties.name,
            "num_units": self.properties.multi_processor_count,
            "memory_nbytes": self.properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }

    def _cold(self) -> None:
        self._flush.zero_()


class DryDevice(Device):
    """The CPU, to run every line that needs no accelerator; its times mean nothing."""

    is_accelerator = False

    def __init__(self) -> None:
        """Take the CPU."""
        self.torch_device = torch.device("cpu")
        self.delay_ms = 0.0

    def synchronize(self) -> None:
        """Do nothing: the CPU is never behind."""

    def free_nbytes(self) -> int:
        """Return a small allowance."""
        return 2**30

    def device_seconds(self, call: Call) -> float:
        """Time a call."""
        return self.host_seconds(call)

    def host_seconds(self, call: Call) -> float:
        """Time a call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def copy_gbps(self, nbytes: int = 2**24) -> float:
        """Return the bandwidth of a small copy."""
        return super().copy_gbps(min(nbytes, 2**24))

    def describe(self) -> dict[str, Any]:
        """Return what there is to say about the CPU."""
        return {**_describe(), "gpu": None}


def _describe() -> dict[str, Any]:
    import platform

    import numpy as np

    import fastclip

    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "cpu": hardware().cpu,
        "num_cores": num_cores(),
        "fastclip": fastclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backends": {name: info.details for name, info in fastclip.backend_info().items() if info.available},
    }


def _driver() -> str | None:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
