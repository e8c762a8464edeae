"""Apply, inside the optimizer: update parameters and state from the clipped gradients.

Math        as torch.optim.Adam, AdamW and SGD define it, with g = grad * factor, bounded in its magnitude if
            it is to be; the factor holds the clip coefficient, the scale of a GradScaler and, as its sign,
            `maximize`.
Grid        that of total_norm_kernel, walked backwards: what the norm read last is still in the cache.
Traffic     Adam reads 4 and writes 3 times numel * item size bytes (5 and 4 with amsgrad), SGD reads 3 and
            writes 2 with momentum, 2 and 1 without; with WRITE_GRADS, one write more. Nothing if skipped.
Order       elementwise.
Requires    the memories of one tensor are dense, of one dtype and in one order; parameters, and gradients
            that are written, share none.
Range       computed in float32 (float64 for float64) and rounded once per stored value, to nearest even; nan
            and inf spread as IEEE 754 has it.
Scratch     none.
Source      Kingma and Ba, Adam, 2015; Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019;
            Reddi et al., On the Convergence of Adam and Beyond, 2018; torch/optim/{adam,sgd}.py.

A tensor whose memories all lie alike between two 16-byte boundaries is walked as 16-byte vectors, but for its
edges; any other one element per thread.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.blocks import Blocks
from fastclip.kernels.coefficients import (
    OF_TENSORS,
    TENSORS_PER_PROGRAM,
    adam_coefficients_kernel,
    sgd_coefficients_kernel,
)
from fastclip.kernels.columns import (
    BETA1,
    BETA2,
    COEFFICIENTS_LENGTH,
    COUPLED_DECAY,
    DECAY_FACTOR,
    EPS,
    FACTOR,
    FLAG_ALIKE,
    GRAD_SHARE,
    INVERSE_CORRECTION,
    LR,
    MOMENTUM,
    NESTEROV,
    STEP_SIZE,
    TARGET_FLAGS,
    TARGET_GRAD,
    TARGET_LENGTH,
    TARGET_PARAM,
    TARGET_STATE,
)
from fastclip.kernels.norm import threshold_arguments, total_norm
from fastclip.kernels.step_table import StepTable
from fastclip.kernels.tiles import (
    body_tile,
    load_chunk,
    load_span,
    of_dtype,
    pointer_to,
    rest_tile,
    split,
    tile_numel,
    widen,
)


@triton.jit
def _memory(target, number: tl.constexpr, offset):
    """Return the address of a chunk's part of the parameter or a state, and whether there is such a one."""
    address = tl.load(target + number)
    return address + offset, address != 0


@triton.jit
def _body(grad, numel, target, ELEMENT: tl.constexpr):
    """Return the numel of head and body; without a body where the memories do not lie alike."""
    alike = (tl.load(target + TARGET_FLAGS) & FLAG_ALIKE) != 0
    _, head, body_numel = split(grad, tl.where(alike, numel, 0), ELEMENT)
    return head, body_numel


@triton.jit
def _bounded(x, max_value):
    """Return x within [-max_value, max_value]; nan stays nan."""
    x = tl.where(x > max_value, max_value, x)
    return tl.where(x < -max_value, -max_value, x)


@triton.jit
def _clipped(grad, offsets, mask, factor, max_value, WRITE_GRADS: tl.constexpr):
    """Return gradient * factor, bounded; with WRITE_GRADS, what is left of it in the gradient's type."""
    x = tl.load(grad + offsets, mask, other=0.0)
    if WRITE_GRADS:
        size = tl.where(factor < 0.0, -factor, factor)
        x = _bounded(widen(x) * size, max_value).to(x.dtype)
        # A factor of 1 without a bound would write what it read.
        if (size != 1.0) | (max_value < float("inf")):
            tl.store(grad + offsets, x, mask)
        g = tl.where(factor < 0.0, -widen(x), widen(x))
    else:
        g = _bounded(widen(x) * factor, max_value)
    return g


@triton.jit
def _square_root(x):
    """Return the root, rounded to nearest."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _quotient(a, b):
    """Return a / b, rounded to nearest."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _update_chunk(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    """Update what belongs to a chunk: as 16-byte vectors, but for what lies outside of the body."""
    grad, numel, target, row, max_value = args
    LOAD: tl.constexpr = CONSTANTS[0]
    UPDATE: tl.constexpr = CONSTANTS[1]
    WRITE_GRADS: tl.constexpr = CONSTANTS[2]
    ROWS: tl.constexpr = CONSTANTS[3]
    c = LOAD(row, max_value, tl.float64 if ELEMENT == tl.float64 else tl.float32)
    offset = grad - tl.load(target + TARGET_GRAD)
    param, _ = _memory(target, TARGET_PARAM, offset)
    state0, has0 = _memory(target, TARGET_STATE, offset)
    state1, _ = _memory(target, TARGET_STATE + 1, offset)
    state2, has2 = _memory(target, TARGET_STATE + 2, offset)
    head, body_numel = _body(grad, numel, target, ELEMENT)
    skip = head * (ELEMENT.primitive_bitwidth // 8)
    memories = (grad + skip, param + skip, state0 + skip, state1 + skip, state2 + skip)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        UPDATE(memories, offsets, mask, (has0, has2), c, ELEMENT, True, WRITE_GRADS)
    memories = (grad, param, state0, state1, state2)
    for start in range(0, numel - body_numel, ROWS):
        offsets, mask = rest_tile(start, numel, head, body_numel, ROWS)
        UPDATE(memories, offsets, mask, (has0, has2), c, ELEMENT, False, WRITE_GRADS)
    return numel


@triton.jit
def _update_all(
    chunks, num_chunks, targets, coefficients, skipped, max_value: tl.float64, CONSTANTS: tl.constexpr
):
    """Update this program's chunks, the last first, by CONSTANTS of `_update_chunk`; none if `skipped`."""
    max_value = tl.full([], max_value, tl.float64)
    if tl.load(skipped) == 0:
        last = num_chunks - 1 - tl.program_id(0)
        for back in range(0, last + 1, tl.num_programs(0)):
            grad, numel, dtype = load_chunk(chunks, last - back)
            span = load_span(chunks, last - back)
            target = targets + span * TARGET_LENGTH
            row = coefficients + span * COEFFICIENTS_LENGTH
            of_dtype(dtype, _update_chunk, (grad, numel, target, row, max_value), CONSTANTS)


@triton.jit
def _adam_coefficients(row, max_value, REAL: tl.constexpr):
    beta1 = tl.load(row + BETA1)
    beta2 = tl.load(row + BETA2)
    return (
        tl.load(row + FACTOR).to(REAL),
        max_value.to(REAL),
        tl.load(row + DECAY_FACTOR).to(REAL),
        tl.load(row + COUPLED_DECAY).to(REAL),
        beta1.to(REAL),
        (1.0 - beta1).to(REAL),
        beta2.to(REAL),
        (1.0 - beta2).to(REAL),
        tl.load(row + STEP_SIZE).to(REAL),
        tl.load(row + INVERSE_CORRECTION).to(REAL),
        tl.load(row + EPS).to(REAL),
    )


@triton.jit
def _adam_tile(
    memories,
    offsets,
    mask,
    has_state,
    c,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
    _, has_max = has_state
    (
        factor,
        max_value,
        decay_factor,
        coupled_decay,
        beta1,
        share1,
        beta2,
        share2,
        step_size,
        inverse_correction,
        eps,
    ) = c
    grad = pointer_to(memories[0], ELEMENT, ALIGNED)
    param = pointer_to(memories[1], ELEMENT, ALIGNED)
    exp_avg = pointer_to(memories[2], ELEMENT, ALIGNED)
    exp_avg_sq = pointer_to(memories[3], ELEMENT, ALIGNED)
    max_exp_avg_sq = pointer_to(memories[4], ELEMENT, ALIGNED)
    g = _clipped(grad, offsets, mask, factor, max_value, WRITE_GRADS)
    before = widen(tl.load(param + offsets, mask, other=0.0))
    # No product with 0: a parameter that is inf would make nan of it.
    g = tl.where(coupled_decay != 0.0, g + coupled_decay * before, g)
    first = beta1 * widen(tl.load(exp_avg + offsets, mask, other=0.0)) + share1 * g
    second = beta2 * widen(tl.load(exp_avg_sq + offsets, mask, other=0.0)) + share2 * g * g
    tl.store(exp_avg + offsets, first.to(ELEMENT), mask)
    tl.store(exp_avg_sq + offsets, second.to(ELEMENT), mask)
    largest = widen(tl.load(max_exp_avg_sq + offsets, mask & has_max, other=0.0))
    # A comparison that keeps a nan, as torch.maximum does.
    divisor = tl.where(has_max & (second <= largest), largest, second)
    tl.store(max_exp_avg_sq + offsets, divisor.to(ELEMENT), mask & has_max)
    denominator = _square_root(divisor) * inverse_correction + eps
    after = before * decay_factor - _quotient(step_size * first, denominator)
    tl.store(param + offsets, after.to(ELEMENT), mask)


@triton.jit(do_not_specialize=["num_chunks"])
def adam_kernel(
    chunks,
    num_chunks,
    targets,
    coefficients,
    skipped,
    max_value: tl.float64,
    WRITE_GRADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Update every chunk as Adam or AdamW, or none if `skipped`; what there is to know is in the header."""
    constants: tl.constexpr = (_adam_coefficients, _adam_tile, WRITE_GRADS, ROWS)
    _update_all(chunks, num_chunks, targets, coefficients, skipped, max_value, constants)


@triton.jit
def _sgd_coefficients(row, max_value, REAL: tl.constexpr):
    return (
        tl.load(row + FACTOR).to(REAL),
        max_value.to(REAL),
        tl.load(row + LR).to(REAL),
        tl.load(row + COUPLED_DECAY).to(REAL),
        tl.load(row + MOMENTUM).to(REAL),
        tl.load(row + GRAD_SHARE).to(REAL),
        tl.load(row + NESTEROV).to(REAL),
    )


@triton.jit
def _sgd_tile(
    memories,
    offsets,
    mask,
    has_state,
    c,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
    has_buffer, _ = has_state
    factor, max_value, lr, decay, momentum, grad_share, nesterov = c
    grad = pointer_to(memories[0], ELEMENT, ALIGNED)
    param = pointer_to(memories[1], ELEMENT, ALIGNED)
    buffer = pointer_to(memories[2], ELEMENT, ALIGNED)
    g = _clipped(grad, offsets, mask, factor, max_value, WRITE_GRADS)
    before = widen(tl.load(param + offsets, mask, other=0.0))
    # No product with 0: a parameter that is inf would make nan of it.
    g = tl.where(decay != 0.0, g + decay * before, g)
    velocity = momentum * widen(tl.load(buffer + offsets, mask & has_buffer, other=0.0)) + grad_share * g
    tl.store(buffer + offsets, velocity.to(ELEMENT), mask & has_buffer)
    change = tl.where(nesterov != 0.0, g + momentum * velocity, velocity)
    tl.store(param + offsets, (before - lr * tl.where(has_buffer, change, g)).to(ELEMENT), mask)


@triton.jit(do_not_specialize=["num_chunks"])
def sgd_kernel(
    chunks,
    num_chunks,
    targets,
    coefficients,
    skipped,
    max_value: tl.float64,
    WRITE_GRADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Update every chunk as SGD, or none if `skipped`; what there is to know is in the header."""
    constants: tl.constexpr = (_sgd_coefficients, _sgd_tile, WRITE_GRADS, ROWS)
    _update_all(chunks, num_chunks, targets, coefficients, skipped, max_value, constants)


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


KERNELS = {
    # One vector of each of three to five memories in flight per thread.
    "adam": (
        adam_coefficients_kernel,
        adam_kernel,
        Blocks(rows=128, threads=128, programs_per_unit=5, registers=96),
    ),
    "sgd": (sgd_coefficients_kernel, sgd_kernel, Blocks(rows=128, threads=128, programs_per_unit=8)),
}
"""By kind: what decides, what updates, and the layout of that."""


def step(
    kind: str, table: StepTable, rules: Tensor, clip: Clip, dtype: torch.dtype, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Clip, update and count in three launches, or two where the coefficients are given.

    Args:
        kind: Key of KERNELS.
        table: The parameters.
        rules: (groups, 9) float64, see columns.py.
        clip: How to clip.
        dtype: Of the norm and the coefficient that are returned.
        counts: (5,) float64, see columns.py.

    Returns:
        The norm of the unscaled gradients, the coefficient, and whether the step was skipped (bool); 0-dim.
    """
    device = table.grads.device
    scaled_norm, given = None, None
    if clip.given is None:
        scaled_norm, _ = total_norm(table.grads, clip.norm_type, torch.float64)
        norm, coefficient = (torch.empty((), dtype=dtype, device=device) for _ in range(2))
        skipped = torch.empty((), dtype=torch.bool, device=device)
    else:
        given, norm, coefficient, skipped = clip.given
    # Triton has no bool in memory.
    skipped_byte = skipped.view(torch.uint8)
    decide, update, blocks = KERNELS[kind]
    num_tensors = table.grads.num_tensors
    decide[(-(-num_tensors // TENSORS_PER_PROGRAM),)](
        scaled_norm,
        given,
        clip.grad_scale,
        clip.found_inf,
        *threshold_arguments(clip.max_norm),
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
    layout = blocks.on(device)
    update[layout.grid(table.grads)](
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
