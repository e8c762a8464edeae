"""The Triton backend: `fastclip.kernels` behind the backend interface, for CUDA and ROCm devices.

Takes dense tensors of float16, bfloat16, float32 and float64 on one device, mixed freely. A clip is two
launches, whatever the number of tensors; nothing waits for the device but `count_nonfinite`, whose result
is Python's. `fastclip._C` reads the tensors; triton is imported by the first call.

With TRITON_INTERPRET=1 the same kernels run, slowly, on CPU tensors: for tests and for debugging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.dlpack import DLDeviceType

from fastclip.backends import cpu
from fastclip.backends.base import Declined, Elementwise, is_by_units, measures_only, threshold_on, unit_numel
from fastclip.backends.read_step import read_step
from fastclip.backends.step import Step, Stepped, Unready
from fastclip.kernels.step_table import build_step_table, upload_rules
from fastclip.kernels.table import Table, TableCache, build_table, overlap
from fastclip.kernels.unit_table import build_unit_table

_C = cpu._C
_MIN_COMPUTE_CAPABILITY = (8, 0)

_OVERLAP = Declined("two gradients share memory")

_tables = TableCache(build_table)
_step_tables = TableCache(build_step_table)
_rules = TableCache(upload_rules)
_unit_tables = TableCache(build_unit_table)


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


def total_norm(
    tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | Declined:
    """Return the norm of all tensors together; one launch that reads every byte once."""
    found = _read(tensors, of_gradients=False)
    if reason := _reason_against_norm(found, norm_type):
        return Declined(reason)
    if not found:
        return torch.tensor(0.0)
    with current_device(device_of(found)):
        norm: Tensor = _kernels("norm").total_norm(_table(found), norm_type, dtype or _norm_dtype(found))[0]
    return norm


def clip_grad_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, norm_type: float, keep_nonfinite: bool
) -> Tensor | Declined:
    """Clip in two launches; the second writes if the norm is above, and is left out if max_norm is inf."""
    found = _read(parameters, of_gradients=True)
    if reason := _reason_against_norm(found, norm_type):
        return Declined(reason)
    if not found:
        return torch.tensor(0.0)
    with current_device(device_of(found)):
        if (table := _table(found)).overlaps:
            return _OVERLAP
        norm: Tensor
        limit = threshold_on(table.device, max_norm)
        dtype = _norm_dtype(found)
        norm, coefficient = _kernels("norm").total_norm(table, norm_type, dtype, limit, keep_nonfinite)
        if not measures_only(limit):
            _kernels("scale").scale(table, coefficient)
            increment_version(found.tensors)
    return norm


def clip_grads_with_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, total_norm: Tensor
) -> Declined | None:
    """Scale by the coefficient of a norm that is known; two launches, the second writes unless it is 1."""
    is_plain = type(total_norm) in (Tensor, torch.nn.Parameter)
    if not is_plain or total_norm.dim() != 0 or not total_norm.is_floating_point():
        return Declined("total_norm is not a plain, real, 0-dim tensor")
    found = _read(parameters, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return None
    device = device_of(found)
    with current_device(device):
        norm = total_norm.detach().to(device, torch.float64, non_blocking=True)
        coefficient = _kernels("norm").coefficient_of(norm, threshold_on(device, max_norm))
        return _scale(found, coefficient)


def scale_grads_(parameters: list[Tensor], coefs: Tensor) -> Declined | None:
    """Scale by one coefficient or one each; one launch, which writes nothing where that is 1."""
    found = _read(parameters, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return None
    if coefs.device != device_of(found) or coefs.numel() not in (1, len(found)):
        return Declined("the coefficients are not on the device of the gradients, one or one for each")
    with current_device(device_of(found)):
        return _scale(found, coefs.to(torch.float64).contiguous())


def elementwise_(parameters: list[Tensor], operation: Elementwise, value: float | Tensor) -> Declined | None:
    """Change every element in one launch; reads every byte once, and writes only where one changes."""
    found = _read(parameters, of_gradients=True)
    if reason := cpu.reason_against_elementwise(found, operation, value):
        return Declined(reason)
    with current_device(device_of(found)):
        if (table := _table(found)).overlaps:
            return _OVERLAP
        _kernels("elementwise").elementwise(table, operation, threshold_on(table.device, value))
    increment_version(found.tensors)
    return None


def grad_norms(
    parameters: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | Declined:
    """Return the norm of each gradient; two launches that read every byte once. 0 for an empty gradient."""
    found = _read(parameters, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return torch.empty(0)
    with current_device(device_of(found)):
        norms: Tensor = _kernels("norm").tensor_norms(_table(found), norm_type, dtype or _norm_dtype(found))
    return norms


def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]] | Declined:
    """Return (position, nan, inf) of each tensor that is not finite; one launch, then waits for it."""
    found = _read(tensors, of_gradients=False)
    if isinstance(found, Declined):
        return found
    if not found:
        return []
    with current_device(device_of(found)):
        counts = _kernels("nonfinite").count_nonfinite(_table(found)).tolist()
    return [(position, nan, inf) for position, (nan, inf) in enumerate(counts) if nan or inf]


def clip_units_(
    parameters: list[Tensor],
    included: Sequence[bool],
    ratio: float,
    eps: float,
    grad_scale: Tensor | None,
) -> Declined | None:
    """Clip units in one launch; reads weights and gradients, and reads again and writes what is clipped."""
    params = [p for p, on in zip(parameters, included, strict=True) if on and p.numel() > 0]
    grads, weights = _read(params, of_gradients=True), _read(params, of_gradients=False)
    if isinstance(grads, Declined):
        return grads
    if isinstance(weights, Declined):
        return weights
    if not params:
        return None
    if not all(is_by_units(p) and p.grad is not None and is_by_units(p.grad) for p in params):
        return Declined("the units of a parameter do not lie one behind the other")
    of_grads, of_weights = grads.spans(), weights.spans()
    if grads.device != weights.device or (of_grads[:, 1:] != of_weights[:, 1:]).any():
        return Declined("a gradient is of another dtype or device than its parameter")
    numel = np.array([unit_numel(p) for p in params])
    if numel.max() > 2**30:
        return Declined("a unit has more than 2^30 elements")
    if overlap(of_grads):
        return _OVERLAP
    counts = of_grads[:, 1] // numel
    rows = np.column_stack((of_grads[:, 0], of_weights[:, 0], numel, counts, of_grads[:, 2]))
    device = device_of(grads)
    with current_device(device):
        table = _unit_tables.get(rows, device)
        _kernels("units").clip_units(table, ratio, eps, _beside(grad_scale, device))
    increment_version(grads.tensors)
    return None


def clip_and_step(step: Step) -> Stepped | Unready | Declined | None:
    """Clip, update and count on the device in three launches, for any number of parameters.

    A captured step follows a learning rate and a scaler's tensors that are on the device.
    """
    kind = _C.SgdStep if step.is_sgd else _C.AdamStep
    found = read_step(step, kind, dlpack_type(), lambda found: device_reason(device_of(found)))
    if isinstance(found, Declined | Unready):
        return found
    if not found:
        return None
    device = device_of(found)
    dtype = torch.float64 if found.has_float64 else torch.float32
    with current_device(device):
        norm, coefficient, skipped = _kernels("step").step(
            "sgd" if step.is_sgd else "adam",
            _step_tables.get(found.rows(), device),
            _rules.get(found.rules(), device),
            _kernels("step").Clip(
                threshold_on(device, step.max_norm),
                step.norm_type,
                step.skips,
                step.write_grads,
                _beside(step.grad_scale, device),
                _beside(step.found_inf, device),
                None if step.given is None else step.given.on(device),
                step.max_value,
            ),
            dtype,
            step.counts_on(device),
        )
    found.increment_versions(with_grads=step.write_grads)
    return Stepped(norm, coefficient, skipped, dtype)


def reason_not_to_write(grads: list[Tensor]) -> str | None:
    """Return why these gradients cannot be changed, or None."""
    found = _read(grads, of_gradients=False)
    if isinstance(found, Declined):
        return found.reason
    with current_device(device_of(found)):
        overlaps = _table(found).overlaps
    return _OVERLAP.reason if overlaps else cpu.reason_against_writing(found)


def _scale(found: Any, coefs: Tensor) -> Declined | None:
    if (table := _table(found)).overlaps:
        return _OVERLAP
    _kernels("scale").scale(table, coefs, coefs.numel() > 1)
    increment_version(found.tensors)
    return None


def _norm_dtype(found: Any) -> torch.dtype:
    return torch.float64 if found.has_float64 else torch.float32


def _read(tensors: list[Tensor], *, of_gradients: bool) -> Any:
    """Return a `_C.Tensors`, which holds the tensors until what reads them is launched, or Declined."""
    found = _C.read_tensors(tensors, of_gradients, dlpack_type())
    if isinstance(found, str):
        return Declined(found)
    if found and (reason := device_reason(device_of(found))):
        return Declined(reason)
    return found


def _reason_against_norm(found: Any, norm_type: float) -> str | None:
    """Return why there is no kernel for this norm of what was read, or was declined."""
    if isinstance(found, Declined):
        return found.reason
    if found and not norm_type > 0:
        return f"there is no kernel for norm_type={norm_type}; expected one > 0"
    return "a gradient is empty, which has no inf-norm" if norm_type == math.inf and found.has_empty else None


def _table(found: Any) -> Table:
    """Return the table of what was read, whose device is current."""
    return _tables.get(found.spans(), device_of(found))


def _beside(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device current: Triton launches on the current device and stream."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@functools.cache
def _kernels(name: str) -> Any:
    """Return a module of `fastclip.kernels`, whose import imports triton."""
    return importlib.import_module(f"fastclip.kernels.{name}")
