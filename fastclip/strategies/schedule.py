"""A threshold that is a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastclip.strategies.base import Global


class Schedule(Global):
    """threshold = c(step).

    The host asks for it: a captured graph goes on with the threshold of the step that was captured. Write
    into a tensor given as max_norm to change it between replays.

    Args:
        max_norm: Returns the threshold, > 0 or inf, of a step; the first is 0, and steps that are left out
            count. To copy and pickle the strategy, give what can be pickled.

    Source:
        Own; schedules of the learning rate, torch.optim.lr_scheduler.LambdaLR.
    """

    def __init__(self, max_norm: Callable[[int], float]) -> None:
        super().__init__()
        if not callable(max_norm):
            raise TypeError(f"Schedule: max_norm={max_norm!r}; expected a function step -> threshold.")
        self.max_norm = max_norm
        self._step = 0

    def threshold(self, norm: Tensor) -> Tensor:
        """Return c(step)."""
        value = float(self.max_norm(self._step))
        if not value > 0:
            raise ValueError(f"Schedule: max_norm({self._step}) is {value}; expected a number > 0.")
        return norm.new_full((), value)

    def observe(self, norm: Tensor) -> None:
        """Count the step."""
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the class and the number of steps so far."""
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a step."""
        state = dict(state_dict)
        step = state.pop("step", 0)
        super().load_state_dict(state)
        self._step = int(step)
