"""Finalize, for an optimizer's step: what became of it, and what each tensor's update has to know.

Math        norm / scale, coefficient = min(1, max_norm / (norm / scale + 1e-6)), factor = coefficient /
            scale. A step is skipped if found_inf is not 0 or, with skip_nonfinite, if norm / scale is not
            finite in float64. Or the caller gives outcome and coefficients, one or one per tensor, and
            nothing is decided. Unless it is skipped every tensor's counter grows by 1, and step and rates
            give its row of coefficients, all in float64.
Grid        one program for TENSORS tensors; the first one writes the outcome and the counts.
Traffic     about 200 bytes per tensor.
Order       every counter and count is written by one thread; no atomics.
Requires    no two tensors share a counter.
Range       powers of the rates come from log2 and exp2: a few roundings off, and of a rate of 0, 0.
Scratch     coefficients, for the update.
"""

import triton
import triton.language as tl

from fastclip.kernels.blocks import Blocks
from fastclip.kernels.columns import (
    BETA1,
    BETA2,
    COEFFICIENTS_LENGTH,
    COUNT_CLIPPED,
    COUNT_CONSECUTIVE,
    COUNT_LARGEST_NORM,
    COUNT_SKIPPED,
    COUNT_STEPS,
    COUPLED_DECAY,
    DECAY_FACTOR,
    EPS,
    FACTOR,
    FLAG_FRESH,
    FLAG_WIDE_COUNTER,
    GRAD_SHARE,
    INVERSE_CORRECTION,
    LR,
    MOMENTUM,
    NESTEROV,
    RULE_BETA1,
    RULE_BETA2,
    RULE_DAMPENING,
    RULE_DECOUPLED,
    RULE_EPS,
    RULE_LENGTH,
    RULE_LR,
    RULE_LR_ADDRESS,
    RULE_LR_WIDE,
    RULE_MOMENTUM,
    RULE_NESTEROV,
    RULE_SIGN,
    RULE_WEIGHT_DECAY,
    STEP_SIZE,
    TARGET_COUNTER,
    TARGET_FLAGS,
    TARGET_LENGTH,
    TARGET_RULE,
)
from fastclip.kernels.norm import clip_coefficient, threshold

# One thread per tensor: a second one might read a counter that the first has counted up.
TENSORS_PER_PROGRAM = 64
OF_TENSORS = Blocks(rows=0, threads=TENSORS_PER_PROGRAM, programs_per_unit=1)


@triton.jit
def _count(total_norm, coefficient, skipped, counts):
    """Count an outcome, as it is returned."""
    clipped = (coefficient < 1.0) & (skipped == 0)
    left_out = skipped.to(tl.float64)
    tl.store(counts + COUNT_CLIPPED, tl.load(counts + COUNT_CLIPPED) + clipped.to(tl.float64))
    tl.store(counts + COUNT_SKIPPED, tl.load(counts + COUNT_SKIPPED) + left_out)
    tl.store(counts + COUNT_STEPS, tl.load(counts + COUNT_STEPS) + 1.0)
    tl.store(counts + COUNT_CONSECUTIVE, (tl.load(counts + COUNT_CONSECUTIVE) + 1.0) * left_out)
    largest = tl.load(counts + COUNT_LARGEST_NORM)
    norm = total_norm.to(tl.float64)
    # False of nan.
    tl.store(counts + COUNT_LARGEST_NORM, tl.where((norm > largest) & (norm < float("inf")), norm, largest))


@triton.jit
def _decide(
    norm,
    given,
    grad_scale,
    found_inf,
    max_norm,
    max_norm_on_device,
    skip_nonfinite,
    norm_out,
    coefficient_out,
    skipped_out,
    counts,
):
    """Return the scale, the factor of the gradients and whether to skip; the first program writes that."""
    scale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
    if given is not None:
        factor = tl.load(given) / scale
        skipped = tl.load(skipped_out) != 0
        if tl.program_id(0) == 0:
            _count(tl.load(norm_out), tl.load(coefficient_out), skipped, counts)
    else:
        total_norm = tl.load(norm) / scale
        coefficient = clip_coefficient(total_norm, threshold(max_norm, max_norm_on_device))
        factor = coefficient / scale
        is_finite = tl.abs(total_norm) < float("inf")
        skipped = (skip_nonfinite != 0) & (is_finite == 0)
        if found_inf is not None:
            skipped = skipped | (tl.load(found_inf) != 0.0)
        if tl.program_id(0) == 0:
            returned = total_norm.to(norm_out.dtype.element_ty)
            returned_coefficient = coefficient.to(coefficient_out.dtype.element_ty)
            tl.store(norm_out, returned)
            tl.store(coefficient_out, returned_coefficient)
            tl.store(skipped_out, skipped.to(tl.uint8))
            _count(returned, returned_coefficient, skipped, counts)
    return scale, factor, skipped


@triton.jit
def _factors(factor, scale, given, mask, rule, TENSORS: tl.constexpr, PER_TENSOR: tl.constexpr):
    """Return what to multiply this program's gradients by, with the sign of `maximize`."""
    if PER_TENSOR:
        tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
        factor = tl.load(given + tensor, mask, other=1.0) / scale
    return factor * tl.load(rule + RULE_SIGN, mask, other=1.0)


@triton.jit
def _rows(targets, num_tensors, rules, coefficients, TENSORS: tl.constexpr):
    """Return pointers to the rows of this program's tensors, and which of them there are."""
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mask = tensor < num_tensors
    target = targets + tensor * TARGET_LENGTH
    rule = rules + tl.load(target + TARGET_RULE, mask, other=0) * RULE_LENGTH
    return target, rule, coefficients + tensor * COEFFICIENTS_LENGTH, mask


@triton.jit
def _count_step(target, mask, advance):
    """Return the number of this step for each tensor; where `advance`, its counter then says so."""
    address = tl.load(target + TARGET_COUNTER, mask, other=0)
    is_wide = (tl.load(target + TARGET_FLAGS, mask, other=0) & FLAG_WIDE_COUNTER) != 0
    narrow = address.to(tl.pointer_type(tl.float32))
    wide = address.to(tl.pointer_type(tl.float64))
    # A float32 beyond 2^24 stays as it is, as torch's does.
    narrow_step = tl.load(narrow, mask & (is_wide == 0), other=0.0) + 1.0
    wide_step = tl.load(wide, mask & is_wide, other=0.0) + 1.0
    tl.store(narrow, narrow_step, mask & (is_wide == 0) & advance)
    tl.store(wide, wide_step, mask & is_wide & advance)
    return tl.where(is_wide, wide_step, narrow_step.to(tl.float64))


@triton.jit
def _learning_rate(rule, mask):
    address = tl.load(rule + RULE_LR_ADDRESS, mask, other=0.0).to(tl.int64, bitcast=True)
    is_wide = tl.load(rule + RULE_LR_WIDE, mask, other=0.0) != 0.0
    number = tl.load(rule + RULE_LR, mask, other=0.0)
    wide = tl.load(address.to(tl.pointer_type(tl.float64)), mask & (address != 0) & is_wide, other=0.0)
    narrow = tl.load(
        address.to(tl.pointer_type(tl.float32)), mask & (address != 0) & (is_wide == 0), other=0.0
    )
    return tl.where(address == 0, number, tl.where(is_wide, wide, narrow.to(tl.float64)))


@triton.jit(do_not_specialize=["num_tensors", "skip_nonfinite"])
def adam_coefficients_kernel(
    norm,
    given,
    grad_scale,
    found_inf,
    max_norm: tl.float64,
    max_norm_on_device,
    skip_nonfinite: tl.int32,
    norm_out,
    coefficient_out,
    skipped_out,
    counts,
    targets,
    num_tensors,
    rules,
    coefficients,
    PER_TENSOR: tl.constexpr,
    TENSORS: tl.constexpr,
):
    """Decide on a step of Adam or AdamW, and count it; what there is to know is in the header."""
    scale, factor, skipped = _decide(
        norm,
        given,
        grad_scale,
        found_inf,
        max_norm,
        max_norm_on_device,
        skip_nonfinite,
        norm_out,
        coefficient_out,
        skipped_out,
        counts,
    )
    target, rule, row, mask = _rows(targets, num_tensors, rules, coefficients, TENSORS)
    step = _count_step(target, mask, skipped == 0)
    lr = _learning_rate(rule, mask)
    decay = tl.load(rule + RULE_WEIGHT_DECAY, mask, other=0.0)
    is_decoupled = tl.load(rule + RULE_DECOUPLED, mask, other=0.0) != 0.0
    beta1 = tl.load(rule + RULE_BETA1, mask, other=0.0)
    beta2 = tl.load(rule + RULE_BETA2, mask, other=0.0)
    factors = _factors(factor, scale, given, mask, rule, TENSORS, PER_TENSOR)
    tl.store(row + FACTOR, factors, mask)
    tl.store(row + DECAY_FACTOR, tl.where(is_decoupled, 1.0 - lr * decay, 1.0), mask)
    tl.store(row + COUPLED_DECAY, tl.where(is_decoupled, 0.0, decay), mask)
    tl.store(row + BETA1, beta1, mask)
    tl.store(row + BETA2, beta2, mask)
    tl.store(row + STEP_SIZE, lr / (1.0 - tl.exp2(tl.log2(beta1) * step)), mask)
    tl.store(row + INVERSE_CORRECTION, 1.0 / tl.sqrt(1.0 - tl.exp2(tl.log2(beta2) * step)), mask)
    tl.store(row + EPS, tl.load(rule + RULE_EPS, mask, other=1.0), mask)


@triton.jit(do_not_specialize=["num_tensors", "skip_nonfinite"])
def sgd_coefficients_kernel(
    norm,
    given,
    grad_scale,
    found_inf,
    max_norm: tl.float64,
    max_norm_on_device,
    skip_nonfinite: tl.int32,
    norm_out,
    coefficient_out,
    skipped_out,
    counts,
    targets,
    num_tensors,
    rules,
    coefficients,
    PER_TENSOR: tl.constexpr,
    TENSORS: tl.constexpr,
):
    """Decide on a step of SGD, which has no counters; what there is to know is in the header."""
    scale, factor, _ = _decide(
        norm,
        given,
        grad_scale,
        found_inf,
        max_norm,
        max_norm_on_device,
        skip_nonfinite,
        norm_out,
        coefficient_out,
        skipped_out,
        counts,
    )
    target, rule, row, mask = _rows(targets, num_tensors, rules, coefficients, TENSORS)
    is_fresh = (tl.load(target + TARGET_FLAGS, mask, other=0) & FLAG_FRESH) != 0
    dampening = tl.load(rule + RULE_DAMPENING, mask, other=0.0)
    factors = _factors(factor, scale, given, mask, rule, TENSORS, PER_TENSOR)
    tl.store(row + FACTOR, factors, mask)
    tl.store(row + LR, _learning_rate(rule, mask), mask)
    tl.store(row + COUPLED_DECAY, tl.load(rule + RULE_WEIGHT_DECAY, mask, other=0.0), mask)
    tl.store(row + MOMENTUM, tl.load(rule + RULE_MOMENTUM, mask, other=0.0), mask)
    tl.store(row + GRAD_SHARE, tl.where(is_fresh, 1.0, 1.0 - dampening), mask)
    tl.store(row + NESTEROV, tl.load(rule + RULE_NESTEROV, mask, other=0.0), mask)
