"""Operations on tensors that are spread over several devices: each device's by a backend that takes them.

The norms of the devices are combined in float64, in the order of the devices, on the device of the first
tensor. Between devices only such norms move; nothing waits for a device unless its norm is wanted on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.backends import eager
from fastclip.backends.base import Declined, Elementwise, measures_only

_DEVICE_TYPES = ("cpu", "cuda")
_OF_TENSORS = ("total_norm", "count_nonfinite")

WRITING = ("clip_grad_norm_", "clip_grads_with_norm_", "scale_grads_", "elementwise_")
"""Operations that change the gradients."""


class Share:
    """What of a list is on one device.

    Attributes:
        items: Of the list, as the operations take them: tensors, or parameters that have a gradient.
        values: The tensors themselves, or the gradients.
        positions: Of each among the tensors or gradients of the whole list.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        self.items: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: list[int] = []


class Spread:
    """A list on several devices, with the operations of `base.Backend` on it."""

    def __init__(self, shares: list[Share], each: Callable[..., Any]) -> None:
        """Take the shares, the first tensor's first; each(operation, items, *args) runs one on a share."""
        self.shares = shares
        self._each = each

    def total_norm(self, norm_type: float, dtype: torch.dtype | None = None) -> Tensor | Declined:
        """Return the norm of all tensors together, on the device of the first."""
        norm = self._wide_norm(norm_type)
        return norm if isinstance(norm, Declined) else norm.to(dtype or self._returned_dtype())

    def clip_grad_norm_(
        self, max_norm: float | Tensor, norm_type: float, keep_nonfinite: bool
    ) -> Tensor | Declined:
        """Clip by the norm of all; each share is scaled on its device as soon as that has the norm."""
        wide = self._wide_norm(norm_type)
        if isinstance(wide, Declined):
            return wide
        norm = wide.to(self._returned_dtype())
        if not measures_only(max_norm) and not (keep_nonfinite and not norm.isfinite()):
            self.clip_grads_with_norm_(max_norm, wide)
        return norm

    def clip_grads_with_norm_(self, max_norm: float | Tensor, total_norm: Tensor) -> None:
        """Scale by the coefficient of a norm that is known."""
        norms = [_beside(share.values[0], total_norm) for share in self.shares]
        self._write("clip_grads_with_norm_", [(max_norm, norm) for norm in norms])

    def scale_grads_(self, coefs: Tensor) -> None:
        """Multiply all gradients by the one coefficient, or each by its own."""
        own = [coefs if coefs.numel() == 1 else coefs[share.positions] for share in self.shares]
        beside = [(_beside(share.values[0], coef),) for share, coef in zip(self.shares, own, strict=True)]
        self._write("scale_grads_", beside)

    def elementwise_(self, operation: Elementwise, value: float | Tensor) -> None:
        """Change every element by itself."""
        every = (share.values[0] for share in self.shares)
        beside = [_beside(here, value) if isinstance(value, Tensor) else value for here in every]
        self._write("elementwise_", [(operation, by) for by in beside])

    def grad_norms(self, norm_type: float, dtype: torch.dtype | None = None) -> Tensor:
        """Return the norm of each gradient, in the order of the list, on the device of the first."""
        dtype = dtype or self._returned_dtype()
        found = [self._each("grad_norms", share.items, norm_type, dtype) for share in self.shares]
        here = self.shares[0].values[0]
        norms = [_beside(here, norms) for norms in found]
        places = sorted(
            (position, number, index)
            for number, share in enumerate(self.shares)
            for index, position in enumerate(share.positions)
        )
        pieces = []
        for number, run in itertools.groupby(places, key=lambda place: place[1]):
            indices = [index for _, _, index in run]
            pieces.append(norms[number][indices[0] : indices[-1] + 1])
        return torch.cat(pieces)

    def count_nonfinite(self) -> list[tuple[int, int, int]]:
        """Return (position, number of nan, number of inf) of each tensor that has any."""
        found = [self._each("count_nonfinite", share.items) for share in self.shares]
        return sorted(
            (share.positions[index], nan, inf)
            for share, counts in zip(self.shares, found, strict=True)
            for index, nan, inf in counts
        )

    def _wide_norm(self, norm_type: float) -> Tensor | Declined:
        if not norm_type > 0:
            return Declined(f"there is no kernel for norm_type={norm_type}; expected one > 0")
        # Kernels are launched before the CPU is kept busy.
        order = sorted(range(len(self.shares)), key=lambda i: self.shares[i].values[0].device.type == "cpu")
        found: dict[int, Any] = {}
        for i in order:
            found[i] = self._each("total_norm", self.shares[i].values, norm_type, torch.float64)
        norms = [found[i] for i in range(len(self.shares))]
        here = self.shares[0].values[0]
        dtypes = {value.dtype for share in self.shares for value in share.values}
        with torch.no_grad():
            return eager.combined([_beside(here, norm) for norm in norms], norm_type, dtypes)

    def _write(self, operation: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        for share, args in zip(self.shares, arguments, strict=True):
            self._each(operation, share.items, *args)

    def _returned_dtype(self) -> torch.dtype:
        return eager.returned_dtype([value for share in self.shares for value in share.values])


def spread(operation: str, listed: list[Tensor], each: Callable[..., Any]) -> Spread | None:
    """Return a list of plain tensors as one over several devices; None of all other lists."""
    shares: dict[torch.device, Share] = {}
    position = 0
    for item in listed:
        value = item if operation in _OF_TENSORS else item.grad
        if value is None:
            continue
        share = shares.setdefault(device_of(value), Share())
        share.items.append(item)
        share.values.append(value)
        share.positions.append(position)
        position += 1
    if len(shares) < 2 or any(device.type not in _DEVICE_TYPES for device in shares):
        return None
    if not all(eager.are_plain(share.values) for share in shares.values()):
        return None
    return Spread(list(shares.values()), each)


def device_of(tensor: Tensor) -> torch.device:
    """Return where a tensor is."""
    return tensor.device


def _beside(here: Tensor, value: Tensor) -> Tensor:
    """Return a value on the device of `here`, without waiting unless it must come to the CPU."""
    if value.device == here.device:
        return value
    if value.device.type == "cpu":
        # Page-locked memory is copied without a wait; an ordinary number travels as a kernel's argument.
        return (
            torch.full_like(value, value.item(), device=here.device)
            if value.dim() == 0
            else _sent(here, value)
        )
    return value.to(here.device, non_blocking=here.device.type != "cpu")


def _sent(here: Tensor, value: Tensor) -> Tensor:
    return value.pin_memory().to(here.device, non_blocking=True)
