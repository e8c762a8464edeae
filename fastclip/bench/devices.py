"""Where things are timed: the CPU, or a CUDA device with its clocks, cold caches, graphs and memory."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

import fastclip
from fastclip.bench.environment import environment
from fastclip.bench.timing import MIN_ROUNDS, Call, Measurement, interleave, wall_clock

# Copies of the gradients that calls take turns over, where the caches could hold more than one.
NUM_SETS = 4
MAX_NBYTES_IN_TURNS = 512 * 2**20

# Parts of it have no types.
cuda: Any = torch.cuda

Stopwatch = Callable[[Call], float]
Times = tuple[dict[str, Measurement], dict[str, Measurement]]
"""Peer -> times of the device, and of the host where these are something else."""


class Device:
    """The CPU, whose times are the caller's and whose caches stay as the calls leave them."""

    torch_device = torch.device("cpu")
    is_accelerator = False  # for whom workloads are large
    captures = False  # whether calls can be captured in a graph
    has_cold_caches = False
    block_numel = 1 << 15
    """Elements looked at together: their float64 copies stay in the second-level cache, and torch opens no
    parallel region for so few, which on a busy machine costs far more than it gains."""

    def time(self, calls: Mapping[str, Call], *, budget_s: float, before: Call | None = None) -> Times:
        """Time calls in alternation; arguments as those of `interleave`."""
        return interleave(calls, budget_s=budget_s, before=before), {}

    def num_sets(self, nbytes: int) -> int:
        """Return how many copies of so many bytes it takes for the caches to hold none of them."""
        return 1


CPU = Device()


class Cuda(Device):
    """A CUDA or ROCm device.

    Times are taken with cold caches: before each call a buffer of twice the second-level cache is written.
    """

    is_accelerator = captures = has_cold_caches = True
    block_numel = 1 << 24
    min_rounds = MIN_ROUNDS
    copy_nbytes = 2**31

    # The most that a spinning kernel delays the device, so that the host is ahead of it whatever it launches.
    max_delay_ms = 60.0
    # Above every clock that a multiprocessor runs at, so the delay is at least what was asked for.
    cycles_per_ms = 2_200_000

    def __init__(self) -> None:
        """Take the current device."""
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch_device)
        cache_nbytes = getattr(self.properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(2 * cache_nbytes, dtype=torch.int8, device=self.torch_device)
        self.delay_ms = 1.0

    def time(self, calls: Mapping[str, Call], *, budget_s: float, before: Call | None = None) -> Times:
        """Time calls on the host first: the delay that lets it run ahead of the device follows from that."""
        host = self.interleave(calls, self.host_seconds, budget_s / 3, before)
        self.delay_ms = 1.5 * max(m.median_ms for m in host.values()) + 0.5
        return self.interleave(calls, self.device_seconds, budget_s, before), host

    def interleave(
        self,
        calls: Mapping[str, Call],
        stopwatch: Stopwatch,
        budget_s: float,
        before: Call | None = None,
    ) -> dict[str, Measurement]:
        """Time calls in alternation by one of the clocks below."""
        return interleave(
            calls,
            budget_s=budget_s,
            before=before,
            stopwatch=stopwatch,
            min_rounds=self.min_rounds,
            max_rounds=200,
        )

    def num_sets(self, nbytes: int) -> int:
        """Return how many copies of so many bytes it takes for the caches to hold none of them."""
        return NUM_SETS if nbytes <= MAX_NBYTES_IN_TURNS else 1

    def device_seconds(self, call: Call) -> float:
        """Time a call on the device, without what the host needs to launch it.

        A kernel that spins lets the host queue the whole call before its first kernel starts.
        """
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        cuda._sleep(int(min(self.delay_ms, self.max_delay_ms) * self.cycles_per_ms))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def host_seconds(self, call: Call) -> float:
        """Time a call until it returns, on an idle device, without waiting for the device."""
        self._flush.zero_()
        self.synchronize()
        elapsed = wall_clock(call)
        self.synchronize()
        return elapsed

    def whole_seconds(self, call: Call) -> float:
        """Time a call until the device has done all of it."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize()

    def free_nbytes(self) -> int:
        """Return how much memory torch could still allocate."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def copy_gbps(self) -> float:
        """Return the bandwidth of a device-to-device copy, bytes read and bytes written together."""
        source = torch.empty(self.copy_nbytes // 4, device=self.torch_device).normal_()
        target = torch.empty_like(source)
        seconds = [self.device_seconds(lambda: target.copy_(source)) for _ in range(12)]
        return 2 * source.nbytes / statistics.median(seconds[2:]) / 1e9

    def capture(self, call: Callable[[], Any], *, warm_up: bool = True) -> tuple[Call, Any]:
        """Return the replay of a CUDA graph of one call, and what it returned, whose memory is the graph's.

        Runs the call once on a side stream before, as torch asks, unless the caller has done so.
        """
        if warm_up:
            side = cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def describe(self) -> dict[str, Any]:
        """Return what figures depend on."""
        env = environment()
        backends = {name: info.details for name, info in fastclip.backend_info().items() if info.available}
        return {
            **{"commit": env.commit, "date": env.date, **asdict(env.hardware), **env.versions},
            "backends": backends,
            **self._describe_gpu(),
        }

    def _describe_gpu(self) -> dict[str, Any]:
        return {
            "gpu": self.properties.name,
            "num_units": self.properties.multi_processor_count,
            "memory_nbytes": self.properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }


class Dry(Cuda):
    """The CPU in place of a CUDA device, to run every line that needs no GPU; its times mean nothing."""

    is_accelerator = captures = False
    block_numel = Device.block_numel
    min_rounds = 2
    copy_nbytes = 2**24

    def __init__(self) -> None:
        """Take the CPU."""
        self._flush = torch.empty(1)

    def device_seconds(self, call: Call) -> float:
        """Time a call."""
        return wall_clock(call)

    def synchronize(self) -> None:
        """Do nothing: the CPU is never behind."""

    def free_nbytes(self) -> int:
        """Return a small allowance."""
        return 2**30

    def _describe_gpu(self) -> dict[str, Any]:
        return {"gpu": None}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
