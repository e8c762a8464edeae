"""Clip the gradient of every unit by the norm of its weights."""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.blocks import Blocks
from fastclip.kernels.columns import (
    RUN_COUNT,
    RUN_DTYPE,
    RUN_GRAD,
    RUN_LENGTH,
    RUN_NUMEL,
    RUN_WEIGHTS,
)
from fastclip.kernels.scale import scale_elements
from fastclip.kernels.tiles import body_tile, edge_tile, of_dtype, split, tile_numel
from fastclip.kernels.unit_table import UnitTable

# A warp for each unit: a sum over it is one over its threads, and a tile is shorter than most units.
OF_UNITS = Blocks(rows=128, threads=32, programs_per_unit=16)


@triton.jit
def _sum_of_squares(address, numel, ELEMENT: tl.constexpr, ROWS: tl.constexpr):
    body, head, body_numel = split(address, numel, ELEMENT)
    sums = tl.zeros((ROWS,), tl.float64)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        x = tl.load(body + offsets, mask, other=0.0).to(tl.float64)
        sums += tl.sum(x * x, axis=1)
    total = tl.sum(sums, axis=0)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        x = tl.load(body + offsets, mask, other=0.0).to(tl.float64)
        total += tl.sum(x * x, axis=0)
    return total


@triton.jit
def _clip_run(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    grads, weights, numel, count, ratio, eps, scale = args
    nbytes = numel.to(tl.int64) * (ELEMENT.primitive_bitwidth // 8)
    for unit in range(0, count):
        weight = _sum_of_squares(weights + unit * nbytes, numel, ELEMENT, CONSTANTS[0])
        gradient = _sum_of_squares(grads + unit * nbytes, numel, ELEMENT, CONSTANTS[0])
        # inf where the gradient is 0; nan stays. One root, of the quotient.
        coefficient = ratio * scale * tl.sqrt(tl.where(weight > eps * eps, weight, eps * eps) / gradient)
        if not (coefficient >= 1.0):
            scale_elements((grads + unit * nbytes, numel, coefficient), ELEMENT, CONSTANTS)
    return numel


@triton.jit(do_not_specialize=["num_runs"])
def clip_units_kernel(
    runs,
    num_runs,
    ratio: tl.float64,
    eps: tl.float64,
    grad_scale,
    ROWS: tl.constexpr,
):
    """Multiply the gradient of each unit in place by a coefficient of its own.

    Math        g *= min(1, ratio * max(|w|, eps) * grad_scale / |g|), 2-norms of the unit in float64; rounded
                as scale_kernel does it.
    Grid        persistent; a program takes runs of units of one tensor, and walks over a unit with all of
                its threads.
    Traffic     40 bytes per run; reads weights and gradients once, and what is clipped again, from the cache
                unless the unit is long, and writes it.
    Order       sums within a thread, then over threads as a fixed tree.
    Requires    gradients that share memory must not be in one launch; a unit has at most 2^30 elements.
    Range       squares of float64 beyond its range give inf or 0, as torch's norm does; narrower types have
                none beyond it.
    Scratch     none.
    Source      Brock et al., High-Performance Large-Scale Image Recognition Without Normalization, 2021.
    """
    ratio = tl.full([], ratio, tl.float64)
    eps = tl.full([], eps, tl.float64)
    scale = 1.0 if grad_scale is None else tl.load(grad_scale).to(tl.float64)
    for index in range(tl.program_id(0), num_runs, tl.num_programs(0)):
        run = runs + index * RUN_LENGTH
        numel = tl.load(run + RUN_NUMEL).to(tl.int32)
        count = tl.load(run + RUN_COUNT).to(tl.int32)
        dtype = tl.load(run + RUN_DTYPE).to(tl.int32)
        args = (tl.load(run + RUN_GRAD), tl.load(run + RUN_WEIGHTS), numel, count, ratio, eps, scale)
        of_dtype(dtype, _clip_run, args, (ROWS,))


def clip_units(table: UnitTable, ratio: float, eps: float, grad_scale: Tensor | None) -> None:
    """Clip the gradients of all units in place; one launch.

    Args:
        table: Of the units.
        ratio: Of the norm of a unit's gradient to that of its weights.
        eps: Taken for the norm of weights that are smaller.
        grad_scale: The gradients are this many times too large; 0-dim on their device, or None.
    """
    layout = OF_UNITS.on(table.device)
    clip_units_kernel[layout.grid(table)](
        *(table.runs, table.num_chunks, ratio, eps, grad_scale),
        ROWS=layout.rows,
        **layout.options(),
    )
