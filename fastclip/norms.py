"""Measurements of gradients. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fastclip import backends


class Nonfinite(NamedTuple):
    """How many elements of a gradient are nan, and how many inf or -inf."""

    nan: int
    inf: int


def grad_norms(parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of each gradient, reading every element once.

    Args:
        parameters: A tensor or an iterable of n tensors; those without a gradient are skipped.
        norm_type: p > 0, or inf for the largest magnitude.

    Returns:
        1-d tensor of m <= n norms in the order given, float32 (float64 if any gradient is), on the device
        of the first gradient. Root taken, in the unit of the gradients; 0 for an empty gradient.
        Moves numel * itemsize bytes; no host synchronization.

    Raises:
        ValueError: norm_type is not > 0.

    Source:
        Summation bound: Higham, Accuracy and Stability of Numerical Algorithms, ch. 4.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"grad_norms: norm_type={norm_type}; expected p > 0 or inf.")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norms: Tensor = backends.run("grad_norms", listed, norm_type)
    return norms


def find_nonfinite(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Nonfinite]:
    """Return which parameters have a gradient that is not finite, and how many elements of it.

    Args:
        named_parameters: (name, parameter) pairs, as `module.named_parameters()` gives them; those
            without a gradient are skipped.

    Returns:
        Name -> (nan, inf), in the order given, of the gradients that hold any; empty if all are finite.
        Moves numel * itemsize bytes; synchronizes with the device.
    """
    names, grads = [], []
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            names.append(name)
            grads.append(parameter.grad)
    counts = backends.run("count_nonfinite", grads)
    return {names[position]: Nonfinite(nan, inf) for position, nan, inf in counts}
