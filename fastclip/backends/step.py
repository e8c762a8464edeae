"""An optimizer's step, as a backend is asked for it and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """What a step does, where that is known before it is taken.

    Attributes:
        coefs: What to multiply the gradients by, one for all or one for each, 1-dim; a scale apart.
        total_norm: 0-dim, as are the others.
        clip_coef: What is said of all coefficients together.
        skipped: Whether nothing is to change; bool.
    """

    coefs: Tensor
    total_norm: Tensor
    clip_coef: Tensor
    skipped: Tensor

    def on(self, device: torch.device) -> Given:
        """Return the same as kernels on a device read it, without waiting for it."""
        rest = (value.to(device, non_blocking=True) for value in self[1:])
        return Given(self.coefs.to(device, torch.float64), *rest)


class Step(NamedTuple):
    """A step of torch.optim.Adam, AdamW or SGD, and how it clips.

    Attributes:
        is_sgd: Whether it is SGD's; else Adam's or AdamW's, of which the groups say which.
        param_groups: The optimizer's.
        state: The optimizer's, torch's own.
        max_norm: The largest total norm to leave; a tensor is 0-dim.
        norm_type: p > 0 of the p-norm.
        skips: Whether a norm that is not finite leaves everything as it is.
        write_grads: Whether to leave the clipped gradients behind.
        grad_scale: The gradients are this many times too large, or None.
        found_inf: Not zero to leave everything as it is, or None.
        counts_on: Returns the counts of steps on a device, for kernels that decide there to count this one.
        given: What is decided already, so that nothing is measured; None: it follows from the norm.
        max_value: Bound of each element's magnitude, after all that.
        units: How units are clipped after that: ratio, eps, and the elements of a unit of each gradient.
        dtensor: The class of which the memory on this rank is meant, or None.
        instead: By parameter, what to update it with in the place of its gradient.
        fresh: Parameters whose state was made for this step.
    """

    is_sgd: bool
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, Any]
    max_norm: float | Tensor
    norm_type: float
    skips: bool
    write_grads: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    counts_on: Callable[[torch.device], Tensor]
    given: Given | None
    max_value: float
    units: tuple[float, float, list[int]] | None
    dtensor: type[Tensor] | None
    instead: dict[Tensor, Tensor]
    fresh: set[Tensor]


@dataclass(frozen=True)
class Unready:
    """The answer to a step that lacks state; nothing was written, and it may be asked for again.

    Attributes:
        missing: Parameters that have a gradient and no state.
        counted_on_cpu: Those whose step counter is on the CPU, and they are not.
    """

    missing: list[Tensor]
    counted_on_cpu: list[Tensor]


class Stepped(NamedTuple):
    """The answer to a step that was taken, or skipped.

    Numbers where the host has decided; else 0-dim tensors, and the kernels have counted the step.
    """

    total_norm: float | Tensor
    clip_coef: float | Tensor
    skipped: bool | Tensor
    dtype: torch.dtype
