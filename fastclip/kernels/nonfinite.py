"""Count nan and inf in each gradient."""

import triton
import triton.language as tl

from fastclip.kernels.tiles import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
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
def _flags(x):
    """Return 1 where x is nan and 2^16 where it is inf."""
    magnitude = tl.abs(widen(x))
    is_inf = (magnitude == float("inf")).to(tl.int32)
    return (is_inf << 16) + (magnitude != magnitude).to(tl.int32)


@triton.jit
def _count(address, numel, ELEMENT: tl.constexpr, ROWS: tl.constexpr):
    """Return the number of nan in the low half of an int64, that of inf in the high half."""
    body, head, body_numel = split(address, numel, ELEMENT)
    counts = tl.zeros([ROWS], tl.int32)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        counts += tl.sum(_flags(tl.load(body + offsets, mask, other=0.0)), axis=1)
    count = tl.sum(_widen_counts(counts), axis=0)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        flags = _flags(tl.load(body + offsets, mask, other=0.0))
        count += tl.sum(_widen_counts(flags), axis=0)
    return count


@triton.jit
def _widen_counts(counts):
    counts = counts.to(tl.int64)
    return ((counts >> 16) << 32) + (counts & 0xFFFF)


@triton.jit(do_not_specialize=["num_chunks"])
def count_nonfinite_kernel(chunks, num_chunks, counts, ROWS: tl.constexpr):
    """Add the numbers of nan and of inf in each tensor to its row of `counts`.

    Math        counts[tensor] += (number of nan, number of +-inf).
    Grid        persistent, as total_norm_kernel.
    Traffic     reads every gradient once; writes 16 bytes per chunk that holds one.
    Order       integer atomics: exact in any order.
    Requires    counts is (tensors, 2) int64, zero at the start; a chunk has less than 2^15 elements per
                row of a tile.
    Range       exact.
    Scratch     none.
    """
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        address, numel, dtype = load_chunk(chunks, index)
        if dtype == BFLOAT16:
            count = _count(address, numel, tl.bfloat16, ROWS)
        elif dtype == FLOAT32:
            count = _count(address, numel, tl.float32, ROWS)
        elif dtype == FLOAT16:
            count = _count(address, numel, tl.float16, ROWS)
        else:
            count = _count(address, numel, tl.float64, ROWS)
        if count != 0:
            row = counts + 2 * tl.load(chunks + index * ROW_LENGTH + ROW_SPAN)
            tl.atomic_add(row, count & 0xFFFFFFFF, sem="relaxed")
            tl.atomic_add(row + 1, count >> 32, sem="relaxed")
