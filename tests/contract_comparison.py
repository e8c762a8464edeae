"""How the contract's tests compare fastclip with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def assert_same(got: torch.Tensor, want: torch.Tensor, rtol: float) -> None:
    # Two roundings apart where the dtype is subnormal.
    atol = 2 * torch.finfo(want.dtype).smallest_normal * torch.finfo(want.dtype).eps
    torch.testing.assert_close(
        got, want, rtol=rtol, atol=atol, equal_nan=True, check_dtype=False, check_stride=True
    )


def rtol_of(dtype: torch.dtype) -> float:
    """What torch's own rounding of the norm and of the coefficient to the gradients' dtype may cost."""
    return max(1e-6, 4 * torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-12


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the exception."""
    try:
        return call()
    except Exception as error:
        return error


def assert_same_outcome(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), f"{ours!r} instead of {theirs!r}"
        assert str(theirs).splitlines()[0] in str(ours)
    else:  # torch's float32 sums are the less exact ones
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)
