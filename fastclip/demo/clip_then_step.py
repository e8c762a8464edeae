"""What `ClippedOptimizer` is compared with: torch's clipping and the optimizer's own step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.optim import Outcome, Stats
from fastclip.optim.outcome import Tally
from fastclip.reference import NORM_EPSILON


class ClipThenStep:
    """Calls `torch.nn.utils.clip_grad_norm_` and then the optimizer's step.

    Counts as `ClippedOptimizer` does, but only when it is asked, so that counting takes no time of the step.
    """

    def __init__(self, optimizer: Optimizer, max_norm: float) -> None:
        self._optimizer, self._max_norm = optimizer, max_norm
        self._params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._norms: list[Tensor] = []

    def step(self) -> None:
        """Clip and update."""
        self._norms.append(torch.nn.utils.clip_grad_norm_(self._params, self._max_norm))
        self._optimizer.step()

    def zero_grad(self) -> None:
        """Reset the gradients."""
        self._optimizer.zero_grad()

    @property
    def last(self) -> Outcome | None:
        """Return what happened in the latest step."""
        return self._outcome(self._norms[-1]) if self._norms else None

    def stats(self) -> Stats:
        """Return what happened in all steps."""
        tally = Tally()
        for norm in self._norms:
            tally.add(self._outcome(norm))
        return tally.stats()

    def _outcome(self, norm: Tensor) -> Outcome:
        coefficient = torch.clamp(self._max_norm / (norm + NORM_EPSILON), max=1.0)
        return Outcome(norm, coefficient, skipped=torch.zeros_like(norm, dtype=torch.bool))
