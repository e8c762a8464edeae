"""Measure what fastclip.Monitor costs of a training step of GPT-2 and write benchmarks/results/monitor.json.

    python benchmarks/monitor.py [--json PATH]

The monitor's own calls are timed in the training itself, hooks and writing of blocks included: the difference
of two trainings would drown in their noise. Sequences of 64 tokens make the step short, and so the share of
the monitor large. Needs 3 GB of memory and about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastclip
from fastclip.bench.environment import environment
from fastclip.bench.results import write_json
from fastclip.bench.training import Gpt
from fastclip.files import plain

STEPS = 50
EVERY = 50
TOKENS = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "per_parameter=10": {"per_parameter": 10},
    "per_parameter=True": {"per_parameter": True},
    "update_ratio=True": {"update_ratio": True},
}


class TimedMonitor(fastclip.Monitor):
    """A monitor that adds up the time that it takes in `seconds`, one entry per step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seconds: list[float] = []

    def _before_step(self, *arguments: Any) -> None:
        self.seconds.append(0.0)
        self._timed(super()._before_step, *arguments)

    def _after_step(self, *arguments: Any) -> None:
        self._timed(super()._after_step, *arguments)

    def step(self, loss: float | Tensor | None = None) -> None:
        """Add the loss."""
        self._timed(super().step, loss)

    def _timed(self, call: Callable[..., None], *arguments: Any) -> None:
        start = time.perf_counter()
        call(*arguments)
        self.seconds[-1] += time.perf_counter() - start


def measure(net: Gpt, optimizer: fastclip.ClippedOptimizer, options: dict[str, Any]) -> dict[str, float]:
    """Train and return seconds per step: of all of it, of clip and update, of the monitor."""
    generator = torch.Generator().manual_seed(0)
    whole, clip_and_update = [], []
    with (
        tempfile.TemporaryDirectory() as run,
        TimedMonitor(optimizer, run, model=net, every=EVERY, **options) as monitor,
    ):
        for _ in range(STEPS):
            x = torch.randint(50257, (1, TOKENS + 1), generator=generator)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = net(x)
            loss.backward()
            before_step = time.perf_counter()
            optimizer.step()
            monitor.step(loss)
            end = time.perf_counter()
            whole.append(end - start - monitor.seconds[-1])
            clip_and_update.append(end - before_step - monitor.seconds[-1])
        mean, median = float(np.mean(monitor.seconds)), float(np.median(monitor.seconds))
    return {
        "step_seconds": float(np.median(whole)),
        "clip_and_update_seconds": float(np.median(clip_and_update)),
        "monitor_seconds": mean,
        "monitor_median_seconds": median,
        "share_of_step": mean / float(np.median(whole)),
        "share_of_clip_and_update": mean / float(np.median(clip_and_update)),
    }


def main() -> None:
    """Measure every variant and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "monitor.json")
    path = parser.parse_args().json
    made_on = asdict(environment())  # before: the run takes minutes, in which a file may change
    torch.manual_seed(0)
    net = Gpt()
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-4), max_norm=1.0)
    results = {}
    for name, options in VARIANTS.items():
        results[name] = measure(net, optimizer, options)
        print(name, {key: f"{value:.3g}" for key, value in results[name].items()}, flush=True)
    settings = {
        "steps": STEPS,
        "every": EVERY,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "parameters": len(list(net.parameters())),
        "numel": sum(parameter.numel() for parameter in net.parameters()),
        "optimizer": "AdamW",
        "route": optimizer.route,
    }
    write_json(path, plain({"environment": made_on, "settings": settings, "results": results}))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
