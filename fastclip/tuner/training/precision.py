"""The precision of a training: autocast, and a scaler of the loss where float16 needs one."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST_SCALE = 1.0  # below which a gradient that is not finite is no matter of the range of float16


def check_amp(amp: Any) -> torch.dtype | None:
    """Return the type of autocast that `amp` names, None for full precision.

    Raises:
        ValueError: it is neither None nor one of the names in `AMP`.
    """
    if amp is None:
        return None
    if amp not in AMP:
        raise ValueError(f"check_amp: amp={amp!r}; expected None or one of {', '.join(AMP)}.")
    return AMP[amp]


def autocast(amp: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model is called."""
    dtype = check_amp(amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def make_scaler(
    amp: Any, device: torch.device, kind: type[torch.amp.GradScaler]
) -> torch.amp.GradScaler | None:
    """Return a scaler of this kind for float16, whose range is too small for gradients as they are."""
    return kind(device.type) if check_amp(amp) is torch.float16 else None


def is_overflow(scaler: torch.amp.GradScaler | None, norm: torch.Tensor) -> bool:
    """Tell whether a norm is not finite because the scale is too large, which the scaler then lowers.

    Waits for the device where there is a scaler.
    """
    if scaler is None or math.isfinite(float(norm)):
        return False
    return scaler.get_scale() >= LEAST_SCALE
