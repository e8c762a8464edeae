"""Reading an optimizer's step for kernels on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.utils.dlpack import DLDeviceType

from fastclip.backends.base import Declined
from fastclip.backends.step import Step, Unready


def read_step(
    step: Step, kind: Any, device_type: DLDeviceType, device_reason: Callable[[Any], str | None]
) -> Any:
    """Return what kernels on a device need of a step, Unready or Declined.

    Args:
        step: What to read.
        kind: The class of `_C` that reads and holds it.
        device_type: Of the devices that the kernels run on.
        device_reason: Says why they cannot run on the device of what was read, or None.
    """
    if step.units is not None:
        return Declined("only the CPU's kernels clip units on the way")
    found = kind.collect(
        *(step.param_groups, step.state, step.fresh, step.write_grads),
        *(device_type, step.dtensor, step.instead),
    )
    if isinstance(found, str):
        return Declined(found)
    if found and (reason := device_reason(found)):
        return Declined(reason)
    if (missing := found.missing) or found.counted_on_cpu:
        return Unready(missing, found.counted_on_cpu)
    if step.given is None and math.isinf(step.norm_type) and found.has_empty:
        return Declined("a gradient is empty, which has no inf-norm")
    if step.given is not None and found and step.given.coefs.numel() not in (1, len(found)):
        return Declined("the number of coefficients is not that of the gradients")
    return found
