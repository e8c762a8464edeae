"""Norms: combine accumulators in a fixed order, finalize to a norm and a clipping coefficient."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.accumulate import ANY, INF, ONE, TWO, accumulate
from fastclip.kernels.blocks import Blocks
from fastclip.kernels.table import Table

EPSILON = tl.constexpr(1e-6)

# 4 loads of 16 bytes in flight per thread, and as many threads as the 65536 registers of a multiprocessor
# allow. The norms need 96 per thread, which is said to ptxas because, left alone, it spills a few to save
# more: so 640 threads, and 40 KiB on the way, twice bandwidth times latency of an H100 (3.35 TB/s * 0.8 us /
# 132 = 20 KiB). The powers of p = any are bound by arithmetic.
_NORM = Blocks(rows=512, threads=128, programs_per_unit=5, registers=96)
_POWERS = Blocks(rows=128, threads=128, programs_per_unit=4, registers=128)
# Programs that read no gradients: one per tensor, and one in all.
OF_TENSOR = Blocks(rows=0, threads=128, programs_per_unit=1)
OF_LIST = Blocks(rows=0, threads=64, programs_per_unit=1)

# Accumulators added up at a time: by the last program of a launch, by one program per tensor.
PARTIALS_OF_LIST = 1024
PARTIALS_OF_TENSOR = 128


def kind_of(norm_type: float) -> int:
    """Return which kernel computes the norm of order norm_type > 0."""
    kinds = {1.0: ONE, 2.0: TWO, math.inf: INF}
    return int(kinds.get(norm_type, ANY).value)


def blocks_of(kind: int) -> Blocks:
    """Return the layout of the kernels that read gradients, by what `kind_of` returns."""
    return _POWERS if kind == ANY.value else _NORM


def threshold_arguments(max_norm: float | Tensor) -> tuple[float, Tensor | None]:
    """Return the number and the tensor that kernels take for a threshold; a tensor counts if there is one."""
    return (math.inf, max_norm) if isinstance(max_norm, Tensor) else (max_norm, None)


@triton.jit
def _larger(a, b):
    """Return the larger of two magnitudes, nan if one is."""
    bits = tl.maximum(a.to(tl.int64, bitcast=True), b.to(tl.int64, bitcast=True))
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _merge(sum_a, exponent_a, sum_b, exponent_b, p, KIND: tl.constexpr):
    """Add two accumulators; the smaller of two different exponents gives way."""
    if KIND == INF:
        total = _larger(sum_a, sum_b)
        exponent = exponent_a
    elif exponent_a == exponent_b:
        total = sum_a + sum_b
        exponent = exponent_a
    else:
        exponent_a = tl.where(sum_a == 0.0, exponent_b, exponent_a)
        exponent_b = tl.where(sum_b == 0.0, exponent_a, exponent_b)
        exponent = tl.maximum(exponent_a, exponent_b)
        total = sum_a * tl.exp2((exponent_a - exponent) * p) + sum_b * tl.exp2((exponent_b - exponent) * p)
    return total, exponent


@triton.jit
def _combine(partials, first, last, p, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Add up accumulators first .. last of the scratch, block by block and each block as a fixed tree.

    The loads bypass the first-level cache: other programs of the same launch may have written them.
    """
    total = tl.full([], 0.0, tl.float64)
    exponent = tl.full([], 0.0, tl.float64)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < last
        sums = tl.load(partials + 2 * index, mask, other=0.0, cache_modifier=".cg")
        if KIND == INF:
            bits = tl.max(sums.to(tl.int64, bitcast=True), axis=0)
            total = _larger(total, bits.to(tl.float64, bitcast=True))
        else:
            exponents = tl.load(partials + 2 * index + 1, mask, other=0.0, cache_modifier=".cg")
            block_exponent = tl.full([], 0.0, tl.float64)
            if tl.max(tl.abs(exponents), axis=0) != 0.0:
                # The exponent of a zero says nothing; -2^20 is below that of any number.
                exponents = tl.where(sums == 0.0, -1048576.0, exponents)
                block_exponent = tl.max(exponents, axis=0)
                sums *= tl.exp2((exponents - block_exponent) * p)
            total, exponent = _merge(total, exponent, tl.sum(sums, axis=0), block_exponent, p, KIND)
    return total, exponent


@triton.jit
def _root(total, exponent, p, KIND: tl.constexpr):
    """Finalize, first half: return the norm for which an accumulator stands."""
    if KIND == INF or KIND == ONE:
        norm = total
    elif KIND == TWO:
        norm = tl.sqrt(total)
    else:
        norm = tl.exp2(tl.log2(total) / p)
    if exponent != 0.0:
        norm *= tl.exp2(exponent)
    return norm


@triton.jit
def threshold(max_norm, max_norm_on_device):
    """Return the largest norm to leave, float64: the number, or what is on the device in its place."""
    limit = tl.full([], max_norm, tl.float64)
    if max_norm_on_device is not None:
        limit = tl.load(max_norm_on_device)
    return limit


@triton.jit
def clip_coefficient(norm, max_norm):
    """Finalize, second half: min(1, max_norm / (norm + 1e-6)), nan if the norm or the threshold is.

    1 if max_norm is inf, which asks for the norm alone.
    """
    coefficient = max_norm / (norm + EPSILON)
    return tl.where((coefficient > 1.0) | (max_norm == float("inf")), 1.0, coefficient)


@triton.jit(do_not_specialize=["num_chunks", "keep_nonfinite"])
def total_norm_kernel(
    chunks,
    num_chunks,
    ticket,
    partials,
    norm_out,
    coefficient_out,
    p: tl.float64,
    max_norm: tl.float64,
    max_norm_on_device,
    keep_nonfinite: tl.int32,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Norm of a whole list and its clipping coefficient, in one launch.

    Math        norm = (sum of |x|^p)^(1/p) or max |x|; coefficient = min(1, max_norm / (norm + 1e-6)), or 1
                if keep_nonfinite is set and the norm, as it is returned, is not finite.
    Grid        persistent: as many programs as the device runs at once, at most one per chunk; program i
                takes chunks i, i + num_programs, ...
    Traffic     reads every gradient once and 32 bytes per chunk; writes 16 bytes per program.
    Order       each program adds its chunks in order. The program that draws the last ticket adds the
                programs' accumulators in the order of their numbers, so it does not matter which one that
                is. No floating-point atomics. The grid is a function of the list and the device model.
    Requires    ticket is 0 at the start and is left at 0, so a captured launch can be replayed. Launches
                that share ticket and partials must not overlap.
    Range       as accumulate; the norm is rounded to the type of norm_out, the coefficient is not.
    Scratch     ticket: one int64; partials: 2 float64 per program.
    Source      CUDA C++ Programming Guide, threadFenceReduction (last block finishes a sum).
    """
    p = tl.full([], p, tl.float64)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    total = tl.full([], 0.0, tl.float64)
    exponent = tl.full([], 0.0, tl.float64)
    for index in range(program, num_chunks, num_programs):
        chunk_total, chunk_exponent = accumulate(chunks, index, p, KIND, ROWS)
        total, exponent = _merge(total, exponent, chunk_total, chunk_exponent, p, KIND)
    tl.store(partials + 2 * program, total)
    tl.store(partials + 2 * program + 1, exponent)
    # The thread that draws the ticket need not be the one that stored.
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if arrived == num_programs - 1:
        total, exponent = _combine(partials, 0, num_programs, p, KIND, PARTIALS)
        norm = _root(total, exponent, p, KIND)
        returned = norm.to(norm_out.dtype.element_ty)
        tl.store(norm_out, returned)
        coefficient = clip_coefficient(norm, threshold(max_norm, max_norm_on_device))
        if keep_nonfinite != 0:
            coefficient = tl.where(returned < float("inf"), coefficient, 1.0)
        tl.store(coefficient_out, coefficient)
        tl.store(ticket, 0)


def total_norm(
    table: Table,
    norm_type: float,
    dtype: torch.dtype,
    max_norm: float | Tensor = math.inf,
    keep_nonfinite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the norm, 0-dim of `dtype`, and the clipping coefficient, 0-dim float64; one launch.

    A `max_norm` that is a tensor is float64 and on the device.
    """
    kind = kind_of(norm_type)
    layout = blocks_of(kind).on(table.device)
    norm = torch.empty((), dtype=dtype, device=table.device)
    coefficient = torch.empty((), dtype=torch.float64, device=table.device)
    total_norm_kernel[layout.grid(table)](
        table.chunks,
        table.num_chunks,
        table.ticket,
        table.partials,
        norm,
        coefficient,
        norm_type,
        *threshold_arguments(max_norm),
        int(keep_nonfinite),
        KIND=kind,
        ROWS=layout.rows,
        PARTIALS=PARTIALS_OF_LIST,
        **layout.options(),
    )
    return norm, coefficient


@triton.jit(do_not_specialize=["num_chunks"])
def chunk_norms_kernel(chunks, num_chunks, partials, p: tl.float64, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Accumulators of chunks, the first of two launches for the norm of each tensor.

    Math        as accumulate.
    Grid        as total_norm_kernel.
    Traffic     reads every gradient once and 32 bytes per chunk; writes 16 bytes per chunk.
    Order       as accumulate; a chunk's accumulator does not depend on the grid.
    Requires    as accumulate.
    Range       as accumulate.
    Scratch     partials: 2 float64 per chunk.
    """
    p = tl.full([], p, tl.float64)
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        total, exponent = accumulate(chunks, index, p, KIND, ROWS)
        tl.store(partials + 2 * index, total)
        tl.store(partials + 2 * index + 1, exponent)


@triton.jit
def tensor_norms_kernel(
    partials, first_chunks, norms_out, p: tl.float64, KIND: tl.constexpr, PARTIALS: tl.constexpr
):
    """Norm of each tensor from the accumulators of its chunks, the second of two launches.

    Math        norm = (sum of |x|^p)^(1/p) or max |x|; 0 for a tensor without chunks.
    Grid        one program per tensor.
    Traffic     reads 16 bytes per chunk, writes one norm per tensor.
    Order       chunk order, in blocks of PARTIALS, each a fixed tree.
    Requires    first_chunks has one more entry than there are tensors.
    Range       as accumulate; the norm is rounded to the type of norms_out.
    Scratch     none beside the partials of chunk_norms_kernel.
    """
    p = tl.full([], p, tl.float64)
    tensor = tl.program_id(0)
    first = tl.load(first_chunks + tensor)
    last = tl.load(first_chunks + tensor + 1)
    total, exponent = _combine(partials, first, last, p, KIND, PARTIALS)
    norm = _root(total, exponent, p, KIND)
    tl.store(norms_out + tensor, norm.to(norms_out.dtype.element_ty))


def tensor_norms(table: Table, norm_type: float, dtype: torch.dtype) -> Tensor:
    """Return the norm of each tensor, 1-dim of `dtype`; two launches."""
    kind = kind_of(norm_type)
    layout = blocks_of(kind).on(table.device)
    norms = torch.empty(table.num_tensors, dtype=dtype, device=table.device)
    chunk_norms_kernel[layout.grid(table)](
        table.chunks,
        table.num_chunks,
        table.partials,
        norm_type,
        KIND=kind,
        ROWS=layout.rows,
        **layout.options(),
    )
    tensor_norms_kernel[(table.num_tensors,)](
        table.partials,
        table.first_chunks,
        norms,
        norm_type,
        KIND=kind,
        PARTIALS=PARTIALS_OF_TENSOR,
        **OF_TENSOR.options(),
    )
    return norms


@triton.jit
def coefficient_kernel(norm, coefficient_out, max_norm: tl.float64, max_norm_on_device):
    """Clipping coefficient for a norm that is known already; one program, a few bytes.

    Math        coefficient = min(1, max_norm / (norm + 1e-6)) in float64.
    Range       nan stays nan.
    """
    limit = threshold(max_norm, max_norm_on_device)
    tl.store(coefficient_out, clip_coefficient(tl.load(norm).to(tl.float64), limit))


def coefficient_of(total_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return min(1, max_norm / (total_norm + 1e-6)), 0-dim float64; one launch."""
    coefficient = torch.empty((), dtype=torch.float64, device=total_norm.device)
    coefficient_kernel[(1,)](total_norm, coefficient, *threshold_arguments(max_norm), **OF_LIST.options())
    return coefficient
