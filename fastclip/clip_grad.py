"""The four functions of torch.nn.utils that clip gradients, with torch's signatures.

Beside those they take `group` and `mesh`, for ranks that hold further parts; DTensors say it themselves.

They differ from torch's in three intended ways:
    1. Any finite gradient has a correct norm: sums are kept in float64 and cannot overflow on the way.
    2. The norm of float16 and bfloat16 gradients is returned in float32, not rounded to their dtype.
    3. max_norm=inf, which asks for the norm alone, never writes, whatever the norm is.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh

from fastclip import backends
from fastclip.backends import Backend
from fastclip.backends.base import checked_threshold, measures_only
from fastclip.distributed import Shards, shards
from fastclip.distributed.marks import Ranks


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Ranks | None = None,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Scale the gradients of `parameters` in place so that their total norm is at most `max_norm`.

    Drop-in for `torch.nn.utils.clip_grad_norm_`. Every gradient is multiplied by
    min(1, max_norm / (total_norm + 1e-6)).

    Args:
        parameters: A tensor or an iterable of tensors; those without a gradient are skipped.
        max_norm: The largest total norm to leave. inf measures and never writes. A 0-dim tensor on the
            gradients' device is read there, so that a captured graph sees what is written into it.
        norm_type: p of the p-norm: any float, or "inf". Kernels serve p > 0, torch's operations the rest.
        error_if_nonfinite: Raise, and leave the gradients as they are, if the norm is nan or inf.
        foreach: False selects torch's per-tensor operations; otherwise the fastest backend runs.
        group: Ranks that hold further parts, such as the other stages of a pipeline or, of the parameters
            of FullyShardedDataParallel, the other shards: a process group or a DeviceMesh. All of them call.
        mesh: Reduce once over all ranks of this mesh, whatever the layouts; it has every parameter's ranks.

    Returns:
        The norm before clipping: 0-dim, on the device of the first gradient, float32 (float64 if any
        gradient is). Moves numel * itemsize bytes; three times as many if something is clipped.
        No host synchronization on a device unless `error_if_nonfinite`, or ranks reduce. A DTensor if all
        gradients are, of one mesh; then, and with `group` or `mesh`, ranks reduce at most 64 bytes, see
        docs/distributed.md.

    Raises:
        RuntimeError: `error_if_nonfinite` and the norm is nan or inf, on every rank that reduces; the message
            names the first offending gradient. Or parameters are shards of FullyShardedDataParallel, and
            there is no group.

    Source:
        torch.nn.utils.clip_grad_norm_; Pascanu, Mikolov and Bengio, On the difficulty of training
        recurrent neural networks, 2013.
    """
    listed = _listed(parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    max_norm, norm_type = _checked_max_norm("clip_grad_norm_", max_norm), float(norm_type)
    spread = shards(
        "clip_grad_norm_",
        listed,
        of_gradients=True,
        group=group,
        mesh=mesh,
        all_dims=error_if_nonfinite,  # what one copy alone has is an error for all
        norm_type=norm_type,
    )
    if spread is not None:
        wide, _ = spread.total_norm(norm_type, foreach=foreach)
        if error_if_nonfinite:
            _raise_if_nonfinite(wide.to(spread.plan.dtype), norm_type, spread)
        spread.scale(max_norm, wide, foreach)
        return spread.returned(wide)
    norm = backends.run_foreach(
        foreach, Backend.clip_grad_norm_, listed, max_norm, norm_type, error_if_nonfinite
    )
    if error_if_nonfinite:
        _raise_if_nonfinite(norm, norm_type, [p.grad for p in listed])
    return norm


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Ranks | None = None,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Return the norm of all `tensors` taken together as one vector.

    Drop-in for `torch.nn.utils.get_total_norm`. Note that it takes the gradients themselves.

    Args:
        tensors: A tensor or an iterable of tensors.
        norm_type: p of the p-norm: any float, or "inf".
        error_if_nonfinite: Raise if the norm is nan or inf.
        foreach: False selects torch's per-tensor operations.
        group: As in `clip_grad_norm_`.
        mesh: As in `clip_grad_norm_`.

    Returns:
        0-dim, on the device of the first tensor, float32 (float64 if any tensor is). Moves
        numel * itemsize bytes. No host synchronization unless `error_if_nonfinite`.

    Raises:
        RuntimeError: `error_if_nonfinite` and the norm is nan or inf.
    """
    listed = _listed(tensors)
    norm_type = float(norm_type)
    spread = shards(
        "get_total_norm",
        listed,
        of_gradients=False,
        group=group,
        mesh=mesh,
        all_dims=error_if_nonfinite,
        norm_type=norm_type,
    )
    if spread is not None:
        wide, _ = spread.total_norm(norm_type, foreach=foreach)
        if error_if_nonfinite:
            _raise_if_nonfinite(wide.to(spread.plan.dtype), norm_type, spread)
        return spread.returned(wide)
    norm = backends.run_foreach(foreach, Backend.total_norm, listed, norm_type)
    if error_if_nonfinite:
        _raise_if_nonfinite(norm, norm_type, listed)
    return norm


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients of `parameters` in place by min(1, max_norm / (total_norm + 1e-6)).

    Drop-in for `torch.nn.utils.clip_grads_with_norm_`, for a norm that is known already.

    Args:
        parameters: A tensor or an iterable of tensors; those without a gradient are skipped.
        max_norm: As in `clip_grad_norm_`. inf never writes.
        total_norm: 0-dim tensor, as `get_total_norm` returns it.
        foreach: False selects torch's per-tensor operations.

    Moves nothing if the coefficient is 1, else 2 * numel * itemsize bytes.
    """
    listed = _listed(parameters)
    max_norm = _checked_max_norm("clip_grads_with_norm_", max_norm)
    if measures_only(max_norm) and isinstance(total_norm, Tensor):
        return
    spread = shards("clip_grads_with_norm_", listed, of_gradients=True, whole_norm=True)
    if spread is not None:
        spread.scale(max_norm, _whole(total_norm), foreach)
        return
    if hasattr(total_norm, "full_tensor"):  # of a DTensor among other gradients
        total_norm = _whole(total_norm)
    backends.run_foreach(foreach, Backend.clip_grads_with_norm_, listed, max_norm, total_norm)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every element of the gradients of `parameters` in place to [-clip_value, clip_value].

    Drop-in for `torch.nn.utils.clip_grad_value_`. nan stays nan.

    Args:
        parameters: A tensor or an iterable of tensors; those without a gradient are skipped.
        clip_value: The largest magnitude to leave.
        foreach: False selects torch's per-tensor operations.

    Raises:
        RuntimeError: there is no gradient at all, as in torch.

    Moves numel * itemsize bytes; three times as many where an element is outside.
    """
    listed = _listed(parameters)
    spread = shards("clip_grad_value_", listed, of_gradients=True, whole_norm=True)
    if spread is not None:
        spread.elementwise("clamp", float(clip_value), foreach)
        return
    backends.run_foreach(foreach, Backend.elementwise_, listed, "clamp", float(clip_value))


def _whole(total_norm: Tensor) -> Tensor:
    """Return a norm as a plain tensor; one whose ranks have only parts of it is reduced."""
    whole: Tensor = total_norm.full_tensor() if hasattr(total_norm, "full_tensor") else total_norm
    return whole


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _checked_max_norm(function: str, max_norm: float | Tensor) -> float | Tensor:
    if isinstance(max_norm, Tensor):
        return checked_threshold(function, max_norm)
    max_norm = float(max_norm)
    if max_norm < 0 and not is_compiling():  # which traces no warning
        _warn_negative_max_norm()
    return max_norm


@functools.cache
def _warn_negative_max_norm() -> None:
    """Warn once per process: a negative threshold turns every gradient around (pytorch#31367)."""
    warnings.warn(
        "fastclip: max_norm is negative, so clipping reverses the sign of every gradient, as torch does; "
        "expected max_norm >= 0.",
        stacklevel=4,
    )


def _raise_if_nonfinite(norm: Tensor, norm_type: float, tensors: Sequence[Tensor | None] | Shards) -> None:
    if bool(torch.isfinite(norm)):
        return
    message = (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot "
        "be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
        "`error_if_nonfinite=False`"
    )
    if isinstance(tensors, Shards):
        raise RuntimeError(f"{message}. {_first_nonfinite_of_ranks(tensors)}")
    raise RuntimeError(f"{message}. {_first_nonfinite(tensors)}")


def _first_nonfinite(tensors: Sequence[Tensor | None]) -> str:
    found = _nonfinite(tensors)
    if not found:
        return "Every element is finite: the norm itself is beyond the range of its dtype."
    return f"First offending parameter: {found[0][1]}"


def _first_nonfinite_of_ranks(spread: Shards) -> str:
    found = spread.nonfinite(_nonfinite(spread.locals))
    if not found:
        return "Every element is finite on all ranks: the norm itself is beyond the range of its dtype."
    rank, _, what = found[0]
    return f"First offending parameter: rank {rank}, {what}"


def _nonfinite(tensors: Sequence[Tensor | None]) -> list[tuple[int, str]]:
    """Return position and description of the first that is not finite, if there is one."""
    present = [(position, t) for position, t in enumerate(tensors) if t is not None]
    counts = backends.run(Backend.count_nonfinite, [t for _, t in present])
    if not counts:
        return []
    index, nan, inf = counts[0]
    position, tensor = present[index]
    return [
        (
            position,
            f"position {position}, shape {tuple(tensor.shape)}, {tensor.dtype}, "
            f"{nan} nan and {inf} inf of {tensor.numel()} elements.",
        )
    ]
