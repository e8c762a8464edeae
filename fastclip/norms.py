"""Measurements of gradients. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Module

from fastclip import backends
from fastclip.backends import Backend
from fastclip.distributed import shards
from fastclip.distributed.everywhere import nonfinite_of_ranks
from fastclip.distributed.marks import Ranks

_WHOLE_PARAMETERS = (
    "expected whole parameters or DTensors. clip_grad_norm_ with max_norm=inf and group measures the total "
    "norm."
)


class Nonfinite(NamedTuple):
    """How many elements of a gradient are nan, and how many inf or -inf."""

    nan: int
    inf: int


def grad_norms(
    parameters: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    *,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Return the norm of each gradient, reading every element once.

    Args:
        parameters: A tensor or an iterable of n tensors; those without a gradient are skipped.
        norm_type: p > 0, or inf for the largest magnitude.
        mesh: As in `clip_grad_norm_`.

    Returns:
        1-d tensor of m <= n norms in the order given, float32 (float64 if any gradient is float64 or
        complex128), on the device of the first gradient. Root taken, in the unit of the gradients; 0 for an
        empty gradient. Complex elements count by their magnitude; those of a sparse gradient that stand
        several times are added up first.
        Of a DTensor the norm is that of the whole; ranks reduce n float64 twice, for which the host
        waits on a device.
        Moves numel * itemsize bytes; no host synchronization.

    Raises:
        ValueError: norm_type is not > 0.
        TypeError: A gradient is not floating point; the message names its position among the gradients.
        RuntimeError: Parameters are shards of FullyShardedDataParallel.

    Source:
        Summation bound: Higham, Accuracy and Stability of Numerical Algorithms, ch. 4.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"grad_norms: norm_type={norm_type}; expected p > 0 or inf.")
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    spread = shards(
        "grad_norms", listed, of_gradients=True, mesh=mesh, norm_type=norm_type, remedy=_WHOLE_PARAMETERS
    )
    if spread is not None:
        return spread.norms(norm_type)
    return backends.run(Backend.grad_norms, listed, norm_type)


def find_nonfinite(
    named_parameters: Iterable[tuple[str, Tensor]], *, group: Ranks | None = None
) -> dict[str, Nonfinite]:
    """Return which parameters have a gradient that is not finite, and how many elements of it.

    Args:
        named_parameters: (name, parameter) pairs, as `module.named_parameters()` gives them; those
            without a gradient are skipped. Of a DTensor this rank's shard is looked at.
        group: Ask all of these ranks, which call together and get the same answer: a process group or a
            DeviceMesh. Shards of a gradient are added up, and copies counted once.

    Returns:
        Name -> (nan, inf), in the order given, of the gradients that hold any; empty if all are finite. A
        complex element counts by its parts: as nan, as inf or as both.
        Moves numel * itemsize bytes; synchronizes with the device.

    Raises:
        TypeError: There is something else than pairs; the message says what and where.
    """
    names, grads = [], []
    for name, parameter in _pairs(named_parameters):
        if parameter.grad is not None:
            names.append(name)
            grads.append(parameter.grad)
    if group is not None:
        return {name: Nonfinite(*counts) for name, counts in nonfinite_of_ranks(names, grads, group).items()}
    spread = shards("find_nonfinite", grads, of_gradients=False, whole_norm=True)
    counts = backends.run(Backend.count_nonfinite, grads if spread is None else spread.present())
    return {names[position]: Nonfinite(nan, inf) for position, nan, inf in counts}


def _pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Return the pairs, and never what can only be taken apart like one: a parameter of two rows, a name."""
    if isinstance(named_parameters, Tensor | Module | Mapping):
        raise _no_pairs(f"a {type(named_parameters).__name__}")
    for position, entry in enumerate(named_parameters):
        pair: Any = entry
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise _no_pairs(f"entry {position} is a {type(pair).__name__}")
        name, parameter = pair
        if isinstance(name, Tensor) or not hasattr(parameter, "grad"):
            kinds = type(name).__name__, type(parameter).__name__
            raise _no_pairs(f"entry {position} is ({', '.join(kinds)})")
        yield name, parameter


def _no_pairs(what: str) -> TypeError:
    return TypeError(
        f"find_nonfinite: {what}; expected (name, parameter) pairs. Give it `module.named_parameters()`, or "
        f"`enumerate(parameters)` where there are no names."
    )
