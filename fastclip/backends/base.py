"""What a backend is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastclip.backends.step import Step, Stepped, Unready

Elementwise = Literal["clamp"]
"""An operation on every element, given one number; each is in csrc/elementwise.h, too.

"clamp": to [-value, value]; nan stays nan.
"""


@dataclass(frozen=True)
class Declined:
    """A backend's answer to tensors that it cannot take; nothing was read or written."""

    reason: str


class Backend(Protocol):
    """What a backend module offers.

    `parameters` and `tensors` are lists. `norm_type` is a float, and `max_norm` one or a 0-dim tensor. Every
    function may answer with `Declined`.
    """

    def unavailable_reason(self) -> str | None:
        """Return why this backend cannot run here, or None if it can."""

    def details(self) -> dict[str, str]:
        """Return what there is to know about it: libraries, instruction sets, devices."""

    def reason_not_to_write(self, grads: list[Tensor]) -> str | None:
        """Return why these gradients cannot be changed, whatever by, or None."""

    def total_norm(
        self, tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
    ) -> Tensor | Declined:
        """Return the norm of all tensors together, 0-dim; float64 if one of them is, or as `dtype` asks."""

    def clip_grad_norm_(
        self,
        parameters: list[Tensor],
        max_norm: float | Tensor,
        norm_type: float,
        keep_nonfinite: bool,
    ) -> Tensor | Declined:
        """Clip and return the total norm; with `keep_nonfinite` a non-finite norm changes nothing."""

    def clip_grads_with_norm_(
        self, parameters: list[Tensor], max_norm: float | Tensor, total_norm: Tensor
    ) -> Declined | None:
        """Multiply each gradient by min(1, max_norm / (total_norm + 1e-6))."""

    def scale_grads_(self, parameters: list[Tensor], coefs: Tensor) -> Declined | None:
        """Multiply all gradients by the one coefficient, or each by its own; 1-dim."""

    def elementwise_(
        self, parameters: list[Tensor], operation: Elementwise, value: float | Tensor
    ) -> Declined | None:
        """Change every element of each gradient by itself; a tensor is 0-dim."""

    def grad_norms(
        self, parameters: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
    ) -> Tensor | Declined:
        """Return the norm of each gradient, 1-dim, of a dtype as above."""

    def count_nonfinite(self, tensors: list[Tensor]) -> list[tuple[int, int, int]] | Declined:
        """Return (position, number of nan, number of inf) of each tensor that has any."""

    def clip_units_(
        self,
        parameters: list[Tensor],
        included: Sequence[bool],
        ratio: float,
        eps: float,
        grad_scale: Tensor | None,
    ) -> Declined | None:
        """Scale the gradient of each unit to at most ratio * max(|weights of the unit|, eps), in 2-norms.

        Units lie along the first dimension; a parameter of one dimension or none is one unit. All parameters
        have a gradient; what is not included keeps it. The gradients are `grad_scale` times too large.
        """

    def clip_and_step(self, step: Step) -> Stepped | Unready | Declined | None:
        """Clip on the way into an optimizer's update; None if there was nothing to update.

        Reads every byte of the gradients once, unless all is `given`, and then moves what the update moves.
        """


def declines_units(
    parameters: list[Tensor],
    included: Sequence[bool],
    ratio: float,
    eps: float,
    grad_scale: Tensor | None,
) -> Declined:
    """Be the `clip_units_` of a backend without a kernel for it."""
    return Declined("it has no kernel for units in place")


def is_by_units(tensor: Tensor) -> bool:
    """Whether the memory of a tensor has its units one behind the other; its elements lie without gaps."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.dim() < 2 or tensor.numel() == 0 or tensor.stride(0) * tensor.shape[0] == tensor.numel()


def unit_numel(tensor: Tensor) -> int:
    """Return the elements of a unit of a tensor that has any: of a slice along its first dimension."""
    return tensor.numel() // tensor.shape[0] if tensor.dim() > 1 else tensor.numel()


def checked_threshold(function: str, max_norm: Tensor) -> Tensor:
    """Return a threshold that is a tensor as a 0-dim one; it is not looked at, which may wait for a device.

    Raises:
        ValueError: It has more elements than one, or is complex; the message starts with `function`.
    """
    if max_norm.numel() != 1 or max_norm.is_complex():
        raise ValueError(
            f"{function}: max_norm is a tensor of shape {tuple(max_norm.shape)} and {max_norm.dtype}; "
            f"expected a number, or a real tensor of one element."
        )
    return max_norm.detach().reshape(())


def threshold_on(device: torch.device, max_norm: float | Tensor) -> float | Tensor:
    """Return a threshold as kernels on a device take it: a number, or a 0-dim float64 beside the gradients.

    A device takes what the host has as a number; nothing waits, whatever the threshold is on.
    """
    if not isinstance(max_norm, Tensor):
        return max_norm
    if max_norm.device.type == "cpu" and device.type != "cpu":
        return float(max_norm)
    return max_norm.to(device, torch.float64, non_blocking=True)


def measures_only(max_norm: float | Tensor) -> bool:
    """Whether the norm alone is asked for: by the number inf; a tensor is not looked at, which may wait."""
    return not isinstance(max_norm, Tensor) and max_norm == math.inf


@dataclass(frozen=True)
class BackendInfo:
    """One backend's state.

    Attributes:
        name: As `use_backend` takes it.
        available: Whether it can run here.
        reason: Why it cannot, or where `auto` uses it.
        details: Libraries, instruction sets, devices.
    """

    name: str
    available: bool
    reason: str
    details: dict[str, str] = field(default_factory=dict)
