"""What a strategy costs on top of a fixed threshold: the clipped AdamW step of GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import AdamW

from fastclip import ClippedOptimizer, strategies
from fastclip.bench.models import WORKLOADS
from fastclip.bench.runner import torch_threads
from fastclip.bench.timing import Call, Measurement, interleave

FIXED = "fixed"

TIMED: dict[str, Callable[[], Any]] = {
    FIXED: lambda: 1.0,
    "Percentile": strategies.Percentile,
    "Percentile(window=1000)": partial(strategies.Percentile, window=1000),
    "ZScore": strategies.ZScore,
    "MedianMAD": strategies.MedianMAD,
    "QuantileServo": strategies.QuantileServo,
    "Ema": strategies.Ema,
    "Skip(MedianMAD)": lambda: strategies.Skip(strategies.MedianMAD()),
    "Ema(per_tensor=True)": partial(strategies.Ema, per_tensor=True),
    "PerTensor": strategies.PerTensor,
    "BlockRMS": strategies.BlockRMS,
    "NormStabilised": strategies.NormStabilised,
    "Value": partial(strategies.Value, 1e9),
    "AGC": partial(strategies.AGC, 1e9),
}
"""Name -> makes what goes in the place of max_norm."""


@dataclass(frozen=True)
class CostRow:
    """One strategy.

    Attributes:
        strategy: One of TIMED.
        measurement: Times of a step.
        cost: Of the step with a fixed threshold, median by median: 0.01 is one per cent more.
    """

    strategy: str
    measurement: Measurement
    cost: float


def run_costs(
    *, threads: int, time_budget_s: float, model: str = "gpt2", names: tuple[str, ...] = tuple(TIMED)
) -> list[CostRow]:
    """Time `ClippedOptimizer.step` with each of TIMED, on one set of parameters and state.

    Args:
        threads: CPU threads.
        time_budget_s: Seconds for all together.
        model: One of WORKLOADS.
        names: Of TIMED; the fixed threshold is always among them.
    """
    workload = WORKLOADS[model]
    parameters = workload.parameters(torch.float32)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    clipped = ClippedOptimizer(AdamW(parameters, lr=1e-6), 1.0)

    def step_with(strategy: Any) -> Call:
        def call() -> None:
            clipped.max_norm = strategy
            clipped.step()

        return call

    calls = {name: step_with(TIMED[name]()) for name in dict.fromkeys((FIXED, *names))}
    with torch_threads(threads):
        measured = interleave(calls, budget_s=time_budget_s, min_rounds=3)
    base = measured[FIXED].median_ms
    return [CostRow(name, found, found.median_ms / base - 1) for name, found in measured.items()]
