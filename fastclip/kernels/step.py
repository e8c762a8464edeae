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

import triton
import triton.language as tl

from fastclip.kernels.tiles import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ROW_LENGTH,
    ROW_SPAN,
    body_tile,
    load_chunk,
    pointer_to,
    rest_tile,
    split,
    tile_numel,
    widen,
)

# Columns of `targets`, one row per tensor: addresses, but for the last two. step_table.py writes them.
TARGET_GRAD = tl.constexpr(0)
TARGET_PARAM = tl.constexpr(1)
TARGET_STATE = tl.constexpr(2)  # up to three, 0 where there is none
TARGET_COUNTER = tl.constexpr(5)
TARGET_RULE = tl.constexpr(6)  # its row of `rules`
TARGET_FLAGS = tl.constexpr(7)
TARGET_LENGTH = tl.constexpr(8)

FLAG_ALIKE = tl.constexpr(1)  # its memories lie alike between 16-byte boundaries
FLAG_FRESH = tl.constexpr(2)  # its state was made for this step
FLAG_WIDE_COUNTER = tl.constexpr(4)  # its counter is float64, not float32

# Columns of `coefficients`, one row per tensor; coefficients.py writes them.
FACTOR = tl.constexpr(0)
DECAY_FACTOR = tl.constexpr(1)  # decoupled weight decay: 1 - lr * weight_decay, or 1
COUPLED_DECAY = tl.constexpr(2)  # weight decay that is added to the gradient, or 0
BETA1 = tl.constexpr(3)
BETA2 = tl.constexpr(4)
STEP_SIZE = tl.constexpr(5)  # lr / (1 - beta1^step)
INVERSE_CORRECTION = tl.constexpr(6)  # 1 / sqrt(1 - beta2^step)
EPS = tl.constexpr(7)

LR = tl.constexpr(1)
MOMENTUM = tl.constexpr(3)
GRAD_SHARE = tl.constexpr(4)  # of the gradient in the momentum: 1 - dampening, or 1 in a buffer's first step
NESTEROV = tl.constexpr(5)

COEFFICIENTS_LENGTH = tl.constexpr(8)


@triton.jit
def _memory(target, number: tl.constexpr, offset):
    """Return the address of a chunk's part of the parameter or a state, and whether there is such a one."""
    address = tl.load(target + number)
    return address + offset, address != 0


@triton.jit
def _rows(chunks, index, targets, coefficients):
    """Return pointers to the rows of the tensor that a chunk belongs to."""
    span = tl.load(chunks + index * ROW_LENGTH + ROW_SPAN)
    return targets + span * TARGET_LENGTH, coefficients + span * COEFFICIENTS_LENGTH


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
def _adam_tile(
    memories,
    offsets,
    mask,
    has_max,
    c,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
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


@triton.jit
def _adam_chunk(
    grad, numel, target, row, max_value, ELEMENT: tl.constexpr, WRITE_GRADS: tl.constexpr, ROWS: tl.constexpr
):
    REAL: tl.constexpr = tl.float64 if ELEMENT == tl.float64 else tl.float32
    ITEM: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    beta1 = tl.load(row + BETA1)
    beta2 = tl.load(row + BETA2)
    c = (
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
    offset = grad - tl.load(target + TARGET_GRAD)
    param, _ = _memory(target, TARGET_PARAM, offset)
    exp_avg, _ = _memory(target, TARGET_STATE, offset)
    exp_avg_sq, _ = _memory(target, TARGET_STATE + 1, offset)
    max_exp_avg_sq, has_max = _memory(target, TARGET_STATE + 2, offset)
    head, body_numel = _body(grad, numel, target, ELEMENT)
    skip = head * ITEM
    memories = (grad + skip, param + skip, exp_avg + skip, exp_avg_sq + skip, max_exp_avg_sq + skip)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        _adam_tile(memories, offsets, mask, has_max, c, ELEMENT, True, WRITE_GRADS)
    memories = (grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq)
    for start in range(0, numel - body_numel, ROWS):
        offsets, mask = rest_tile(start, numel, head, body_numel, ROWS)
        _adam_tile(memories, offsets, mask, has_max, c, ELEMENT, False, WRITE_GRADS)


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
    max_value = tl.full([], max_value, tl.float64)
    if tl.load(skipped) == 0:
        last = num_chunks - 1 - tl.program_id(0)
        for back in range(0, last + 1, tl.num_programs(0)):
            grad, numel, dtype = load_chunk(chunks, last - back)
            target, row = _rows(chunks, last - back, targets, coefficients)
            if dtype == BFLOAT16:
                _adam_chunk(grad, numel, target, row, max_value, tl.bfloat16, WRITE_GRADS, ROWS)
            elif dtype == FLOAT32:
                _adam_chunk(grad, numel, target, row, max_value, tl.float32, WRITE_GRADS, ROWS)
            elif dtype == FLOAT16:
                _adam_chunk(grad, numel, target, row, max_value, tl.float16, WRITE_GRADS, ROWS)
            else:
                _adam_chunk(grad, numel, target, row, max_value, tl.float64, WRITE_GRADS, ROWS)


@triton.jit
def _sgd_tile(
    memories,
    offsets,
    mask,
    has_buffer,
    c,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITE_GRADS: tl.constexpr,
):
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


@triton.jit
def _sgd_chunk(
    grad, numel, target, row, max_value, ELEMENT: tl.constexpr, WRITE_GRADS: tl.constexpr, ROWS: tl.constexpr
):
    REAL: tl.constexpr = tl.float64 if ELEMENT == tl.float64 else tl.float32
    ITEM: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    c = (
        tl.load(row + FACTOR).to(REAL),
        max_value.to(REAL),
        tl.load(row + LR).to(REAL),
        tl.load(row + COUPLED_DECAY).to(REAL),
        tl.load(row + MOMENTUM).to(REAL),
        tl.load(row + GRAD_SHARE).to(REAL),
        tl.load(row + NESTEROV).to(REAL),
    )
    offset = grad - tl.load(target + TARGET_GRAD)
    param, _ = _memory(target, TARGET_PARAM, offset)
    buffer, has_buffer = _memory(target, TARGET_STATE, offset)
    head, body_numel = _body(grad, numel, target, ELEMENT)
    skip = head * ITEM
    memories = (grad + skip, param + skip, buffer + skip)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        _sgd_tile(memories, offsets, mask, has_buffer, c, ELEMENT, True, WRITE_GRADS)
    memories = (grad, param, buffer)
    for start in range(0, numel - body_numel, ROWS):
        offsets, mask = rest_tile(start, numel, head, body_numel, ROWS)
        _sgd_tile(memories, offsets, mask, has_buffer, c, ELEMENT, False, WRITE_GRADS)


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
    max_value = tl.full([], max_value, tl.float64)
    if tl.load(skipped) == 0:
        last = num_chunks - 1 - tl.program_id(0)
        for back in range(0, last + 1, tl.num_programs(0)):
            grad, numel, dtype = load_chunk(chunks, last - back)
            target, row = _rows(chunks, last - back, targets, coefficients)
            if dtype == BFLOAT16:
                _sgd_chunk(grad, numel, target, row, max_value, tl.bfloat16, WRITE_GRADS, ROWS)
            elif dtype == FLOAT32:
                _sgd_chunk(grad, numel, target, row, max_value, tl.float32, WRITE_GRADS, ROWS)
            elif dtype == FLOAT16:
                _sgd_chunk(grad, numel, target, row, max_value, tl.float16, WRITE_GRADS, ROWS)
            else:
                _sgd_chunk(grad, numel, target, row, max_value, tl.float64, WRITE_GRADS, ROWS)
