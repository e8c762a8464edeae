"""The CUDA backend: libfastclip_cuda, reached through `fastclip._C`.

Takes dense tensors of float16, bfloat16, float32 and float64 on one CUDA device, mixed freely: one launch for
a norm and two for a clip, whatever their number, and no host synchronization. Lists over several devices come
here device by device (`devices`). See csrc/cuda/README.md.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.dlpack import DLDeviceType

from fastclip.backends import cpu
from fastclip.backends.base import Declined, Elementwise, declines_units, measures_only, threshold_on
from fastclip.backends.read_step import read_step
from fastclip.backends.step import Step, Stepped, Unready

_C = cpu._C
_FOLDER = Path(__file__).resolve().parents[1]

DLPACK_TYPE = DLDeviceType.kDLCUDA
"""Of the devices that the library runs on."""

clip_units_ = declines_units


def _library_path() -> Path | None:
    """Return where the library for this torch's CUDA major is, whether it exists or not."""
    version = torch.version.cuda
    return None if version is None else _FOLDER / f"libfastclip_cuda{version.split('.')[0]}.so"


@functools.cache
def unavailable_reason() -> str | None:
    """Return why no CUDA tensor can be taken, or None.

    Does not initialize CUDA, which a process that forks later must not do: whether the driver and the device
    suit the library shows when the first CUDA tensor arrives.
    """
    path = _library_path()
    if _C is None:
        return cpu.unavailable_reason()
    if path is None:
        return "this torch is built without CUDA"
    if not path.exists():
        built = ", ".join(p.name for p in sorted(_FOLDER.glob("libfastclip_cuda*.so"))) or "none"
        return f"{path.name}, for torch's CUDA {torch.version.cuda}, is not built (there is: {built})"
    if reason := cpu.unavailable_reason() or _C.load_cuda_library(str(path)):
        return str(reason)
    if torch.cuda.device_count() == 0:
        return "there is no CUDA device, or no driver"
    return None


def details() -> dict[str, str]:
    """Return the library's path and the number of devices, as far as they are known."""
    if unavailable_reason() is not None:
        return {}
    return {"library": str(_library_path()), "devices": str(torch.cuda.device_count())}


def total_norm(
    tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | Declined:
    """Return the norm of all tensors together; one launch, reads every byte once."""
    found = _collect_for_norm(tensors, norm_type, of_gradients=False)
    if isinstance(found, Declined):
        return found
    if not found:
        return torch.tensor(0.0)
    norm, workspace = _empty_norms(found, (), dtype), _workspace(found)
    coefficient = _empty_coefficient(found)
    reason = found.total_norm(
        norm_type,
        math.inf,
        0,
        norm.data_ptr(),
        norm.dtype is torch.float64,
        coefficient.data_ptr(),
        workspace.data_ptr(),
    )
    return Declined(reason) if reason else norm


def clip_grad_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, norm_type: float, keep_nonfinite: bool
) -> Tensor | Declined:
    """Clip in two launches; reads every byte once, and reads and writes it once more if the norm is above.

    `keep_nonfinite` waits for the norm before it writes.
    """
    found = _collect_for_norm(parameters, norm_type, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return torch.tensor(0.0)
    limit = threshold_on(_device(found), max_norm)
    norm, workspace = _empty_norms(found, ()), _workspace(found)
    if not keep_nonfinite:
        reason = found.clip_grad_norm(*_arguments_of(limit), norm_type, norm.data_ptr(), workspace.data_ptr())
        if not reason and not measures_only(limit):
            increment_version(found.tensors)
        return Declined(reason) if reason else norm

    coefficient = _empty_coefficient(found)
    reason = found.total_norm(
        norm_type,
        *_arguments_of(limit),
        norm.data_ptr(),
        norm.dtype is torch.float64,
        coefficient.data_ptr(),
        workspace.data_ptr(),
    )
    if not reason and not measures_only(limit) and math.isfinite(norm.item()):
        reason = found.scale(coefficient.data_ptr(), False)
        increment_version(found.tensors)
    return Declined(reason) if reason else norm


def clip_grads_with_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, total_norm: Tensor
) -> Declined | None:
    """Scale by the coefficient of a norm that is known; one launch, which writes nothing if that is 1."""
    found = _collect(parameters, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return None
    if type(total_norm) is not Tensor or total_norm.device != _device(found) or total_norm.dim() != 0:
        return Declined("total_norm is not a plain 0-dim tensor on the device of the gradients")
    if not total_norm.is_floating_point():
        return Declined("total_norm is not floating point")
    if total_norm.dtype not in (torch.float32, torch.float64):
        total_norm = total_norm.float()
    limit = threshold_on(_device(found), max_norm)
    reason = found.clip_grads_with_norm(
        *_arguments_of(limit), total_norm.data_ptr(), total_norm.dtype == torch.float64
    )
    if reason:
        return Declined(reason)
    increment_version(found.tensors)
    return None


def scale_grads_(parameters: list[Tensor], coefs: Tensor) -> Declined | None:
    """Scale by one coefficient or one each; one launch, which writes nothing where that is 1."""
    found = _collect(parameters, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return None
    if coefs.device != _device(found) or coefs.numel() not in (1, len(found)):
        return Declined("the coefficients are not on the device of the gradients, one or one for each")
    on_device = coefs.to(torch.float64).contiguous()
    if reason := found.scale(on_device.data_ptr(), coefs.numel() > 1):
        return Declined(reason)
    increment_version(found.tensors)
    return None


def elementwise_(parameters: list[Tensor], operation: Elementwise, value: float | Tensor) -> Declined | None:
    """Change elements by themselves; one launch, reads every byte once, writes only where one changes."""
    found = _collect(parameters, of_gradients=True)
    if reason := cpu.reason_against_elementwise(found, operation, value):
        return Declined(reason)
    by = threshold_on(_device(found), value)
    if reason := found.elementwise(operation, *_arguments_of(by)):
        return Declined(reason)
    increment_version(found.tensors)
    return None


def grad_norms(
    parameters: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | Declined:
    """Return the norm of each gradient; two launches, reads every byte once."""
    found = _collect(parameters, of_gradients=True)
    if isinstance(found, Declined):
        return found
    if not found:
        return torch.empty(0)
    norms, workspace = _empty_norms(found, (len(found),), dtype), _workspace(found)
    reason = found.norms(norm_type, norms.data_ptr(), norms.dtype is torch.float64, workspace.data_ptr())
    return Declined(reason) if reason else norms


def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]] | Declined:
    """Return (position, nan, inf) of each tensor that is not finite; two launches, then waits for them."""
    found = _collect(tensors, of_gradients=False)
    if isinstance(found, Declined):
        return found
    if not found:
        return []
    counts = torch.empty((len(found), 2), dtype=torch.int64, device=_device(found))
    workspace = _workspace(found)
    if reason := found.count_nonfinite(counts.data_ptr(), workspace.data_ptr()):
        return Declined(reason)
    listed = zip(found.positions, counts.tolist(), strict=True)
    return [(position, nan, inf) for position, (nan, inf) in listed if nan or inf]


def clip_and_step(step: Step) -> Stepped | Unready | Declined | None:
    """Clip, update and count on the device in three launches, for any number of parameters.

    A captured step follows a learning rate and a scaler's tensors that are on the device.
    """
    kind = _C.CudaSgdStep if step.is_sgd else _C.CudaAdamStep
    found = read_step(step, kind, DLPACK_TYPE, lambda found: _unusable_device(found.device))
    if isinstance(found, Declined | Unready):
        return found
    if not found:
        return None
    device = _device(found)
    dtype = torch.float64 if found.has_float64 else torch.float32
    given = None if step.given is None else step.given.on(device)
    if given is None:
        total_norm, clip_coef = torch.empty(2, dtype=dtype, device=device).unbind()
        skipped = torch.empty((), dtype=torch.bool, device=device)
    else:
        _, total_norm, clip_coef, skipped = given
    limit = threshold_on(device, step.max_norm)
    workspace = _workspace(found)
    grad_scale, found_inf = (_float32_on(device, value) for value in (step.grad_scale, step.found_inf))
    reason = found.run(
        step.norm_type,
        *_arguments_of(limit),
        0 if given is None else given.coefs.data_ptr(),
        given is not None and given.coefs.numel() > 1,
        step.max_value,
        step.skips,
        step.write_grads,
        0 if grad_scale is None else grad_scale.data_ptr(),
        0 if found_inf is None else found_inf.data_ptr(),
        total_norm.dtype == torch.float64,
        total_norm.data_ptr(),
        clip_coef.data_ptr(),
        skipped.data_ptr(),
        step.counts_on(device).data_ptr(),
        workspace.data_ptr(),
    )
    return Declined(reason) if reason else Stepped(total_norm, clip_coef, skipped, dtype)


def reason_not_to_write(grads: list[Tensor]) -> str | None:
    """Return why these gradients cannot be changed, or None."""
    found = _collect(grads, of_gradients=False)
    return found.reason if isinstance(found, Declined) else cpu.reason_against_writing(found)


def _collect(tensors: list[Tensor], *, of_gradients: bool) -> Any:
    """Return a `_C.CudaTensors` or Declined."""
    found = _C.CudaTensors.collect(tensors, of_gradients, DLPACK_TYPE)
    if isinstance(found, str):
        return Declined(found)
    if found and (reason := _unusable_device(found.device)):
        return Declined(reason)
    return found


def _collect_for_norm(tensors: list[Tensor], norm_type: float, *, of_gradients: bool) -> Any:
    if not norm_type > 0:
        return Declined(f"there is no kernel for norm_type={norm_type}; expected one > 0")
    found = _collect(tensors, of_gradients=of_gradients)
    if not isinstance(found, Declined) and math.isinf(norm_type) and found.has_empty:
        return Declined("a gradient is empty, which has no inf-norm")
    return found


@functools.cache
def _unusable_device(index: int) -> str | None:
    """Return why the library cannot run on a device, asking it once."""
    reason = _C.probe_cuda(index)
    return f"libfastclip_cuda cannot run on cuda:{index} ({reason})" if reason else None


def _device(found: Any) -> torch.device:
    return torch.device("cuda", found.device)


def _arguments_of(max_norm: float | Tensor) -> tuple[float, int]:
    """Return the number and the address on the device that the library takes; the address counts if not 0."""
    return (math.inf, max_norm.data_ptr()) if isinstance(max_norm, Tensor) else (max_norm, 0)


def _float32_on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True)


# Memory comes from torch's allocator, on the stream that the kernels run on: freed behind them, and inside a
# graph capture kept for the replays.
def _empty_norms(found: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    own = torch.float64 if found.has_float64 else torch.float32
    return torch.empty(shape, dtype=dtype or own, device=_device(found))


def _empty_coefficient(found: Any) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=_device(found))


def _workspace(found: Any) -> Tensor:
    return torch.empty(found.workspace_bytes, dtype=torch.uint8, device=_device(found))
