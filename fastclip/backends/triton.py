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
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastclip.backends.base import Declined
from fastclip.kernels.table import DTYPES, Int64Array, Table, TableCache, has_empty, read_spans

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_MIN_COMPUTE_CAPABILITY = (8, 0)

_tables = TableCache()


def unavailable_reason() -> str | None:
    """Return why Triton cannot be used, or None; makes no context on a device."""
    return _unavailable_reason(_interpreted())


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
    if _interpreted():
        devices = "the CPU, interpreted (TRITON_INTERPRET=1)"
    else:
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {"triton": version("triton"), "devices": devices}


def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor | Declined:
    """Return the norm of all tensors together; one launch that reads every byte once."""
    if not tensors:
        return torch.tensor(0.0)
    taken = _taken(tensors, norm_type)
    if isinstance(taken, Declined):
        return taken
    with taken.current_device():
        norm: Tensor = _launch().total_norm(taken.table(), norm_type, taken.norm_dtype)[0]
    return norm


def clip_grad_norm_(
    parameters: list[Tensor], max_norm: float, norm_type: float, keep_nonfinite: bool
) -> Tensor | Declined:
    """Clip in two launches; the second writes if the norm is above, and is left out if max_norm is inf."""
    grads = _gradients(parameters)
    if not grads:
        return torch.tensor(0.0)
    taken = _taken(grads, norm_type)
    if isinstance(taken, Declined):
        return taken
    with taken.current_device():
        table = taken.table()
        if table.overlaps:
            return _OVERLAP
        clipped: tuple[Tensor, Tensor] = _launch().total_norm(
            table, norm_type, taken.norm_dtype, max_norm, keep_nonfinite
        )
        norm, coefficient = clipped
        if max_norm != math.inf:
            _launch().scale(table, coefficient)
            increment_version(grads)
    return norm


def clip_grads_with_norm_(parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> Declined | None:
    """Scale by the coefficient of a norm that is known; two launches, the second writes unless it is 1."""
    if type(total_norm) not in _PLAIN_TYPES or total_norm.dim() != 0 or not total_norm.is_floating_point():
        return Declined("total_norm is not a plain, real, 0-dim tensor")
    grads = _gradients(parameters)
    if not grads:
        return None
    taken = _taken(grads)
    if isinstance(taken, Declined):
        return taken
    with taken.current_device():
        table = taken.table()
        if table.overlaps:
            return _OVERLAP
        norm = total_norm.detach().to(taken.device, torch.float64, non_blocking=True)
        _launch().scale(table, _launch().clip_coefficient(norm, max_norm))
        increment_version(grads)
    return None


def clip_grad_value_(parameters: list[Tensor], clip_value: float) -> Declined | None:
    """Clamp in one launch; reads every byte once, and writes only where an element is outside."""
    if math.isnan(clip_value):
        return Declined("clip_value is nan")
    grads = _gradients(parameters)
    if not grads:
        return Declined("there is no gradient")
    if any(grad.is_neg() for grad in grads):
        return Declined("a gradient is a lazily negated view")
    taken = _taken(grads)
    if isinstance(taken, Declined):
        return taken
    with taken.current_device():
        table = taken.table()
        if table.overlaps:
            return _OVERLAP
        _launch().clamp(table, -clip_value, clip_value)
        increment_version(grads)
    return None


def grad_norms(parameters: list[Tensor], norm_type: float) -> Tensor | Declined:
    """Return the norm of each gradient; two launches that read every byte once. 0 for an empty gradient."""
    grads = _gradients(parameters)
    if not grads:
        return torch.empty(0)
    taken = _taken(grads)
    if isinstance(taken, Declined):
        return taken
    with taken.current_device():
        norms: Tensor = _launch().tensor_norms(taken.table(), norm_type, taken.norm_dtype)
    return norms


def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]] | Declined:
    """Return (position, nan, inf) of each tensor that is not finite; one launch, then waits for it."""
    if not tensors:
        return []
    taken = _taken(tensors)
    if isinstance(taken, Declined):
        return taken
    with taken.current_device():
        counts = _launch().count_nonfinite(taken.table()).tolist()
    return [(position, nan, inf) for position, (nan, inf) in enumerate(counts) if nan or inf]


_OVERLAP = Declined("two gradients share memory")


@dataclass(frozen=True)
class _Taken:
    """Tensors that the kernels can take, all on one device."""

    spans: Int64Array
    device: torch.device
    norm_dtype: torch.dtype

    def table(self) -> Table:
        return _tables.get(self.spans, self.device)

    def current_device(self) -> AbstractContextManager[object]:
        """Make the device current: Triton launches on the current device and stream."""
        return contextlib.nullcontext() if self.device.type == "cpu" else torch.cuda.device(self.device)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [grad for p in parameters if (grad := p.grad) is not None]


def _taken(tensors: list[Tensor], norm_type: float | None = None) -> _Taken | Declined:
    """Read the tensors' addresses, or say what is in the way; about 1 us per tensor."""
    if norm_type is not None and not norm_type > 0:
        return Declined(f"there is no kernel for norm_type={norm_type}; expected one > 0")
    device = tensors[0].device
    if reason := _device_reason(device, _interpreted()):
        return Declined(reason)
    for position, tensor in enumerate(tensors):
        if reason := _tensor_reason(tensor, device):
            return Declined(f"gradient {position} ({type(tensor).__name__}, {tensor.dtype}) {reason}")
    try:
        spans = read_spans(tensors)
    except RuntimeError as error:
        # torch gives no address of what only stands for memory: functorch, functional and meta tensors.
        return Declined(f"a gradient has no plain memory ({error})")
    if norm_type == math.inf and has_empty(spans):
        return Declined("a gradient is empty, which has no inf-norm")
    any_float64 = any(t.dtype == torch.float64 for t in tensors)
    return _Taken(spans, device, torch.float64 if any_float64 else torch.float32)


def _tensor_reason(tensor: Tensor, device: torch.device) -> str | None:
    if type(tensor) not in _PLAIN_TYPES:
        return "is not a plain torch.Tensor"
    if tensor.dtype not in DTYPES:
        return "is not float16, bfloat16, float32 or float64"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is not strided"
    if tensor.device != device:
        return f"is on {tensor.device}, the first on {device}"
    if not (tensor.is_contiguous() or _is_dense(tensor)):
        return "is not dense in memory"
    return None


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or repeat, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


@functools.cache
def _device_reason(device: torch.device, interpreted: bool) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    if interpreted:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 takes CPU tensors only"
    if device.type != "cuda":
        return f"there is no kernel for {device.type} tensors"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < _MIN_COMPUTE_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; Triton needs 8.0"
    return None


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _launch() -> Any:
    from fastclip.kernels import launch

    return launch
