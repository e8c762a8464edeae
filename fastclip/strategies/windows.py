"""The latest norms, on their device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def empty(length: int, like: Tensor) -> Tensor:
    """Return a window that has seen nothing: all nan, with the latest to come last."""
    return like.new_full((length,), math.nan)


def push(window: Tensor, norm: Tensor) -> None:
    """Put a norm, unless it is not finite, behind the others, of which the oldest drops out; in place."""
    shifted = torch.cat((window[1:], norm.reshape(1)))
    torch.where(norm < math.inf, shifted, window, out=window)  # False of nan


def while_few(median: Tensor, factor: float) -> Tensor:
    """Return factor * median of the norms so far; inf before the first."""
    return median.mul(factor).nan_to_num_(math.inf, math.inf)


def once_full(window: Tensor, fewest: int, value: Tensor, early: float | Tensor = math.inf) -> Tensor:
    """Return a value if the window holds that many norms, else what is to count until then; 0-dim."""
    return torch.where(window[-fewest].isnan(), early, value)
