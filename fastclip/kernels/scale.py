"""Apply: multiply every gradient by the clipping coefficient, or by its own, unless it is 1."""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.blocks import ELEMENTWISE
from fastclip.kernels.columns import FLOAT64
from fastclip.kernels.table import Table
from fastclip.kernels.tiles import load_chunk, load_span, of_dtype, update_tiles, widen


@triton.jit
def _scaled(x, mask, args):
    return (widen(x) * args[0]).to(x.dtype), mask


@triton.jit
def scale_elements(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    """Multiply elements in place by a factor; float32 and narrower multiply in float32."""
    address, numel, wide_factor = args
    factor = wide_factor if ELEMENT == tl.float64 else wide_factor.to(tl.float32)
    update_tiles(address, numel, _scaled, (factor,), ELEMENT, CONSTANTS[0])
    return numel


@triton.jit
def _scale_chunk(chunks, index, factor, ROWS: tl.constexpr):
    address, numel, dtype = load_chunk(chunks, index)
    # A float32 factor of 1 would write what it read.
    if tl.where(dtype == FLOAT64, factor, factor.to(tl.float32).to(tl.float64)) != 1.0:
        of_dtype(dtype, scale_elements, (address, numel, factor), (ROWS,))


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
            _scale_chunk(chunks, last - back, tl.load(coefficients + load_span(chunks, last - back)), ROWS)
    else:
        shared = tl.load(coefficients)
        if shared != 1.0:
            for back in range(0, last + 1, tl.num_programs(0)):
                _scale_chunk(chunks, last - back, shared, ROWS)


def scale(table: Table, coefficients: Tensor, per_tensor: bool = False) -> None:
    """Multiply every tensor in place by a coefficient, or by its own, unless it is 1; one launch."""
    layout = ELEMENTWISE.on(table.device)
    scale_kernel[layout.grid(table)](
        table.chunks,
        table.num_chunks,
        coefficients,
        PER_TENSOR=per_tensor,
        ROWS=layout.rows,
        **layout.options(),
    )
