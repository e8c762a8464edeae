"""The Triton backend: `fastclip.kernels` behind the backend interface, for CUDA and ROCm devices.

Takes dense tensors of float16, bfloat16, float32 and float64 on one device, mixed freely. A clip is two
launches, whatever the number of tensors; nothing waits for the device but `count_nonfinite`, whose result
is Python's. `fastclip._C` reads the tensors; triton is imported by the first call.

With TRITON_INTERPRET=1 the same kernels run, slowly, on CPU tensors: for tests and for debugging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.dlpack import DLDeviceType

from fastclip.backends import cpu
from fastclip.backends.base import Declined, measures_only, threshold_on
from fastclip.kernels.table import Table, TableCache, build_table

_C = cpu._C
_MIN_COMPUTE_CAPABILITY = (8, 0)

_tables = TableCache(build_table)

P = ParamSpec("P")
R = TypeVar("R")


def unavailable_reason() -> str | None:
    """Return why Triton cannot be used, or None; makes no context on a device."""
    if reason := cpu.unavailable_reason():
        return reason
    if not _is_installed():
        return "triton is not installed; pip install 'fastclip[gpu]'"
    if not is_interpreted() and not _has_device():
        return "torch sees no CUDA or ROCm device"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_device() -> bool:
    return torch.cuda.is_available()


def details() -> dict[str, str]:
    """Return Triton's version and the devices, or that the kernels are interpreted."""
    if unavailable_reason():
        return {}
    if is_interpreted():
        devices = "the CPU, interpreted (TRITON_INTERPRET=1)"
    else:
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {"triton": version("triton"), "devices": devices}


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def dlpack_type() -> DLDeviceType:
    """Return the type of the devices that the kernels run on."""
    if is_interpreted():
        return DLDeviceType.kDLCPU
    return DLDeviceType.kDLROCM if torch.version.hip else DLDeviceType.kDLCUDA


def device_of(found: Any) -> torch.device:
    """Return where what `_C` has read is."""
    return torch.device("cpu") if is_interpreted() else torch.device("cuda", found.device)


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device of their type, or None."""
    if device.type == "cpu" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_COMPUTE_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; Triton needs 8.0"
    return None


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
def total_norm(tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return the norm of all tensors together; one launch that reads every byte once."""
    found = _read(tensors, of_gradients=False)
    if not found:
        return torch.tensor(0.0)
    with _table(found, norm_type) as table:
        norm: Tensor = _launch().total_norm(table, norm_type, dtype or _norm_dtype(found))[0]
    return norm


@_may_decline
def clip_grad_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, norm_type: float, keep_nonfinite: bool
) -> Tensor:
    """Clip in two launches; the second writes if the norm is above, and is left out if max_norm is inf."""
    found = _read(parameters, of_gradients=True)
    if not found:
        return torch.tensor(0.0)
    with _table_to_write(found, norm_type) as table:
        norm: Tensor
        limit = threshold_on(table.device, max_norm)
        norm, coefficient = _launch().total_norm(table, norm_type, _norm_dtype(found), limit, keep_nonfinite)
        if not measures_only(limit):
            _launch().scale(table, coefficient)
            increment_version(found.tensors)
    return norm


@_may_decline
def clip_grads_with_norm_(parameters: list[Tensor], max_norm: float | Tensor, total_norm: Tensor) -> None:
    """Scale by the coefficient of a norm that is known; two launches, the second writes unless it is 1."""
    is_plain = type(total_norm) in (Tensor, torch.nn.Parameter)
    if not is_plain or total_norm.dim() != 0 or not total_norm.is_floating_point():
        raise _DeclinedError("total_norm is not a plain, real, 0-dim tensor")
    if found := _read(parameters, of_gradients=True):
        with _table_to_write(found) as table:
            norm = total_norm.detach().to(table.device, torch.float64, non_blocking=True)
            limit = threshold_on(table.device, max_norm)
            _launch().scale(table, _launch().clip_coefficient(norm, limit))
            increment_version(found.tensors)


@_may_decline
def scale_grads_(parameters: list[Tensor], coefs: Tensor) -> None:
    """Scale by one coefficient or one each; one launch, which writes nothing where that is 1."""
    if found := _read(parameters, of_gradients=True):
        if coefs.device != device_of(found) or coefs.numel() not in (1, len(found)):
            raise _DeclinedError(
                "the coefficients are not on the device of the gradients, one or one for each"
            )
        with _table_to_write(found) as table:
            _launch().scale(table, coefs.to(torch.float64).contiguous(), coefs.numel() > 1)
            increment_version(found.tensors)


@_may_decline
def clip_grad_value_(parameters: list[Tensor], clip_value: float) -> None:
    """Clamp in one launch; reads every byte once, and writes only where an element is outside."""
    if math.isnan(clip_value):
        raise _DeclinedError("clip_value is nan")
    found = _read(parameters, of_gradients=True)
    if not found:
        raise _DeclinedError("there is no gradient")
    if found.has_lazy_negation():
        raise _DeclinedError("a gradient is a lazily negated view")
    with _table_to_write(found) as table:
        _launch().clamp(table, -clip_value, clip_value)
        increment_version(found.tensors)


@_may_decline
def grad_norms(parameters: list[Tensor], norm_type: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return the norm of each gradient; two launches that read every byte once. 0 for an empty gradient."""
    found = _read(parameters, of_gradients=True)
    if not found:
        return torch.empty(0)
    with _table(found) as table:
        norms: Tensor = _launch().tensor_norms(table, norm_type, dtype or _norm_dtype(found))
    return norms


@_may_decline
def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]]:
    """Return (position, nan, inf) of each tensor that is not finite; one launch, then waits for it."""
    found = _read(tensors, of_gradients=False)
    if not found:
        return []
    with _table(found) as table:
        counts = _launch().count_nonfinite(table).tolist()
    return [(position, nan, inf) for position, (nan, inf) in enumerate(counts) if nan or inf]


def reason_not_to_write(grads: list[Tensor]) -> str | None:
    """Return why these gradients cannot be scaled or clamped, or None."""
    try:
        found = _read(grads, of_gradients=False)
        with _table_to_write(found):
            return cpu.reason_against_writing(found)
    except _DeclinedError as declined:
        return str(declined)


def _norm_dtype(found: Any) -> torch.dtype:
    return torch.float64 if found.has_float64 else torch.float32


def _read(tensors: list[Tensor], *, of_gradients: bool) -> Any:
    """Return a `_C.Tensors`, which holds the tensors until what reads their memory is launched.

    Raises:
        _DeclinedError: The kernels cannot take them.
    """
    found = _C.read_tensors(tensors, of_gradients, dlpack_type())
    if isinstance(found, str):
        raise _DeclinedError(found)
    if found and (reason := device_reason(device_of(found))):
        raise _DeclinedError(reason)
    return found


@contextlib.contextmanager
def _table(found: Any, norm_type: float | None = None) -> Iterator[Table]:
    """Hand out the table of these tensors, with their device current.

    Raises:
        _DeclinedError: There is no kernel for this norm of them.
    """
    if norm_type is not None and not norm_type > 0:
        raise _DeclinedError(f"there is no kernel for norm_type={norm_type}; expected one > 0")
    if norm_type == math.inf and found.has_empty:
        raise _DeclinedError("a gradient is empty, which has no inf-norm")
    device = device_of(found)
    with current_device(device):
        yield _tables.get(found.spans(), device)


@contextlib.contextmanager
def _table_to_write(found: Any, norm_type: float | None = None) -> Iterator[Table]:
    with _table(found, norm_type) as table:
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
