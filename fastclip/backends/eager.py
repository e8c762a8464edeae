"""The eager backend: torch's own operations, for everything that no kernel takes.

Plain tensors are measured in float64 (float32 where the device has no float64), so the norm is as right
as the kernels'. What is not a plain dense real tensor (DTensor, sparse, complex, nested, quantized) goes to
torch's own functions and behaves as there. torch.compile traces these functions as one graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils import clip_grad as torch_clip_grad

# The public function is bound early, so that it stays torch's own while `patch_torch` is in force.
from torch.nn.utils.clip_grad import clip_grad_value_ as _torch_clip_grad_value_
from torch.utils._foreach_utils import _device_has_foreach_support, _has_foreach_support

from fastclip.backends.base import Declined, Elementwise, declines_units, measures_only
from fastclip.backends.step import Step
from fastclip.reference import NORM_EPSILON

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_PLAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WITHOUT_FLOAT64 = ("mps", "xpu")
# log2 of the smallest positive number or of the largest, whichever is farther from 0.
_EXPONENT_BITS = {torch.float32: 149, torch.float64: 1074, torch.bfloat16: 133, torch.float16: 24}
# As many terms as 2^63 still leave room in the 1022 below which float64 is normal.
_FLOAT64_EXPONENT_BITS = 950

clip_units_ = declines_units


def unavailable_reason() -> str | None:
    """Return None: torch is always there."""
    return None


def reason_not_to_write(grads: list[Tensor]) -> str | None:
    """Return None: what torch refuses to change, it refuses itself."""
    return None


def details() -> dict[str, str]:
    """Return torch's version."""
    return {"torch": torch.__version__}


def total_norm(
    tensors: list[Tensor],
    norm_type: float,
    dtype: torch.dtype | None = None,
    foreach: bool | None = None,
) -> Tensor:
    """Return the norm of all tensors together; reads every byte once, one launch or more per tensor."""
    with torch.no_grad():
        if not are_plain(tensors):
            return torch_clip_grad._get_total_norm(tensors, norm_type, False, foreach)
        wide = _wide_norm(tensors, norm_type, foreach)
        return _returned(wide, tensors) if dtype is None else wide.to(dtype)


def clip_grad_norm_(
    parameters: list[Tensor],
    max_norm: float | Tensor,
    norm_type: float,
    keep_nonfinite: bool,
    foreach: bool | None = None,
) -> Tensor:
    """Clip; reads every byte once and always reads and writes it once more, unless max_norm is inf."""
    grads = [p.grad for p in parameters if p.grad is not None]
    with torch.no_grad():
        if not are_plain(grads):
            norm = torch_clip_grad._get_total_norm(grads, norm_type, False, foreach)
            if not measures_only(max_norm) and not (keep_nonfinite and not norm.isfinite()):
                torch_clip_grad._clip_grads_with_norm_(parameters, float(max_norm), norm, foreach)
            return norm
        wide = _wide_norm(grads, norm_type, foreach)
        norm = _returned(wide, grads)
        if grads and not measures_only(max_norm) and not (keep_nonfinite and not norm.isfinite()):
            _scale(grads, clip_coefficient(max_norm, wide), foreach)
        return norm


def clip_grads_with_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Multiply each gradient by min(1, max_norm / (total_norm + 1e-6)), always writing it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    with torch.no_grad():
        if not are_plain(grads) or type(total_norm) not in _PLAIN_TYPES:
            torch_clip_grad._clip_grads_with_norm_(parameters, float(max_norm), total_norm, foreach)
        elif grads:
            _scale(grads, clip_coefficient(max_norm, _widened(total_norm)), foreach)


def scale_grads_(parameters: list[Tensor], coefs: Tensor, foreach: bool | None = None) -> None:
    """Multiply all gradients by the one coefficient, or each by its own, always writing them."""
    grads = [p.grad for p in parameters if p.grad is not None]
    with torch.no_grad():
        if are_plain(grads) and coefs.numel() == 1:
            _scale(grads, coefs.reshape(()), foreach)
            return
        for grad, coef in zip(grads, coefs.expand(len(grads)).unbind(), strict=True):
            grad.mul_(coef.to(grad.device, torch.float64 if grad.dtype == torch.float64 else torch.float32))


def elementwise_(
    parameters: list[Tensor], operation: Elementwise, value: float | Tensor, foreach: bool | None = None
) -> None:
    """Change every element by itself."""
    _ELEMENTWISE[operation](parameters, value, foreach)


def _clamp_(parameters: list[Tensor], clip_value: float | Tensor, foreach: bool | None) -> None:
    """Clamp each gradient to [-clip_value, clip_value]; torch's own function unless a compiler traces it."""
    if not is_compiling() and not isinstance(clip_value, Tensor):
        _torch_clip_grad_value_(parameters, clip_value, foreach)
        return
    # torch 2.10 cannot trace its own, which groups the tensors first; a compiler does that by itself.
    with torch.no_grad():
        for param in parameters:
            if (grad := param.grad) is not None:
                if isinstance(clip_value, Tensor):
                    limit = clip_value.to(grad)
                    grad.clamp_(-limit, limit)
                else:
                    grad.clamp_(-clip_value, clip_value)


_ELEMENTWISE: dict[Elementwise, Callable[[list[Tensor], float | Tensor, bool | None], None]] = {
    "clamp": _clamp_
}


def grad_norms(parameters: list[Tensor], norm_type: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return the norm of each gradient; reads every byte once, one launch or more per gradient."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.empty(0)
    with torch.no_grad():
        values = [_values(position, grad) for position, grad in enumerate(grads)]
        norms = [_tensor_norm(v, norm_type) if v.numel() else v.new_zeros(()) for v in values]
        stacked = torch.stack([n.to(grads[0].device, wide_dtype(grads[0])) for n in norms])
        return stacked.to(dtype or returned_dtype(grads))


def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]]:
    """Return (position, nan, inf) of each tensor that is not finite; synchronizes with the device."""
    counts = []
    for position, tensor in enumerate(tensors):
        values = _stored(tensor.detach())
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        if nan or inf:
            counts.append((position, nan, inf))
    return counts


def clip_and_step(step: Step) -> Declined:
    """Decline: by torch's operations the update is the optimizer's own."""
    return Declined("the backend 'eager' was chosen")


def _stored(tensor: Tensor) -> Tensor:
    """Return the elements that a tensor of any layout holds, each once, of a dtype that torch can compare."""
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.is_nested:
        return (
            torch.cat([part.reshape(-1) for part in tensor.unbind()]) if tensor.size(0) else tensor.values()
        )
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
        tensor = tensor.to_dense()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _values(position: int, grad: Tensor) -> Tensor:
    """Return the magnitudes of a gradient, or something real that has the same."""
    values = _stored(grad)
    if values.is_complex():
        return values.to(torch.complex128).abs()  # where the magnitude of what is finite cannot overflow
    if not values.is_floating_point():
        raise TypeError(
            f"grad_norms: gradient {position} ({grad.dtype}, shape {tuple(grad.shape)}, {grad.device}) is "
            f"not floating point; expected a real or complex floating-point dtype."
        )
    return values


def are_plain(tensors: list[Tensor]) -> bool:
    """Whether all are ordinary tensors of one real dtype or another, whose memory holds their elements."""
    return all(
        type(t) in _PLAIN_TYPES and t.dtype in _PLAIN_DTYPES and t.layout is torch.strided and not t.is_nested
        for t in tensors
    )


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, or float32 where the tensor's device has none."""
    return torch.float32 if tensor.device.type in _WITHOUT_FLOAT64 else torch.float64


def _widened(norm: Tensor) -> Tensor:
    return norm.to(torch.promote_types(norm.dtype, wide_dtype(norm)))


def returned_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype in which a norm of these tensors is returned."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(t.dtype in wide for t in tensors) else torch.float32


def _returned(wide: Tensor, tensors: list[Tensor]) -> Tensor:
    return wide.to(returned_dtype(tensors)) if tensors else torch.tensor(0.0)


def _groups(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _use_foreach(group: list[Tensor], foreach: bool | None) -> bool:
    """Decide as torch does, and object as it does when foreach=True cannot be had."""
    device = group[0].device
    if foreach is None:
        return bool(_has_foreach_support(group, device))
    if foreach and not _device_has_foreach_support(device):
        raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
    return bool(foreach)


def _wide_norm(tensors: list[Tensor], norm_type: float, foreach: bool | None) -> Tensor:
    """Return the total norm before it is rounded to the dtype that the caller gets."""
    if not tensors:
        return torch.tensor(0.0)
    norms: list[Tensor] = []
    for group in _groups(tensors):
        if _use_foreach(group, foreach) and not _may_leave_float64(group[0].dtype, norm_type):
            norms.extend(torch._foreach_norm(group, norm_type, dtype=wide_dtype(group[0])))
        else:
            norms.extend(_tensor_norm(g, norm_type) for g in group)
    first = tensors[0]
    here = [n.to(first.device, wide_dtype(first)) for n in norms]
    return combined(here, norm_type, {t.dtype for t in tensors})


def combined(norms: list[Tensor], norm_type: float, dtypes: Iterable[torch.dtype]) -> Tensor:
    """Return the norm of all from norms on one device, each of one tensor or more, of these dtypes."""
    stacked = torch.cat([norm.reshape(-1) for norm in norms])
    if any(_may_leave_float64(dtype, norm_type) for dtype in dtypes):
        return _scaled_norm(stacked, norm_type)
    total: Tensor = torch.linalg.vector_norm(stacked, norm_type)
    return total


def _may_leave_float64(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether |x|^p of a finite x that is not 0 can over- or underflow in float64."""
    return 1.0 < norm_type < math.inf and norm_type * _EXPONENT_BITS.get(dtype, 0) > _FLOAT64_EXPONENT_BITS


def _tensor_norm(tensor: Tensor, norm_type: float) -> Tensor:
    """Return the norm of one tensor in the wide dtype."""
    dtype = wide_dtype(tensor)
    if _may_leave_float64(tensor.dtype, norm_type):
        return _scaled_norm(tensor.to(dtype), norm_type)
    norm: Tensor = torch.linalg.vector_norm(tensor, norm_type, dtype=dtype)
    return norm


def _scaled_norm(tensor: Tensor, norm_type: float) -> Tensor:
    """Return the p-norm with the elements scaled by a power of two near the largest; reads three times."""
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    largest = torch.linalg.vector_norm(tensor, math.inf)
    # Half the exponent twice: the inverse of the smallest subnormal is itself out of range.
    half_exponent = (largest.log2() / 2).floor()
    factor = torch.where((largest > 0) & largest.isfinite(), torch.exp2(-half_exponent), 1.0)
    norm: Tensor = torch.linalg.vector_norm(tensor * factor * factor, norm_type) / factor / factor
    return norm


def clip_coefficient(max_norm: float | Tensor, norm: Tensor) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), and 1 where max_norm is inf; of the dtype of the norm."""
    if not isinstance(max_norm, Tensor):
        if max_norm == math.inf:
            return torch.ones_like(norm)
        return torch.clamp(max_norm / (norm + NORM_EPSILON), max=1.0)
    limit = max_norm.detach().to(norm.device, norm.dtype, non_blocking=True)
    coef = torch.clamp(limit / (norm + NORM_EPSILON), max=1.0)
    return torch.where(limit == math.inf, 1.0, coef)


def _scale(grads: list[Tensor], coef: Tensor, foreach: bool | None) -> None:
    for group in _groups(grads):
        wide = torch.float64 if group[0].dtype == torch.float64 else torch.float32
        factor = coef.to(group[0].device, wide)
        if _use_foreach(group, foreach):
            torch._foreach_mul_(group, factor)
        else:
            for grad in group:
                grad.mul_(factor)
