"""The figures to reach on an H100 or H200, and whether a run reached them. Ratios are within the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fastclip.bench.steps import FUSED, STEP_MODES

BYTES_OF_A_GIGABYTE = 1e9
BYTES_OF_100_MB = 1e8


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        name: What is measured.
        unit: Of both figures.
        limit: What is to be reached.
        at_most: Whether less is better.
        reached: What was measured, None if the run has no such row.
    """

    name: str
    unit: str
    limit: float
    at_most: bool
    reached: float | None

    @property
    def met(self) -> bool | None:
        """Whether it was; None if it was not measured."""
        if self.reached is None:
            return None
        return self.reached <= self.limit if self.at_most else self.reached >= self.limit

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "met": self.met}

    def __str__(self) -> str:
        """Return one line for a log."""
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        reached = "" if self.reached is None else f"{self.reached:.4g} "
        sign = "<=" if self.at_most else ">="
        return f"{verdict:<12} {self.name}: {reached}({sign} {self.limit:g} {self.unit})"


def evaluate(backend: str, run: dict[str, Any]) -> Iterator[Target]:
    """Compare what one backend did in a run, as its file has it, with every figure."""
    clips, steps = (Figures(backend, run, rows) for rows in ("clips", "steps"))
    big, tiny, wide = "llama3-8b", "2000-tiny", "bf16-6000261x256"

    def at_most(limit: float, unit: str, name: str, reached: float | None) -> Target:
        return Target(name, unit, limit, True, reached)

    def at_least(limit: float, name: str, reached: float | None) -> Target:
        return Target(name, "x", limit, False, reached)

    yield at_most(2, "kernels", "kernels per call", clips.most("launches", "kernels"))
    yield at_most(0, "calls", "synchronizing calls", clips.most("launches", "waits"))
    yield at_least(0.9, "norm of 1 GB or more, of the copy bandwidth", clips.norm_share())
    over = "torch foreach over fastclip"
    yield at_least(2.5, f"{over}, Llama-3-8B inactive", clips.ratio(big, "inactive"))
    yield at_least(1.15, f"{over}, Llama-3-8B active", clips.ratio(big, "active"))
    yield at_most(0.5, "ms", "host time, 2000 tiny tensors", clips.median(tiny, "active", "host_ms"))
    yield at_least(10, f"{over}, same", clips.ratio(tiny, "active", "host_ms"))
    yield at_most(4.0, "ms", "bfloat16 tensor of 6,000,261 x 256, active", clips.median(wide, "active"))
    yield at_most(2e-7, "relative", "error of the norm", clips.error())
    yield at_most(1.25, "x", "Triton over CUDA, 100 MB or more", clips.triton_over_cuda())
    yield at_most(3, "kernels", "kernels per step", steps.most("step_launches", "kernels"))
    yield at_most(0, "calls", "synchronizing calls per step", steps.most("step_launches", "waits"))
    for mode in STEP_MODES:
        ratio = steps.ratio(big, f"adamw {mode}", peer=FUSED)
        yield at_least(1.2, f"torch clip + fused AdamW over fastclip, Llama-3-8B {mode}", ratio)
    yield at_most(2e-7, "relative", "error of the norm of a step", steps.error())


class Figures:
    """What the rows of a run say about one backend; None where they say nothing."""

    def __init__(self, backend: str, run: dict[str, Any], rows: str) -> None:
        """Take the rows of one part of the run that have the backend."""
        self.backend = backend
        self.copy_gbps = run["copy_gbps"]
        self.rows = [row for row in run.get(rows, ()) if backend in row["device_ms"]]
        self.checks = run["checks"].get(backend, {})

    def most(self, launches: str, kind: str) -> float | None:
        """Return the most that was counted of any call."""
        return _largest(counts[kind] for counts in self.checks.get(launches, {}).values())

    def median(
        self, workload: str, mode: str, clock: str = "device_ms", peer: str | None = None
    ) -> float | None:
        """Return the median time of one peer, of the backend unless told otherwise."""
        for row in self.rows:
            if (row["workload"], row["mode"]) == (workload, mode):
                times = row[clock].get(peer or self.backend)
                return float(times["50"]) if times else None
        return None

    def ratio(
        self, workload: str, mode: str, clock: str = "device_ms", peer: str = "torch_foreach"
    ) -> float | None:
        """Return how many times longer a peer takes."""
        ours, theirs = map(partial(self.median, workload, mode, clock), (None, peer))
        return theirs / ours if ours and theirs else None

    def norm_share(self) -> float | None:
        """Return the smallest part of the copy bandwidth that a long norm reached."""
        norms = (r for r in self.rows if r["mode"] == "norm" and r["nbytes"] >= BYTES_OF_A_GIGABYTE)
        return min((row["gbps"][self.backend] / self.copy_gbps for row in norms), default=None)

    def error(self) -> float | None:
        """Return the largest relative error of a norm."""
        return _largest(row["relative_errors"][self.backend] for row in self.rows)

    def triton_over_cuda(self) -> float | None:
        """Return the largest ratio of the two backends' times."""
        return _largest(
            row["device_ms"]["triton"]["50"] / row["device_ms"]["cuda"]["50"]
            for row in self.rows
            if row["nbytes"] >= BYTES_OF_100_MB and {"triton", "cuda"} <= set(row["device_ms"])
        )


def _largest(values: Iterable[float]) -> float | None:
    return max(values, default=None)
