"""The C++ CPU backend: `fastclip._C` behind the backend interface.

Takes dense tensors of float16, bfloat16, float32 and float64 on the CPU, mixed freely. One call reads
the list of parameters, partitions it and runs all stages in one parallel region; see csrc/README.md.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import DLDeviceType

from fastclip.backends.base import Declined, Elementwise, declines_units
from fastclip.backends.step import Step, Stepped, Unready

_C: Any
try:
    from fastclip import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    # Only the absence of the extension is a reason to go on without it; a broken one says why it is broken.
    _C = None
    _reason: str | None = f"the C++ extension is not built or does not load ({error})"
else:
    _reason = _C.set_torch(torch.Tensor, torch.nn.Parameter, torch.autograd.graph.increment_version) or None
    os.register_at_fork(after_in_child=_C.after_fork_in_child)
    _forced = os.environ.get("FASTCLIP_INSTRUCTION_SET")
    if _forced and not _C.select_instruction_set(_forced):
        raise ValueError(
            f"FASTCLIP_INSTRUCTION_SET: this machine cannot run {_forced!r}; "
            f"expected one of {', '.join(_C.supported_instruction_sets())}."
        )

clip_units_ = declines_units


def unavailable_reason() -> str | None:
    """Return why the extension cannot be used, or None."""
    return _reason


def details() -> dict[str, str]:
    """Return the instruction set in use, those that this machine can run, the threads and the compiler."""
    if _C is None:
        return {}
    return {
        "instruction set": _C.instruction_set(),
        "supported": ", ".join(_C.supported_instruction_sets()),
        "threads": str(torch.get_num_threads()),
        "compiler": _C.COMPILER,
    }


def total_norm(
    tensors: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | Declined:
    """Return the norm of all tensors together; reads every byte once."""
    if not norm_type > 0:
        return _no_kernel(norm_type)
    wide = dtype is torch.float64
    return _scalar(_C.total_norm(tensors, norm_type, wide, torch.get_num_threads()))


def clip_grad_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, norm_type: float, keep_nonfinite: bool
) -> Tensor | Declined:
    """Clip in one call; reads every byte once, and reads and writes it once more if the norm is above."""
    if not norm_type > 0:
        return _no_kernel(norm_type)
    return _scalar(
        _C.clip_grad_norm_(parameters, float(max_norm), norm_type, keep_nonfinite, torch.get_num_threads())
    )


def clip_grads_with_norm_(
    parameters: list[Tensor], max_norm: float | Tensor, total_norm: Tensor
) -> Declined | None:
    """Scale by the coefficient of a norm that is known; writes nothing if that is 1."""
    if type(total_norm) is not Tensor or total_norm.device.type != "cpu" or total_norm.dim() != 0:
        return Declined("total_norm is not a plain 0-dim tensor on the CPU")
    if total_norm.is_complex():
        return Declined("total_norm is complex")
    return _declined(
        _C.clip_grads_with_norm_(parameters, float(max_norm), total_norm.item(), torch.get_num_threads())
    )


def scale_grads_(parameters: list[Tensor], coefs: Tensor) -> Declined | None:
    """Scale by one coefficient or one each; reads and writes every byte whose coefficient is not 1."""
    return _declined(_C.scale_grads_(parameters, coefs.tolist(), torch.get_num_threads()))


def elementwise_(parameters: list[Tensor], operation: Elementwise, value: float | Tensor) -> Declined | None:
    """Change every element by itself; reads every byte once, and writes only where one changes."""
    value = float(value)
    if value != value:
        return Declined(f"{operation} by nan")
    num_grads = _C.elementwise_(parameters, operation, value, torch.get_num_threads())
    if num_grads == 0:
        return Declined("there is no gradient")
    return _declined(num_grads)


def grad_norms(
    parameters: list[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor | Declined:
    """Return the norm of each gradient; reads every byte once."""
    result = _C.grad_norms(parameters, norm_type, torch.get_num_threads())
    if isinstance(result, str):
        return Declined(result)
    norms, any_float64 = result
    dtype = dtype or (torch.float64 if any_float64 else torch.float32)
    return torch.tensor(norms, dtype=dtype, device="cpu")


def count_nonfinite(tensors: list[Tensor]) -> list[tuple[int, int, int]] | Declined:
    """Return (position, nan, inf) of each tensor that is not finite; reads every byte once."""
    result = _C.count_nonfinite(tensors, torch.get_num_threads())
    return Declined(result) if isinstance(result, str) else result


def clip_and_step(step: Step) -> Stepped | Unready | Declined | None:
    """Clip and update in one parallel region."""
    first = next((param for group in step.param_groups for param in group["params"]), None)
    if first is not None and first.device.type != "cpu":
        # Before anything is asked of a device: a scaler's scale is there, too.
        return Declined(f"the parameters are on {first.device}")
    given = step.given
    if given is not None and bool(given.skipped):
        return None
    kernel = _C.sgd_step if step.is_sgd else _C.adam_step
    result = kernel(
        step.param_groups,
        step.state,
        step.fresh,
        float(step.max_norm),
        step.norm_type,
        1.0 if step.grad_scale is None else float(step.grad_scale),
        step.skips,
        step.write_grads,
        torch.get_num_threads(),
        [] if given is None else given.coefs.tolist(),
        step.max_value,
        step.units or (0.0, 0.0, []),
        step.dtensor,
        step.instead,
    )
    if isinstance(result, tuple):
        norm, coef, skipped, any_float64 = result
        return Stepped(norm, coef, skipped, torch.float64 if any_float64 else torch.float32)
    if isinstance(result, list):
        return Unready(result, [])
    return _declined(result)


def reason_not_to_write(grads: list[Tensor]) -> str | None:
    """Return why these gradients cannot be changed, or None."""
    return reason_against_writing(_C.read_tensors(grads, False, DLDeviceType.kDLCPU))


def reason_against_writing(found: Any) -> str | None:
    """Return why what `_C` has read cannot be written, or None; a string is why it could not be read."""
    if isinstance(found, str):
        return found
    return "a gradient is a lazily negated view" if found.has_lazy_negation() else None


def reason_against_elementwise(found: Any, operation: Elementwise, value: float | Tensor) -> str | None:
    """Return why an operation cannot be applied to what was read for a device, or was declined; or None."""
    if isinstance(found, Declined):
        return found.reason
    if not isinstance(value, Tensor) and value != value:
        return f"{operation} by nan"
    return reason_against_writing(found) if found else "there is no gradient"


def _no_kernel(norm_type: float) -> Declined:
    return Declined(f"there is no kernel for norm_type={norm_type}; expected one > 0")


def _declined(result: Any) -> Declined | None:
    return Declined(result) if isinstance(result, str) else None


def _scalar(result: Any) -> Tensor | Declined:
    if isinstance(result, tuple):
        norm, is_float64 = result
        dtype = torch.float64 if is_float64 else torch.float32
        return torch.scalar_tensor(norm, dtype=dtype, device="cpu")
    if result is None:
        return torch.tensor(0.0)
    return Declined(result)
