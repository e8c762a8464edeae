"""How a trial clips: to a threshold, or by a strategy that is named."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastclip
from fastclip import strategies
from fastclip.strategies import Strategy

PREFIX = "strategy__"
"""Before a setting of the strategy, as scikit-learn has it: `strategy__k`."""

STRATEGIES: dict[str, type[Strategy]] = {
    name.lower(): kind
    for name, kind in vars(strategies).items()
    if isinstance(kind, type)
    and issubclass(kind, Strategy)
    and not inspect.isabstract(kind)
    and kind not in (strategies.Skip, strategies.Schedule)
}
"""Those that a name and numbers describe."""

ALL_SETTINGS = frozenset(
    PREFIX + name for kind in STRATEGIES.values() for name in inspect.signature(kind).parameters
)


def find_strategy(name: str) -> type[Strategy]:
    """Return the class of this name, in any case and with underscores or without.

    Raises:
        ValueError: the name is unknown.
    """
    if (key := name.lower().replace("_", "")) in STRATEGIES:
        return STRATEGIES[key]
    known = [kind.__name__ for kind in STRATEGIES.values()]
    near = difflib.get_close_matches(key, STRATEGIES, 1)
    hint = f" Did you mean {STRATEGIES[near[0]].__name__!r}?" if near else ""
    raise ValueError(f"strategy={name!r} is unknown; expected one of {', '.join(known)}.{hint}")


def strategy_settings(params: Mapping[str, Any]) -> frozenset[str]:
    """Return the names, with the prefix, of the settings that the strategy of a trial reads."""
    wanted = params.get("strategy")
    if not isinstance(wanted, str):
        return frozenset()
    return frozenset(PREFIX + name for name in inspect.signature(find_strategy(wanted)).parameters)


def make_strategy(params: Mapping[str, Any]) -> Strategy | None:
    """Build the strategy that `strategy` names, with the settings of it that are there; None for none.

    A `Strategy` in the place of a name is copied, so that each training starts from what it was.

    Raises:
        ValueError: the name is unknown, or a setting makes no sense.
        TypeError: it is neither a name nor a strategy.
    """
    wanted = params.get("strategy")
    if wanted is None:
        return None
    if isinstance(wanted, Strategy):
        return copy.deepcopy(wanted)
    if not isinstance(wanted, str):
        raise TypeError(f"strategy={wanted!r}; expected a name such as 'MedianMAD', a strategy or None.")
    settings = {name: params[name] for name in strategy_settings(params) if params.get(name) is not None}
    return find_strategy(wanted)(**{name.removeprefix(PREFIX): value for name, value in settings.items()})


class Clipper:
    """Clips the gradients of one training.

    Reads `strategy` and its settings from params, else `max_norm` (None: only measures), and `norm_type`.

    Attributes:
        clips: Whether anything can be clipped.
    """

    def __init__(self, params: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        self._strategy = make_strategy(params)
        limit = params.get("max_norm")
        self._max_norm = math.inf if limit is None else float(limit)
        self._norm_type = float(params.get("norm_type", 2.0))
        self._parameters = list(parameters)
        self.clips = self._strategy is not None or self._max_norm != math.inf

    def clip(self) -> tuple[Tensor, Tensor, bool]:
        """Clip, and return the norm before, whether something was clipped, and whether to leave the step out.

        The first two are 0-dim tensors; the host waits for the device where a strategy leaves steps out.
        """
        if self._strategy is None:
            norm = fastclip.clip_grad_norm_(self._parameters, self._max_norm, self._norm_type)
            return norm, norm > self._max_norm, False
        norm = self._strategy.clip_grad_norm_(self._parameters, self._norm_type)
        decision = self._strategy.last
        if decision is None:  # there was no gradient
            return norm, torch.zeros_like(norm, dtype=torch.bool), False
        is_outlier = decision.outlier is not None and bool(decision.outlier)
        return norm, decision.coefs.amin() < 1, is_outlier
