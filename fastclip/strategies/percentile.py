"""A percentile of the norms so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastclip.strategies import windows
from fastclip.strategies.base import Global, checked, count

_FIRST_CAPACITY = 1024


class Percentile(Global):
    """threshold = the p-th percentile of the norms before this step, of all or of the last `window`.

    Between two norms it is interpolated, as numpy does. Norms count as they were before clipping.

    Args:
        p: Of 100; 10 clips nine steps in ten, which makes most steps the same length.
        window: Norms that count; None for all, which are kept sorted: 8 bytes each, 16 on a GPU, and a step
            moves them once. A captured graph, which cannot grow, needs a window.
        warmup: Norms to see before anything is clipped.

    Source:
        Seetharaman, Wichern, Pardo and Le Roux, AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020. There the step's own norm counts, too.
    """

    def __init__(self, p: float = 10.0, window: int | None = None, warmup: int = 1) -> None:
        super().__init__()
        self.p = checked("Percentile", "p", p, lambda x: 0 <= x <= 100, "a number from 0 to 100")
        self.window = None if window is None else count("Percentile", "window", window, 1)
        self.warmup = count("Percentile", "warmup", warmup, 1)
        self._calls: int | None = 0
        self._spare: Tensor | None = None  # the history before the latest norm, which the next one overwrites
        if window is not None and warmup > window:
            raise ValueError(f"Percentile: warmup={warmup} with window={window}; expected warmup <= window.")

    @property
    def grows(self) -> bool:
        """Whether there is no window."""
        return self.window is None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where another run was; waits for the device."""
        super().load_state_dict(state_dict)
        self._calls = None

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        threshold = like.new_full((), math.inf)
        if self.window is not None:
            return {"window": windows.empty(self.window, like), "threshold": threshold}
        history = like.new_full((_FIRST_CAPACITY,), math.inf)
        return {"history": history, "size": like.new_zeros(()), "threshold": threshold}

    def _unlike(self, state: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
        if "history" in state and "history" in expected:
            expected = {**expected, "history": state["history"]}  # which grows
        return super()._unlike(state, expected)

    def threshold(self, norm: Tensor) -> Tensor:
        """Return what the norms before this one give."""
        return self._on(norm)["threshold"]

    def _learn_by(self, kernels: Any, norm: Tensor, skipped: Tensor | None) -> bool:
        if self.window is not None and self.window > kernels.LARGEST_WINDOW:
            return False
        state = self._on(norm.new_empty((), dtype=torch.float64))
        settings = self.p / 100, self.warmup
        if self.window is not None:
            kernels.percentile(norm, skipped, state["window"], state["threshold"], *settings)
            return True
        history, spare = self._with_room(state), self._spare
        if spare is None or spare.shape != history.shape or spare.device != history.device:
            spare = torch.empty_like(history)
        of_all = history, spare, state["size"], state["threshold"]
        kernels.percentile_of_all(norm, skipped, *of_all, *settings)
        state["history"], self._spare = spare, history
        return True

    def observe(self, norm: Tensor) -> None:
        """Count the norm in."""
        state = self._on(norm)
        if self.window is None:
            limit = self._of_all(state, norm)
        else:
            windows.push(state["window"], norm)
            limit = windows.once_full(state["window"], self.warmup, state["window"].nanquantile(self.p / 100))
        state["threshold"].copy_(limit)

    def _of_all(self, state: dict[str, Tensor], norm: Tensor) -> Tensor:
        """Insert a norm into the sorted history and return the percentile, inf while there are too few."""
        history = self._with_room(state)
        seen = norm < math.inf
        place = torch.searchsorted(history, norm.reshape(1))
        index = torch.arange(history.numel(), device=history.device)
        behind = torch.where(index == place, norm, torch.roll(history, 1))
        # What is not finite belongs behind everything: there it changes nothing.
        torch.where(index >= place, behind, history, out=history)
        size = state["size"].add_(seen)
        rank = (size - 1).clamp_(min=0).mul_(self.p / 100)
        below = rank.floor()
        low, high = history[torch.stack((below, rank.ceil())).long()].unbind()
        between = torch.where(high > low, low + (high - low) * (rank - below), low)
        return torch.where(size < self.warmup, math.inf, between)

    def _with_room(self, state: dict[str, Tensor]) -> Tensor:
        """Return the history, with a free place at its end: the host counts steps, not what was seen."""
        history = state["history"]
        if self._calls is None:  # after a copy or a checkpoint
            self._calls = int(state["size"])
        self._calls += 1
        if self._calls >= history.numel():
            history = torch.cat((history, torch.full_like(history, math.inf)))
            state["history"] = history
        return history
