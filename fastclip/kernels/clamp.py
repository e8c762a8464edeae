"""Clamp every gradient to an interval, writing only the 16-byte vectors that change."""

import triton
import triton.language as tl

from fastclip.kernels.blocks import ELEMENTWISE
from fastclip.kernels.table import Table
from fastclip.kernels.tiles import load_chunk, of_dtype, update_tiles, widen


@triton.jit
def _clamped(x, mask, args):
    """Return min(max(x, lo), hi) with nan kept, and where to store it: in vectors that it changes."""
    lo, hi = args
    wide = widen(x)
    # Bounds rounded to the element's type by way of the wide one, as torch rounds them.
    lo = lo.to(wide.dtype).to(x.dtype).to(wide.dtype)
    hi = hi.to(wide.dtype).to(x.dtype).to(wide.dtype)
    y = tl.where(wide < lo, lo, wide)
    y = tl.where(y > hi, hi, y)
    outside = (wide < lo) | (wide > hi)
    if len(x.shape) == 2:
        # One flag per vector keeps the store 16 bytes wide.
        changed = mask & (tl.max(outside.to(tl.int32), axis=1)[:, None] > 0)
    else:
        changed = mask & outside
    return y.to(x.dtype), changed


@triton.jit
def _clamp_chunk(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    address, numel, lo, hi = args
    update_tiles(address, numel, _clamped, (lo, hi), ELEMENT, CONSTANTS[0])
    return numel


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
        of_dtype(dtype, _clamp_chunk, (address, numel, lo, hi), (ROWS,))


def clamp(table: Table, lo: float, hi: float) -> None:
    """Clamp every tensor in place to [lo, hi]; one launch."""
    layout = ELEMENTWISE.on(table.device)
    clamp_kernel[layout.grid(table)](
        table.chunks, table.num_chunks, lo, hi, ROWS=layout.rows, **layout.options()
    )
