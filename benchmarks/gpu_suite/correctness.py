"""Every case of the test suite, on the device, for each backend, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import tolerance
import torch
from cases import CASES, DTYPES, NORM_TYPES, Case, dtype_id
from torch import Tensor

import fastclip
from fastclip import reference
from gpu_suite.device import Device

# Roundings in float32 that follow each other before a kernel widens its sum.
ROUNDINGS_IN_A_ROW = 8


def failures(device: Device, backend: str) -> Iterator[tuple[str, str | None]]:
    """Yield (check, what is wrong with it or None) of every case, dtype and norm."""
    for case in CASES:
        if not case.dense:
            continue
        for dtype in DTYPES:
            for norm_type in NORM_TYPES:
                if norm_type == math.inf and case.has_empty:
                    continue
                name = f"{case.name} {dtype_id(dtype)} p={norm_type:g}"
                with fastclip.use_backend(backend):
                    yield name, _complaint(device, case, dtype, norm_type)


def _complaint(device: Device, case: Case, dtype: torch.dtype, norm_type: float) -> str | None:
    try:
        _check_norms(device, case, dtype, norm_type)
        # What is aliased is declined for writing by some backends and scaled in turn by others.
        if not case.aliased:
            _check_clip(device, case, dtype, norm_type)
    except AssertionError as error:
        return str(error).strip() or "assertion failed"
    return None


def _check_norms(device: Device, case: Case, dtype: torch.dtype, norm_type: float) -> None:
    tensors = case.tensors(device.torch_device, dtype)
    bound = _bound(tensors, norm_type)
    norms = [fastclip.get_total_norm(tensors, norm_type) for _ in range(3)]
    tolerance.assert_norm(norms[0].cpu(), case.oracle_norm(dtype, norm_type), bound)
    for norm in norms[1:]:
        torch.testing.assert_close(norm, norms[0], rtol=0, atol=0, equal_nan=True)
    parameters = case.parameters(device.torch_device, dtype)
    for norm, tensor in zip(fastclip.grad_norms(parameters, norm_type), tensors, strict=True):
        want = reference.total_norm([tensor], norm_type) if tensor.numel() else 0.0
        tolerance.assert_norm(norm.cpu(), want, _bound([tensor], norm_type))
    counts = {
        str(i): (int(t.isnan().sum()), int(t.isinf().sum()))
        for i, t in enumerate(tensors)
        if not bool(t.isfinite().all())
    }
    named = [(str(i), p) for i, p in enumerate(p for p in parameters if p.grad is not None)]
    assert fastclip.find_nonfinite(named) == counts


def _check_clip(device: Device, case: Case, dtype: torch.dtype, norm_type: float) -> None:
    before = case.tensors("cpu", dtype)
    total_norm = case.oracle_norm(dtype, norm_type)
    max_norm = min(0.5 * total_norm, 1e300) if math.isfinite(total_norm) else 1.0
    clipped = case.parameters(device.torch_device, dtype)
    fastclip.clip_grad_norm_(clipped, max_norm, norm_type)
    relative = _bound(before, norm_type) + 8 * tolerance.FLOAT32_UNIT
    coefficient = reference.clip_coefficient(total_norm, max_norm)
    for parameter, was in zip((p for p in clipped if p.grad is not None), before, strict=True):
        want = was.double() * coefficient
        tolerance.assert_scaled(parameter.grad, was, want, relative + 2 * tolerance.unit(was.dtype))

    untouched = case.parameters(device.torch_device, dtype)
    if math.isfinite(total_norm):
        fastclip.clip_grad_norm_(untouched, 2.0 * total_norm + 1.0, norm_type)
    else:
        fastclip.clip_grad_norm_(untouched, math.inf, norm_type)
    for parameter, was in zip((p for p in untouched if p.grad is not None), before, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), was, rtol=0, atol=0, equal_nan=True)

    if any(p.grad is not None for p in untouched):
        fastclip.clip_grad_value_(untouched, 0.25)
        for parameter, was in zip((p for p in untouched if p.grad is not None), before, strict=True):
            want = was.clamp(-0.25, 0.25)
            torch.testing.assert_close(parameter.grad.cpu(), want, rtol=0, atol=0, equal_nan=True)


def _bound(tensors: list[Tensor], norm_type: float) -> float:
    if norm_type == math.inf:
        return tolerance.FLOAT32_UNIT
    numel = sum(t.numel() for t in tensors)
    wide = max((tolerance.norm(t.dtype, numel, norm_type) for t in tensors), default=0.0)
    return wide + (ROUNDINGS_IN_A_ROW / norm_type + 1) * tolerance.FLOAT32_UNIT
