"""What happened in a step, and in all of them, on the device until someone asks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastclip.backends.step import Stepped


class Outcome:
    """What happened in one step: 0-dim tensors on the device of the gradients.

    Numbers that the host knows become tensors when they are asked for: with small parameters, making them
    costs more than the step.
    """

    threshold: float | Tensor | None = None
    """What the norm was clipped to, as a strategy set it; None where the caller set it, or for several."""

    def __init__(
        self, total_norm: Tensor, clip_coef: Tensor, skipped: Tensor, threshold: float | Tensor | None = None
    ) -> None:
        """Take tensors of one device."""
        self.threshold = threshold
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = (total_norm, clip_coef, skipped)
        self._numbers: tuple[float, float, bool] | None = None
        self._dtype = total_norm.dtype

    @classmethod
    def of_numbers(cls, total_norm: float, clip_coef: float, skipped: bool, dtype: torch.dtype) -> Outcome:
        """Return an outcome that the host knows; `dtype` is that of norm and coefficient."""
        outcome = cls.__new__(cls)
        outcome._tensors, outcome._numbers, outcome._dtype = None, (total_norm, clip_coef, skipped), dtype
        return outcome

    @classmethod
    def of(cls, answer: Stepped) -> Outcome:
        """Return what a backend said of a step."""
        norm, coef, skipped, dtype = answer
        if isinstance(skipped, Tensor):
            return cls(norm, coef, skipped)  # type: ignore[arg-type]  # tensors, all or none
        return cls.of_numbers(norm, coef, skipped, dtype)  # type: ignore[arg-type]

    @property
    def total_norm(self) -> Tensor:
        """Return the norm before clipping, of the gradients divided by a GradScaler's scale."""
        return self._as_tensors()[0]

    @property
    def clip_coef(self) -> Tensor:
        """Return what the gradients were multiplied by; the smallest, where each has a coefficient."""
        return self._as_tensors()[1]

    @property
    def skipped(self) -> Tensor:
        """Return whether parameters and state were left as they were; bool."""
        return self._as_tensors()[2]

    def numbers(self) -> tuple[float, float, bool] | None:
        """Return norm, coefficient and skip if they are at hand without a synchronization, else None."""
        if self._numbers is None and self.total_norm.device.type == "cpu":
            self._numbers = float(self.total_norm), float(self.clip_coef), bool(self.skipped)
        return self._numbers

    def _as_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._tensors is None:
            assert self._numbers is not None  # one of the two is there from the start
            norm, coef, skipped = self._numbers
            self._tensors = (
                torch.scalar_tensor(norm, dtype=self._dtype, device="cpu"),
                torch.scalar_tensor(coef, dtype=self._dtype, device="cpu"),
                torch.scalar_tensor(skipped, dtype=torch.bool, device="cpu"),
            )
        return self._tensors

    def __repr__(self) -> str:
        """Return the three tensors."""
        return f"Outcome(total_norm={self.total_norm}, clip_coef={self.clip_coef}, skipped={self.skipped})"


NO_GRADIENTS = Outcome.of_numbers(0.0, 1.0, False, torch.float32)


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


COUNTS = ("clipped", "skipped", "steps", "consecutive_skips", "largest_norm")
"""Fields of `Stats` in the order in which steps are counted, also by step.cu and kernels/coefficients.py."""


class Tally:
    """Counts outcomes where they are, so that counting never synchronizes.

    On a device the counts are changed in place: a captured step goes on counting when its graph is replayed.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        self.last: Outcome | None = None
        # On the host until an outcome is not.
        self._counts: list[float] | Tensor = [0.0] * len(COUNTS)

    def add(self, outcome: Outcome) -> None:
        """Count one step."""
        self.last = outcome
        numbers = outcome.numbers()
        if numbers is None or isinstance(self._counts, Tensor):
            self._add_on_device(outcome)
            return
        clipped, skipped, steps, consecutive, largest = self._counts
        norm, coef, left_out = numbers
        self._counts = [
            clipped + (coef < 1 and not left_out),
            skipped + left_out,
            steps + 1,
            (consecutive + 1) * left_out,
            max(largest, norm) if math.isfinite(norm) else largest,
        ]

    def _add_on_device(self, outcome: Outcome) -> None:
        """Count in eight small operations; a step without gradients has its outcome on the host."""
        where = self._counts if isinstance(self._counts, Tensor) else outcome.total_norm
        counts = self.counts_on(where.device)
        norm, coef, skipped = (
            value.to(counts.device, non_blocking=True)
            for value in (outcome.total_norm, outcome.clip_coef, outcome.skipped)
        )
        counts[:2].add_(torch.stack(((coef < 1) > skipped, skipped)))
        counts[2:4].add_(1)
        counts[3].mul_(skipped)
        torch.maximum(counts[4], norm.to(counts.dtype).nan_to_num(0.0, 0.0), out=counts[4])

    def counts_on(self, device: torch.device) -> Tensor:
        """Return the counts, from now on on this device, for a kernel that counts a step into them itself.

        They stand in the order of COUNTS; float64 where there is one.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        if not isinstance(self._counts, Tensor):
            self._counts = torch.tensor(self._counts, dtype=dtype, device="cpu")
        if self._counts.device != device:
            self._counts = self._counts.to(device, dtype, non_blocking=True)
        return self._counts

    def stats(self) -> Stats:
        """Return all counts; synchronizes if the outcomes are on a device."""
        counts = self._counts.tolist() if isinstance(self._counts, Tensor) else self._counts
        clipped, skipped, steps, consecutive, largest = counts
        return Stats(int(steps), int(clipped), int(skipped), int(consecutive), largest)

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers, for a checkpoint."""
        return asdict(self.stats())

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """Go on from a checkpoint; None, from an optimizer without fastclip, starts from nothing."""
        self.last = None
        self._counts = [0.0 if state is None else float(state[name]) for name in COUNTS]
