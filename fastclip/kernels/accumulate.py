"""Accumulate: one read of a chunk into an accumulator, whatever its dtype.

An accumulator is a pair (sum, exponent) of float64 that stands for sum * 2^(exponent * p), where sum adds up
|x|^p of elements scaled by 2^-exponent. The exponent is 0 unless the powers left the safe range. For the
inf-norm, sum is the largest magnitude, nan if any element is nan.

Math        sum of |x|^p (p = 1, 2, any p > 0), or max |x|.
Grid        part of a kernel whose programs take chunks program_id, program_id + num_programs, ...
Traffic     reads numel * item size bytes, writes nothing. A chunk outside the safe range is read twice more.
Order       a run is one 16-byte vector (for p = any, one element), added up in float32 within a thread;
            runs are added in float64 to the thread's sums, those by a fixed tree. Which elements make a run
            follows from the sizes and from the address modulo 16, so the same list gives the same bits.
Requires    addresses aligned to the element; at most 2^19 elements in a chunk.
Range       a sum that overflowed, underflowed or came near either is formed again in float64 from elements
            scaled by a power of two. inf and nan give inf and nan; maxima compare bits, because tl.maximum
            drops nan.
Scratch     none.
Source      Higham, Accuracy and Stability of Numerical Algorithms, ch. 4 (partial sums), 27.8 (scaling).
"""

import triton
import triton.language as tl

from fastclip.kernels.tiles import (
    body_tile,
    edge_tile,
    load_chunk,
    magnitude_bits,
    of_dtype,
    split,
    tile_numel,
    widen,
)

# The norms with kernels of their own; ANY is any p > 0.
ONE = tl.constexpr(0)
TWO = tl.constexpr(1)
INF = tl.constexpr(2)
ANY = tl.constexpr(3)

# Where the exponent of float64 sums leaves room for 2^63 terms and for adding accumulators up.
SAFE_SMALL = tl.constexpr(2.0**-900)
SAFE_LARGE = tl.constexpr(2.0**900)
# Where squares formed in float32 lost nothing that counts: a chunk has at most 2^19 elements, each of which
# loses at most 2^-126, so 2^-27 of a sum of 2^-80.
SAFE_SMALL_FLOAT32 = tl.constexpr(2.0**-80)
# The exponent of inf and nan: above that of every finite element, so that nothing scales them away.
EXPONENT_NONFINITE = tl.constexpr(4096.0)


@triton.jit
def _power(magnitude, p, KIND: tl.constexpr):
    if KIND == ONE:
        term = magnitude
    elif KIND == TWO:
        term = magnitude * magnitude
    else:
        # log2(0) = -inf gives 0.
        term = tl.exp2(tl.log2(magnitude) * p)
    return term


@triton.jit
def _sum_rows(terms):
    """Sum each row in its own type, eight elements as two fours: no more than four roundings in a row."""
    if terms.shape[1] == 8:
        sums = tl.sum(tl.sum(tl.reshape(terms, [terms.shape[0], 2, 4]), axis=2), axis=1)
    else:
        sums = tl.sum(terms, axis=1)
    return sums


@triton.jit
def _sum_terms(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    """Sum |x| or |x|^2 over a chunk; return also whether that has to be done again with scaled elements."""
    address, numel, p = args
    KIND: tl.constexpr = CONSTANTS[0]
    ROWS: tl.constexpr = CONSTANTS[1]
    body, head, body_numel = split(address, numel, ELEMENT)
    sums = tl.zeros([ROWS], tl.float64)
    # Sums of magnitudes do not underflow: they tell zeros from elements whose powers vanished.
    magnitudes = tl.zeros([ROWS], tl.float64 if ELEMENT == tl.float64 else tl.float32)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        x = tl.load(body + offsets, mask, other=0.0)
        sums += _sum_rows(_power(tl.abs(widen(x)), p, KIND)).to(tl.float64)
        if KIND != ONE:
            magnitudes += tl.sum(tl.abs(widen(x)), axis=1)
    total = tl.sum(sums, axis=0)
    edge_magnitude = tl.zeros([], magnitudes.dtype)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        x = tl.load(body + offsets, mask, other=0.0)
        total += tl.sum(_power(tl.abs(widen(x)), p, KIND).to(tl.float64), axis=0)
        edge_magnitude += tl.sum(tl.abs(widen(x)), axis=0)
    if KIND == ONE:
        unsafe = not (total < SAFE_LARGE)
    elif ELEMENT == tl.float64:
        unsafe = not ((total > SAFE_SMALL) & (total < SAFE_LARGE))
    else:
        unsafe = not ((total > SAFE_SMALL_FLOAT32) & (total < SAFE_LARGE))
    if unsafe:
        unsafe = (total != 0.0) | (tl.sum(magnitudes, axis=0) + edge_magnitude != 0.0)
    return total, unsafe


@triton.jit
def _max_magnitude(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return max |x| of a chunk as float64, nan if an element is nan."""
    address, numel = args
    ROWS: tl.constexpr = CONSTANTS[1]
    body, head, body_numel = split(address, numel, ELEMENT)
    BITS: tl.constexpr = tl.int64 if ELEMENT == tl.float64 else tl.int32
    WIDE: tl.constexpr = tl.float64 if ELEMENT == tl.float64 else tl.float32
    largest = tl.zeros([ROWS], BITS)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        x = tl.load(body + offsets, mask, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude_bits(x), axis=1))
    bits = tl.max(largest, axis=0)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        x = tl.load(body + offsets, mask, other=0.0)
        bits = tl.maximum(bits, tl.max(magnitude_bits(x), axis=0))
    return bits.to(WIDE, bitcast=True).to(tl.float64)


@triton.jit
def _load_wide(args, ELEMENT: tl.constexpr, CONSTANTS: tl.constexpr):
    address, offsets, mask = args
    return tl.load(address.to(tl.pointer_type(ELEMENT)) + offsets, mask, other=0.0).to(tl.float64)


@triton.jit
def _load_float64(address, offsets, mask, dtype):
    """Return elements of any dtype as float64. For paths that are rare or bound by arithmetic."""
    return of_dtype(dtype, _load_wide, (address, offsets, mask), None)


@triton.jit
def _sum_powers(address, numel, dtype, p, scale, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Sum (|x| * scale^2)^p over a chunk in float64."""
    sums = tl.zeros([ROWS], tl.float64)
    for start in range(0, numel, ROWS):
        offsets = start + tl.arange(0, ROWS)
        x = _load_float64(address, offsets, offsets < numel, dtype)
        # Twice a square root of the scale: the scale of a subnormal is itself out of range.
        sums += _power(tl.abs(x) * scale * scale, p, KIND)
    return tl.sum(sums, axis=0)


@triton.jit
def _accumulate_scaled(address, numel, dtype, p, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Accumulate a chunk whose powers left the safe range, scaled so that the largest magnitude is near 1."""
    largest = tl.zeros([ROWS], tl.int64)
    for start in range(0, numel, ROWS):
        offsets = start + tl.arange(0, ROWS)
        x = _load_float64(address, offsets, offsets < numel, dtype)
        largest = tl.maximum(largest, magnitude_bits(x))
    total = tl.max(largest, axis=0).to(tl.float64, bitcast=True)
    exponent = tl.full([], 0.0, tl.float64)
    if (total > 0.0) & (total < float("inf")):
        half_exponent = tl.floor(tl.log2(total) * 0.5)
        exponent = half_exponent * 2.0
        total = _sum_powers(address, numel, dtype, p, tl.exp2(-half_exponent), KIND, ROWS)
    elif total != 0.0:
        exponent = tl.full([], EXPONENT_NONFINITE, tl.float64)
    return total, exponent


@triton.jit
def accumulate(chunks, index, p, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Return the accumulator of one chunk of any dtype."""
    address, numel, dtype = load_chunk(chunks, index)
    exponent = tl.full([], 0.0, tl.float64)
    if KIND == INF:
        total = of_dtype(dtype, _max_magnitude, (address, numel), (KIND, ROWS))
    else:
        if KIND == ANY:
            total = _sum_powers(address, numel, dtype, p, tl.full([], 1.0, tl.float64), KIND, ROWS)
            unsafe = not ((total > SAFE_SMALL) & (total < SAFE_LARGE))
        else:
            total, unsafe = of_dtype(dtype, _sum_terms, (address, numel, p), (KIND, ROWS))
        if unsafe:
            total, exponent = _accumulate_scaled(address, numel, dtype, p, KIND, ROWS)
    return total, exponent
