"""Clamp every gradient to an interval, writing only the 16-byte vectors that change."""

import triton
import triton.language as tl

from fastclip.kernels.tiles import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    body_tile,
    edge_tile,
    load_chunk,
    split,
    tile_numel,
    widen,
)


@triton.jit
def _clamped(x, lo, hi):
    """Return min(max(x, lo), hi) with nan kept, and where that differs from x."""
    wide = widen(x)
    # Bounds rounded to the element's type by way of the wide one, as torch rounds them.
    lo = lo.to(wide.dtype).to(x.dtype).to(wide.dtype)
    hi = hi.to(wide.dtype).to(x.dtype).to(wide.dtype)
    y = tl.where(wide < lo, lo, wide)
    y = tl.where(y > hi, hi, y)
    return y.to(x.dtype), (wide < lo) | (wide > hi)


@triton.jit
def _clamp_elements(address, numel, lo, hi, ELEMENT: tl.constexpr, ROWS: tl.constexpr):
    body, head, body_numel = split(address, numel, ELEMENT)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        y, outside = _clamped(tl.load(body + offsets, mask, other=0.0), lo, hi)
        # One flag per vector keeps the store 16 bytes wide.
        row_outside = tl.max(outside.to(tl.int32), axis=1)[:, None] > 0
        tl.store(body + offsets, y, mask & row_outside)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        y, outside = _clamped(tl.load(body + offsets, mask, other=0.0), lo, hi)
        tl.store(body + offsets, y, mask & outside)


@triton.jit(do_not_specialize=["num_chunks"])
def clamp_kernel(chunks, num_chunks, lo: tl.float64, hi: tl.float64, ROWS: tl.constexpr):
    """Clamp all chunks to [lo, hi] in place.

    Math        x = min(max(x, lo), hi), with lo and hi rounded to the element type as torch rounds them.
    Grid        persistent, as total_norm_kernel.
    Traffic     reads every gradient once; writes the 16-byte vectors that hold an element outside.
    Order       elementwise.
    Requires    lo and hi are not nan; chunks that share memory must not be in one launch.
    Range       nan stays nan, inf becomes hi, -inf lo. lo > hi gives hi everywhere, as in torch.
    Scratch     none.
    """
    lo = tl.full([], lo, tl.float64)
    hi = tl.full([], hi, tl.float64)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        address, numel, dtype = load_chunk(chunks, index)
        if dtype == BFLOAT16:
            _clamp_elements(address, numel, lo, hi, tl.bfloat16, ROWS)
        elif dtype == FLOAT32:
            _clamp_elements(address, numel, lo, hi, tl.float32, ROWS)
        elif dtype == FLOAT16:
            _clamp_elements(address, numel, lo, hi, tl.float16, ROWS)
        else:
            _clamp_elements(address, numel, lo, hi, tl.float64, ROWS)
