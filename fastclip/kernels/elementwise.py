"""Operations on every element by itself, writing only the 16-byte vectors that change."""

import math

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.blocks import ELEMENTWISE
from fastclip.kernels.table import Table
from fastclip.kernels.tiles import load_chunk, of_dtype, update_tiles, widen


@triton.jit
def _clamped(x, mask, args):
    """Return min(max(x, -limit), limit), and where to store it: in vectors that it changes.

    nan stays nan, inf becomes the limit; a negative limit gives its value everywhere, as in torch.
    """
    wide = widen(x)
    # Rounded to the element's type by way of the wide one, as torch rounds it.
    lo = (-args[0]).to(wide.dtype).to(x.dtype).to(wide.dtype)
    hi = args[0].to(wide.dtype).to(x.dtype).to(wide.dtype)
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
def _chunk(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    address, numel, value = args
    if CONSTANTS[1] == "clamp":
        update_tiles(address, numel, _clamped, (value,), ELEMENT, CONSTANTS[0])
    return numel


@triton.jit(do_not_specialize=["num_chunks"])
def elementwise_kernel(
    chunks, num_chunks, value: tl.float64, value_on_device, OPERATION: tl.constexpr, ROWS: tl.constexpr
):
    """Apply an operation, with one number, to all chunks in place; that on the device, unless it is None.

    Math        that of the operation.
    Grid        persistent, as total_norm_kernel.
    Traffic     reads every gradient once; writes the 16-byte vectors that hold an element that changes.
    Order       elementwise.
    Requires    the value is not nan; chunks that share memory must not be in one launch.
    Range       that of the operation.
    Scratch     none.
    """
    value = tl.full([], value, tl.float64)
    if value_on_device is not None:
        value = tl.load(value_on_device)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        address, numel, dtype = load_chunk(chunks, index)
        of_dtype(dtype, _chunk, (address, numel, value), (ROWS, OPERATION))


def elementwise(table: Table, operation: str, value: float | Tensor) -> None:
    """Apply an operation of csrc/elementwise.h to every tensor in place, by a number or a 0-dim float64.

    One launch.
    """
    layout = ELEMENTWISE.on(table.device)
    is_on_device = isinstance(value, Tensor)
    elementwise_kernel[layout.grid(table)](
        table.chunks,
        table.num_chunks,
        math.nan if is_on_device else value,
        value if is_on_device else None,
        OPERATION=operation,
        ROWS=layout.rows,
        **layout.options(),
    )
