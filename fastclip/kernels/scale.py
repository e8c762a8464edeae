"""Apply: multiply every gradient by the clipping coefficient, or by its own, unless it is 1."""

import triton
import triton.language as tl

from fastclip.kernels.tiles import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    ROW_LENGTH,
    ROW_SPAN,
    body_tile,
    edge_tile,
    load_chunk,
    split,
    tile_numel,
    widen,
)


@triton.jit
def _product(x, factor):
    return (widen(x) * factor).to(x.dtype)


@triton.jit
def _scale_elements(address, numel, factor, ELEMENT: tl.constexpr, ROWS: tl.constexpr):
    body, head, body_numel = split(address, numel, ELEMENT)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        tl.store(body + offsets, _product(tl.load(body + offsets, mask), factor), mask)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        tl.store(body + offsets, _product(tl.load(body + offsets, mask), factor), mask)


@triton.jit
def _scale_chunk(chunks, index, wide_factor, ROWS: tl.constexpr):
    address, numel, dtype = load_chunk(chunks, index)
    factor = wide_factor.to(tl.float32)
    if dtype == FLOAT64:
        if wide_factor != 1.0:
            _scale_elements(address, numel, wide_factor, tl.float64, ROWS)
    # A float32 factor of 1 would write what it read.
    elif factor != 1.0:
        if dtype == BFLOAT16:
            _scale_elements(address, numel, factor, tl.bfloat16, ROWS)
        elif dtype == FLOAT32:
            _scale_elements(address, numel, factor, tl.float32, ROWS)
        else:
            _scale_elements(address, numel, factor, tl.float16, ROWS)


@triton.jit(do_not_specialize=["num_chunks"])
def scale_kernel(chunks, num_chunks, coefficients, PER_TENSOR: tl.constexpr, ROWS: tl.constexpr):
    """Multiply all chunks in place by a coefficient in device memory, or by that of their tensor.

    Math        x *= coefficient, one rounding to the element type; float32 and narrower multiply in float32
                by float32(coefficient), float64 in float64.
    Grid        that of total_norm_kernel, walked backwards: what the norm read last is still in the cache.
    Traffic     8 bytes per program if the coefficient is 1; else reads and writes every gradient once. With
                PER_TENSOR 40 bytes per chunk, and the gradients whose own coefficient is not 1.
    Order       elementwise.
    Requires    chunks that share memory must not be in one launch.
    Range       nan and inf as IEEE 754 multiplies them: 0 * inf is nan.
    Scratch     none.
    """
    last = num_chunks - 1 - tl.program_id(0)
    if PER_TENSOR:
        for back in range(0, last + 1, tl.num_programs(0)):
            span = tl.load(chunks + (last - back) * ROW_LENGTH + ROW_SPAN)
            _scale_chunk(chunks, last - back, tl.load(coefficients + span), ROWS)
    else:
        shared = tl.load(coefficients)
        if shared != 1.0:
            for back in range(0, last + 1, tl.num_programs(0)):
                _scale_chunk(chunks, last - back, shared, ROWS)
