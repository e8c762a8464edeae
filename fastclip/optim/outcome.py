"""What happened in a step, and in all of them, on the device until someone asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHECKPOINT_KEY = "fastclip"
"""Under which the counters stand in a `state_dict`."""


class Outcome(NamedTuple):
    """What happened in one step: 0-dim tensors on the device of the gradients.

    Attributes:
        total_norm: Before clipping, of the gradients divided by a GradScaler's scale; float32 or float64.
        clip_coef: What they were multiplied by, at most 1.
        skipped: bool; whether parameters and state were left as they were.
    """

    total_norm: Tensor
    clip_coef: Tensor
    skipped: Tensor

    @classmethod
    def on_cpu(cls, total_norm: float, clip_coef: float, skipped: bool, dtype: torch.dtype) -> Outcome:
        """Return an outcome from numbers."""
        return cls(
            torch.scalar_tensor(total_norm, dtype=dtype, device="cpu"),
            torch.scalar_tensor(clip_coef, dtype=dtype, device="cpu"),
            torch.scalar_tensor(skipped, dtype=torch.bool, device="cpu"),
        )


NO_GRADIENTS = Outcome.on_cpu(0.0, 1.0, False, torch.float32)


@dataclass(frozen=True)
class Stats:
    """What happened in all steps so far.

    Attributes:
        steps: All of them, the skipped ones included.
        clipped: Those whose coefficient was below 1.
        skipped: Those that left everything as it was.
        consecutive_skips: How many of the latest were skipped in a row.
        largest_norm: The largest finite total norm.
    """

    steps: int
    clipped: int
    skipped: int
    consecutive_skips: int
    largest_norm: float

    @property
    def clip_fraction(self) -> float:
        """Return the share of steps that were clipped; 0 before the first."""
        return self.clipped / self.steps if self.steps else 0.0


class Tally:
    """Counts outcomes where their tensors are, so that counting never synchronizes.

    The counts are changed in place: a captured step goes on counting when its graph is replayed.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        self.last: Outcome | None = None
        # clipped, skipped, steps, consecutive skips, largest norm
        self._counts = torch.zeros(5, device="cpu")

    def add(self, outcome: Outcome) -> None:
        """Count one step, in eight small operations."""
        self.last = outcome
        device = outcome.total_norm.device
        if self._counts.device.type == "cpu":
            self._counts = self._counts.to(device, non_blocking=True)
        elif device != self._counts.device:  # a step without gradients has its outcome on the CPU
            outcome = Outcome(*(value.to(self._counts.device, non_blocking=True) for value in outcome))
        counts, skipped = self._counts, outcome.skipped
        clipped = (outcome.clip_coef < 1) > skipped
        counts[:2].add_(torch.stack((clipped, skipped)))
        counts[2:4].add_(1)
        counts[3].mul_(skipped)
        finite_norm = outcome.total_norm.float().nan_to_num(0.0, 0.0)
        torch.maximum(counts[4], finite_norm, out=counts[4])

    def counts_on(self, device: torch.device) -> Tensor:
        """Return the counts, from now on on this device, for a kernel that counts a step there itself."""
        if self._counts.device != device:
            self._counts = self._counts.to(device, non_blocking=True)
        return self._counts

    def stats(self) -> Stats:
        """Return all counts; synchronizes if the outcomes are on a device."""
        clipped, skipped, steps, consecutive, largest = self._counts.tolist()
        return Stats(int(steps), int(clipped), int(skipped), int(consecutive), largest)

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers, for a checkpoint."""
        stats = self.stats()
        return {
            "steps": stats.steps,
            "clipped": stats.clipped,
            "skipped": stats.skipped,
            "consecutive_skips": stats.consecutive_skips,
            "largest_norm": stats.largest_norm,
        }

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Go on from a checkpoint; None, from an optimizer without fastclip, starts from nothing."""
        self.__init__()  # type: ignore[misc]
        if state is not None:
            names = ("clipped", "skipped", "steps", "consecutive_skips", "largest_norm")
            self._counts = torch.tensor([float(state[name]) for name in names], device="cpu")
