"""The launches of an optimizer's step: norm, decision, update. Nothing here synchronizes with the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.kernels import launch
from fastclip.kernels.coefficients import adam_coefficients_kernel, sgd_coefficients_kernel
from fastclip.kernels.launch import Blocks
from fastclip.kernels.step import adam_kernel, sgd_kernel
from fastclip.kernels.step_table import StepTable

KERNELS = {
    "adam": (adam_coefficients_kernel, adam_kernel),
    "sgd": (sgd_coefficients_kernel, sgd_kernel),
}

# One thread per tensor: a second one might read a counter that the first has counted up.
TENSORS_PER_PROGRAM = 64
OF_TENSORS = Blocks(rows=0, threads=TENSORS_PER_PROGRAM, programs_per_unit=1)


@dataclass(frozen=True)
class Clip:
    """How a step clips; the fields of optim.settings.Settings and Amp that kernels read.

    Attributes:
        given: Coefficients for all tensors or each, float64, and the outcome that goes with them: norm,
            coefficient and verdict, 0-dim. None: they follow from the norm.
        max_value: Bound of each element's magnitude, after all that.
    """

    max_norm: float | Tensor
    norm_type: float
    skips: bool
    write_grads: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    given: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    max_value: float = math.inf


def step(
    kind: str, table: StepTable, rules: Tensor, clip: Clip, dtype: torch.dtype, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip, update and count in three launches, or two where the coefficients are given.

    Args:
        kind: Key of KERNELS.
        table: The parameters.
        rules: (groups, 9) float64, see coefficients.py.
        clip: How to clip.
        dtype: Of the norm and the coefficient that are returned.
        counts: (5,) float64, see coefficients.py.

    Returns:
        The norm of the unscaled gradients, the coefficient, and whether the step was skipped (bool); 0-dim.
    """
    device = table.grads.device
    scaled_norm, given = None, None
    if clip.given is None:
        scaled_norm, _ = launch.total_norm(table.grads, clip.norm_type, torch.float64)
        norm, coefficient = (torch.empty((), dtype=dtype, device=device) for _ in range(2))
        skipped = torch.empty((), dtype=torch.bool, device=device)
    else:
        given, norm, coefficient, skipped = clip.given
    # Triton has no bool in memory.
    skipped_byte = skipped.view(torch.uint8)
    decide, update = KERNELS[kind]
    num_tensors = table.grads.num_tensors
    decide[(-(-num_tensors // TENSORS_PER_PROGRAM),)](
        scaled_norm,
        given,
        clip.grad_scale,
        clip.found_inf,
        *launch.threshold(clip.max_norm),
        int(clip.skips),
        norm,
        coefficient,
        skipped_byte,
        counts,
        table.targets,
        num_tensors,
        rules,
        table.coefficients,
        PER_TENSOR=given is not None and given.numel() > 1,
        TENSORS=TENSORS_PER_PROGRAM,
        **OF_TENSORS.options(),
    )
    layout = launch.blocks(kind, device)
    update[launch.grid(table.grads, layout)](
        table.grads.chunks,
        table.grads.num_chunks,
        table.targets,
        table.coefficients,
        skipped_byte,
        clip.max_value,
        WRITE_GRADS=clip.write_grads,
        ROWS=layout.rows,
        **layout.options(),
    )
    return norm, coefficient, skipped
