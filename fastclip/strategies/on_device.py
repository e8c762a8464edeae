"""The kernels by which strategies learn in one launch, where Triton's kernels can run."""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import Tensor

from fastclip import backends


def kernels(norm: Tensor) -> Any:
    """Return `fastclip.kernels.thresholds` for a norm on a device that it runs on, else None.

    Without it torch's operations do the same in ten to thirty launches.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if norm.device.type != ("cpu" if interpreted else "cuda") or backends.is_tracing():
        return None
    return _loaded() if backends.chosen() in ("auto", "cuda", "triton") and _is_usable(norm) else None


def _is_usable(norm: Tensor) -> bool:
    from fastclip.backends import triton

    return triton.unavailable_reason() is None and triton.device_reason(norm.device) is None


@functools.cache
def _loaded() -> Any:
    from fastclip.kernels import thresholds

    return thresholds
