"""What the caller asked for, checked once."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastclip.backends.base import checked_threshold
from fastclip.distributed.marks import Ranks
from fastclip.optim.outcome import Outcome
from fastclip.strategies import Strategy
from fastclip.strategies.within import Within

NONFINITE = ("skip", "raise", "propagate")

MaxNorm: TypeAlias = float | Tensor | Strategy
"""The largest total norm to leave: a number, a 0-dim tensor that is read in each step, or what sets it."""

VERDICTS = "_fastclip_verdicts"
"""Attribute by which `fastclip.GradScaler` hands an optimizer the `Amp.verdicts` of its next step."""


@dataclass(frozen=True)
class Settings:
    """How to clip.

    Attributes:
        max_norm: The largest total norm to leave; inf measures only. A tensor is on the gradients' device.
        norm_type: p of the p-norm.
        nonfinite: What a norm that is nan or inf leads to, one of NONFINITE.
        max_consecutive_skips: Skipped steps in a row after which the next one raises, or None.
        fused: True demands a folded route, False forbids one, None takes the best.
        write_grads: Leave the clipped gradients in `.grad`.
        group: Ranks that hold further parts, or None.
        mesh: To reduce over at once, or None.
        within: What to clip within each gradient, after the norm: in a step of a strategy that does no more.
    """

    max_norm: MaxNorm
    norm_type: float = 2.0
    nonfinite: str = "skip"
    max_consecutive_skips: int | None = None
    fused: bool | None = None
    write_grads: bool = False
    group: Ranks | None = None
    mesh: DeviceMesh | None = None
    within: Within | None = None

    @classmethod
    def checked(
        cls,
        function: str,
        max_norm: MaxNorm,
        norm_type: float,
        nonfinite: str,
        max_consecutive_skips: int | None,
        fused: bool | None,
        write_grads: bool,
        group: Ranks | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Settings:
        """Return the settings.

        Raises:
            ValueError: One of them makes no sense; the message starts with `function`.
        """
        limit = checked_max_norm(function, max_norm)
        p = float(norm_type)
        if math.isnan(p):
            raise ValueError(f"{function}: norm_type={norm_type}; expected p > 0 or inf.")
        if nonfinite not in NONFINITE:
            raise ValueError(f"{function}: nonfinite={nonfinite!r}; expected one of {', '.join(NONFINITE)}.")
        if max_consecutive_skips is not None and max_consecutive_skips < 1:
            raise ValueError(
                f"{function}: max_consecutive_skips={max_consecutive_skips}; expected at least 1, or None."
            )
        return cls(limit, p, nonfinite, max_consecutive_skips, fused, write_grads, group, mesh)

    def __deepcopy__(self, memo: dict[int, object]) -> Settings:
        """Return a copy with a strategy or a tensor of its own; process groups have no copies."""
        if isinstance(self.max_norm, float):
            return self
        return replace(self, max_norm=copy.deepcopy(self.max_norm, memo))

    @property
    def skips(self) -> bool:
        """Whether a norm that is not finite leaves parameters and state as they are."""
        return self.nonfinite != "propagate"

    def under(self, amp: Amp) -> Settings:
        """Return how to clip in a step with this scaling: what a scaler is to learn of is left out."""
        return replace(self, nonfinite="skip") if amp.verdicts else self


def checked_max_norm(function: str, max_norm: MaxNorm) -> MaxNorm:
    """Return a threshold; a tensor and a strategy as they are, for they are asked in each step.

    Raises:
        TypeError: It is nothing of that kind, such as a strategy's class in the place of an object.
        ValueError: The number is not > 0, or the tensor has more elements than one.
    """
    if isinstance(max_norm, Strategy):
        return max_norm
    if isinstance(max_norm, Tensor):
        return checked_threshold(function, max_norm)
    try:
        limit = float(max_norm)
    except TypeError as error:
        raise TypeError(
            f"{function}: max_norm={max_norm!r}; expected a number, a 0-dim tensor or a strategy such as "
            f"fastclip.strategies.MedianMAD()."
        ) from error
    if not limit > 0:  # or nan
        raise ValueError(f"{function}: max_norm={max_norm}; expected a number > 0, or inf to measure only.")
    return limit


@dataclass(frozen=True)
class Amp:
    """What a GradScaler has set on the optimizer for this step.

    Attributes:
        grad_scale: The gradients are this many times too large, or None.
        found_inf: Not zero if one of them is not finite, or None.
        verdicts: Where the step is to say whether it was skipped: zeros, one on each device with gradients;
            empty if the scaler has looked for itself.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    verdicts: tuple[Tensor, ...] = ()

    @classmethod
    def take(cls, optimizer: object) -> Amp:
        """Read the attributes of an optimizer; the verdicts, which are for one step, are taken away."""
        attributes = vars(optimizer)
        found_inf = attributes.get("found_inf")
        if not isinstance(found_inf, Tensor):  # torch's sum over the devices of no gradients is the int 0
            found_inf = None
        return cls(attributes.get("grad_scale"), found_inf, attributes.pop(VERDICTS, ()))

    def tell(self, outcome: Outcome) -> None:
        """Say to the scaler whether the step was skipped; no host synchronization between devices."""
        for verdict in self.verdicts:
            verdict.copy_(outcome.skipped)

    def to_skip(self) -> bool:
        """Whether the scaler wants the step left out; synchronizes if its tensors are on a device."""
        return self.found_inf is not None and bool(self.found_inf)
