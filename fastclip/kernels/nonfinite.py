"""Count nan and inf in each gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.blocks import ELEMENTWISE
from fastclip.kernels.table import Table
from fastclip.kernels.tiles import (
    body_tile,
    edge_tile,
    load_chunk,
    load_span,
    of_dtype,
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
def _count(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return the number of nan in the low half of an int64, that of inf in the high half."""
    address, numel = args
    ROWS: tl.constexpr = CONSTANTS[0]
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
        count = of_dtype(dtype, _count, (address, numel), (ROWS,))
        if count != 0:
            row = counts + 2 * load_span(chunks, index)
            tl.atomic_add(row, count & 0xFFFFFFFF, sem="relaxed")
            tl.atomic_add(row + 1, count >> 32, sem="relaxed")


def count_nonfinite(table: Table) -> Tensor:
    """Return the numbers of nan and of inf in each tensor, (n, 2) int64; one launch and a memset."""
    counts = torch.zeros(table.num_tensors, 2, dtype=torch.int64, device=table.device)
    layout = ELEMENTWISE.on(table.device)
    count_nonfinite_kernel[layout.grid(table)](
        table.chunks, table.num_chunks, counts, ROWS=layout.rows, **layout.options()
    )
    return counts
