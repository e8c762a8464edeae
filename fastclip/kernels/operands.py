"""Which tensors the kernels take, on which devices, and why not the others."""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

from fastclip.kernels.table import DTYPES

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_MIN_COMPUTE_CAPABILITY = (8, 0)


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def norm_reason(norm_type: float, any_empty: bool) -> str | None:
    """Return why there is no kernel for the norm of gradients, of which one may be empty, or None."""
    if not norm_type > 0:
        return f"there is no kernel for norm_type={norm_type}; expected one > 0"
    if norm_type == math.inf and any_empty:
        return "a gradient is empty, which has no inf-norm"
    return None


def device_reason(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    return _device_reason(device, is_interpreted())


@functools.cache
def _device_reason(device: torch.device, interpreted: bool) -> str | None:
    if interpreted:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 takes CPU tensors only"
    if device.type != "cuda":
        return f"there is no kernel for {device.type} tensors"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda and capability < _MIN_COMPUTE_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; Triton needs 8.0"
    return None


def tensor_reason(tensor: Tensor, device: torch.device) -> str | None:
    """Return what is in the way of reading a tensor as plain memory on a device, or None."""
    if type(tensor) not in PLAIN_TYPES:
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


def is_alike(tensor: Tensor, model: Tensor) -> bool:
    """Whether a tensor has its elements in the same type, device and order as one that is plain memory."""
    if type(tensor) not in PLAIN_TYPES or tensor.layout != torch.strided or tensor.is_nested:
        return False
    if tensor.dtype != model.dtype or tensor.device != model.device or tensor.shape != model.shape:
        return False
    if tensor.is_contiguous() and model.is_contiguous():
        return True
    # Strides of dimensions of size 1 are never used.
    return all(
        here == there
        for here, there, size in zip(tensor.stride(), model.stride(), tensor.shape, strict=True)
        if size != 1
    )
