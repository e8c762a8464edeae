"""The Triton backend: `fastclip.kernels` behind the backend interface, for CUDA and ROCm devices.

Takes dense tensors of float16, bfloat16, float32 and float64 on one device, mixed freely. A clip is two
launches, whatever the number of tensors; nothing waits for the device but `count_nonfinite`, whose result
is Python's. triton is imported by the first call.

With TRITON_INTERPRET=1 the same kernels run, slowly, on CPU tensors: for tests and for debugging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastclip.backends.base import Declined
from fastclip.kernels.operands import (
    PLAIN_TYPES,
    device_reason,
    is_interpreted,
    norm_reason,
    tensor_reason,
)
from fastclip.kernels.table import Table, TableCache, build_table, has_empty, read_spans

_tables = TableCache(build_table)

P = ParamSpec("P")
R = TypeVar("R")


def unavailable_reason() -> str | None:
    """Return why Triton cannot be used, or None; makes no context on a device."""
    return _unavailable_reason(is_interpreted())


@functools.cache
def _unavailable_reason(interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fastclip[gpu]'"
    if not interpreted and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    return None


def details() -> dict[str, str]:
    """Return Triton's version and the devices, or that the kernels are interpreted."""
    if unavailable_reason():
        return {}
    if is_interpreted():
        devices = "the CPU, interpreted (TRITON_INTERPRET=1)"
    else:
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {"triton": version("triton"), "devices": devices}


class _DeclinedError(Exception):
    """Leaves an operation before anything was written; never reaches its caller."""


def _may_decline(operation: Callable[P, R]) -> Callable[P, R | Declined]:
    @functools.wraps(operation)
    def answering(*args: P.args, **kwargs: P.kwargs) -> R | Declined:
        try:
            return operation(*args, **kwargs)
        except _DeclinedError as declined:
            return Declined(str(declined))

    return answering


@_may_decline
def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all tensors together; one launch that reads every byte once."""
    if not tensors:
        return torch.tensor(0.0)
    with _table(tensors, norm_type) as table:
        norm: Tensor = _launch().total_norm(table, norm_type, _norm_dtype(tensors))[0]
    return norm


@_may_decline
def clip_grad_norm_(
    parameters: list[Tensor], max_norm: float, norm_type: float, keep_nonfinite: bool
) -> Tensor:
    """Clip in two launches; the second writes if the norm is above, and is left out if max_norm is inf."""
    grads = _gradients(parameters)
    if not grads:
        return torch.tensor(0.0)
    with _table_to_write(grads, norm_type) as table:
        norm: Tensor
        norm, coefficient = _launch().total_norm(
            table, norm_type, _norm_dtype(grads), max_norm, keep_nonfinite
        )
        if max_norm != math.inf:
            _launch().scale(table, coefficient)
            increment_version(grads)
    return norm


@_may_decline
def clip_grads_with_norm_(parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """Scale by the coefficient of a norm that is known; two launches, the second writes unless it is 1."""
    if type(total_norm) not in PLAIN_TYPES or total_norm.dim() != 0 or not total_norm.is_floating_point():
        raise _DeclinedError("total_norm is not a plain, real, 0-dim tensor")
    if grads := _gradients(parameters):
        with _table_to_write(grads) as table:
            norm = total_norm.detach().to(table.device, torch.float64, non_blocking=True)
            _launch().scale(table, _launch().clip_coefficient(norm, max_norm))
            increment_version(grads)


@_may_decline
def clip_grad_value_(parameters: list[Tensor], clip_value: float) -> None:
    """Clamp in one launch; reads every byte once, and writes only where an element is outside."""
    if math.isnan(clip_value):
        raise _DeclinedError("clip_value is nan")
    grads = _gradients(parameters)
    if not grads:
        raise _DeclinedError("there is no gradient")
    if any(grad.is_neg() for grad in grads):
        raise _DeclinedError("a gradient is a lazily negated view")
    with _table_to_write(grads) as table:
        _launch().clamp(table, -clip_value, clip_value)
        increment_version(grads)


@_may_decline
def grad_norms(parameters: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of each gradient; two launches that read every byte once. 0 for an empty gradient."""
    grads = _gradients(parameters)
    if not grads:
        return torch.empty(0)
    with _table(grads) as table:
        norms: Tensor = _launch().tensor_norms(table, norm_type, _norm_dtype(grads))
    return norms


@_may_decline
def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]]:
    """Return (position, nan, inf) of each tensor that is not finite; one launch, then waits for it."""
    if not tensors:
        return []
    with _table(tensors) as table:
        counts = _launch().count_nonfinite(table).tolist()
    return [(position, nan, inf) for position, (nan, inf) in enumerate(counts) if nan or inf]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [grad for p in parameters if (grad := p.grad) is not None]


def _norm_dtype(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@contextlib.contextmanager
def _table(tensors: list[Tensor], norm_type: float | None = None) -> Iterator[Table]:
    """Hand out the table of these tensors, with their device current; about 1 us per tensor.

    Raises:
        _DeclinedError: The kernels cannot take them.
    """
    device = tensors[0].device
    if reason := device_reason(device):
        raise _DeclinedError(reason)
    for position, tensor in enumerate(tensors):
        if reason := tensor_reason(tensor, device):
            raise _DeclinedError(f"gradient {position} ({type(tensor).__name__}, {tensor.dtype}) {reason}")
    try:
        spans = read_spans(tensors)
    except RuntimeError as error:
        # torch gives no address of what only stands for memory: functorch, functional and meta tensors.
        raise _DeclinedError(f"a gradient has no plain memory ({error})") from None
    if norm_type is not None and (reason := norm_reason(norm_type, has_empty(spans))):
        raise _DeclinedError(reason)
    with current_device(device):
        yield _tables.get(spans, device)


@contextlib.contextmanager
def _table_to_write(tensors: list[Tensor], norm_type: float | None = None) -> Iterator[Table]:
    with _table(tensors, norm_type) as table:
        if table.overlaps:
            raise _DeclinedError("two gradients share memory")
        yield table


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device current: Triton launches on the current device and stream."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@functools.cache
def _launch() -> Any:
    from fastclip.kernels import launch

    return launch
