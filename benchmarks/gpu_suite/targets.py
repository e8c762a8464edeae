"""The figures to reach on an H100 or H200, and whether a run reached them. Ratios are within the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
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


def evaluate(
    subject: str, rows: list[dict[str, Any]], launches: dict[str, dict[str, int]], copy_gbps: float
) -> list[Target]:
    """Compare what one backend did with every figure.

    Args:
        subject: The backend.
        rows: As `Row.as_json` gives them.
        launches: As `check_launches` gives them, empty if nothing was counted.
        copy_gbps: Bandwidth of a copy in the same run.
    """
    figures = Figures(subject, rows, copy_gbps)
    ratio, median = figures.ratio, figures.median
    kernels = _largest(counts["kernels"] for counts in launches.values())
    waits = _largest(counts["waits"] for counts in launches.values())
    big, tiny, wide = "llama3-8b", "2000-tiny", "bf16-6000261x256"
    return [
        at_most(2, "kernels", "kernels per call", kernels),
        at_most(0, "calls", "synchronizing calls", waits),
        at_least(0.9, "x", "norm of 1 GB or more, of the copy bandwidth", figures.norm_share()),
        at_least(2.5, "x", "torch foreach over fastclip, Llama-3-8B inactive", ratio(big, "inactive")),
        at_least(1.15, "x", "torch foreach over fastclip, Llama-3-8B active", ratio(big, "active")),
        at_most(0.5, "ms", "host time, 2000 tiny tensors", median(tiny, "active", "host_ms")),
        at_least(10, "x", "torch foreach over fastclip, same", ratio(tiny, "active", "host_ms")),
        at_most(4.0, "ms", "bfloat16 tensor of 6,000,261 x 256, active", median(wide, "active")),
        at_most(2e-7, "relative", "error of the norm", figures.error()),
        at_most(1.25, "x", "Triton over CUDA, 100 MB or more", figures.triton_over_cuda()),
    ]


def evaluate_steps(
    subject: str, rows: list[dict[str, Any]], launches: dict[str, dict[str, int]], copy_gbps: float
) -> list[Target]:
    """Compare the folded steps of one backend with every figure; arguments as those of `evaluate`."""
    figures = Figures(subject, rows, copy_gbps)
    kernels = _largest(counts["kernels"] for counts in launches.values())
    waits = _largest(counts["waits"] for counts in launches.values())
    big = "llama3-8b"
    ratios = {mode: figures.ratio(big, f"adamw {mode}", peer=FUSED) for mode in STEP_MODES}
    return [
        at_most(3, "kernels", "kernels per step", kernels),
        at_most(0, "calls", "synchronizing calls per step", waits),
        *(
            at_least(1.2, "x", f"torch clip + fused AdamW over fastclip, Llama-3-8B {mode}", ratio)
            for mode, ratio in ratios.items()
        ),
        at_most(2e-7, "relative", "error of the norm of a step", figures.error()),
    ]


def at_most(limit: float, unit: str, name: str, reached: float | None) -> Target:
    """Return a figure of which less is better."""
    return Target(name, unit, limit, True, reached)


def at_least(limit: float, unit: str, name: str, reached: float | None) -> Target:
    """Return a figure of which more is better."""
    return Target(name, unit, limit, False, reached)


@dataclass(frozen=True)
class Figures:
    """What the rows of a run say about one backend; None where they say nothing."""

    subject: str
    rows: list[dict[str, Any]]
    copy_gbps: float

    def median(
        self, workload: str, mode: str, clock: str = "device_ms", peer: str | None = None
    ) -> float | None:
        """Return the median time of one peer, of the backend unless told otherwise."""
        for row in self.rows:
            if (row["workload"], row["mode"]) == (workload, mode):
                times = row[clock].get(peer or self.subject)
                return float(times[50]) if times else None
        return None

    def ratio(
        self, workload: str, mode: str, clock: str = "device_ms", peer: str = "torch_foreach"
    ) -> float | None:
        """Return how many times longer a peer takes."""
        ours = self.median(workload, mode, clock)
        theirs = self.median(workload, mode, clock, peer)
        return theirs / ours if ours and theirs else None

    def norm_share(self) -> float | None:
        """Return the smallest part of the copy bandwidth that a long norm reached."""
        return min(
            (
                row["gbps"][self.subject] / self.copy_gbps
                for row in self.rows
                if row["mode"] == "norm" and row["nbytes"] >= BYTES_OF_A_GIGABYTE
            ),
            default=None,
        )

    def error(self) -> float | None:
        """Return the largest relative error of a norm."""
        return _largest(row["relative_errors"][self.subject] for row in self.rows)

    def triton_over_cuda(self) -> float | None:
        """Return the largest ratio of the two backends' times."""
        return _largest(
            row["device_ms"]["triton"][50] / row["device_ms"]["cuda"][50]
            for row in self.rows
            if row["nbytes"] >= BYTES_OF_100_MB and {"triton", "cuda"} <= set(row["device_ms"])
        )


def _largest(values: Iterable[float]) -> float | None:
    return max(values, default=None)
