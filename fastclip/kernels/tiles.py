"""A chunk as tiles: the one place that turns an address into 16-byte accesses.

A chunk is a row of the table in device memory: address, numel, dtype tag, span. Its address is aligned to
the element, not to 16 bytes, and comes out of memory, so that the compiler knows nothing about it. It is
therefore cut into

    head   up to VECTOR - 1 elements before the first 16-byte boundary
    body   whole 16-byte vectors; the compiler is told that it starts on a boundary
    tail   up to VECTOR - 1 elements after the last whole vector

Head and tail together are the `edges`: one masked access of 2 * VECTOR elements. The body is walked in
tiles of shape (rows, VECTOR), one row to a thread at a time, which makes every access of a thread one
16-byte load or store, and every sum over a row a sum within a thread.
"""

# No postponed annotations: Triton reads those of a kernel as objects.
import triton
import triton.language as tl

from fastclip.kernels.columns import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    ROW_ADDRESS,
    ROW_DTYPE,
    ROW_LENGTH,
    ROW_NUMEL,
    ROW_SPAN,
    VECTOR_NBYTES,
)


@triton.jit
def load_chunk(chunks, index):
    """Return address, numel and dtype tag of a chunk; numel fits 32 bits, the address needs 64."""
    row = chunks + index * ROW_LENGTH
    address = tl.load(row + ROW_ADDRESS)
    numel = tl.load(row + ROW_NUMEL).to(tl.int32)
    dtype = tl.load(row + ROW_DTYPE).to(tl.int32)
    return address, numel, dtype


@triton.jit
def load_span(chunks, index):
    """Return the number of the tensor that a chunk belongs to."""
    return tl.load(chunks + index * ROW_LENGTH + ROW_SPAN)


@triton.jit
def of_dtype(dtype, BODY: tl.constexpr, args, CONSTANTS: tl.constexpr):
    """Return BODY(args, ELEMENT, CONSTANTS), with ELEMENT the type that a dtype tag stands for.

    The one place that tells dtypes apart: a kernel holds the body once for each. Triton wants a result also
    of a body that has none to give.
    """
    if dtype == BFLOAT16:
        result = BODY(args, tl.bfloat16, CONSTANTS)
    elif dtype == FLOAT32:
        result = BODY(args, tl.float32, CONSTANTS)
    elif dtype == FLOAT16:
        result = BODY(args, tl.float16, CONSTANTS)
    else:
        result = BODY(args, tl.float64, CONSTANTS)
    return result


@triton.jit
def split(address, numel, ELEMENT: tl.constexpr):
    """Return a pointer to the body, the numel of head and body, for elements of type ELEMENT."""
    ITEM: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    VECTOR: tl.constexpr = VECTOR_NBYTES // ITEM
    to_boundary = ((-address) & (VECTOR_NBYTES - 1)).to(tl.int32) // ITEM
    head = tl.minimum(to_boundary, numel)
    # The product tells the compiler that masks change at vector boundaries only.
    body_numel = (numel - head) // VECTOR * VECTOR
    return pointer_to(address + head * ITEM, ELEMENT, True), head, body_numel


@triton.jit
def pointer_to(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address as a pointer; the compiler is told if it is ALIGNED to 16 bytes."""
    pointer = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, VECTOR_NBYTES)
    return pointer


@triton.jit
def body_tile(start, body_numel, ROWS: tl.constexpr, ELEMENT: tl.constexpr):
    """Return offsets from the body's pointer, and the mask, of the tile that begins at element `start`."""
    VECTOR: tl.constexpr = VECTOR_NBYTES * 8 // ELEMENT.primitive_bitwidth
    offsets = start + tl.arange(0, ROWS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return offsets, offsets < body_numel


@triton.jit
def edge_tile(numel, head, body_numel, ELEMENT: tl.constexpr):
    """Return offsets from the body's pointer, and the mask, of the head's and the tail's elements."""
    VECTOR: tl.constexpr = VECTOR_NBYTES * 8 // ELEMENT.primitive_bitwidth
    i = tl.arange(0, 2 * VECTOR)
    in_head = i < VECTOR
    offsets = tl.where(in_head, i - head, i - VECTOR + body_numel)
    tail = numel - head - body_numel
    return offsets, tl.where(in_head, i < head, i - VECTOR < tail)


@triton.jit
def rest_tile(start, numel, head, body_numel, ROWS: tl.constexpr):
    """Return offsets from the first element, and the mask, of the next ROWS elements outside the body.

    `start` counts those before; together they are numel - body_numel, all of a chunk that has no body.
    """
    i = start + tl.arange(0, ROWS)
    return tl.where(i < head, i, i + body_numel), i < numel - body_numel


@triton.jit
def tile_numel(ROWS: tl.constexpr, ELEMENT: tl.constexpr):
    """Return the number of elements in a tile of the body."""
    return ROWS * (VECTOR_NBYTES * 8 // ELEMENT.primitive_bitwidth)


@triton.jit
def update_tiles(address, numel, UPDATE: tl.constexpr, args, ELEMENT: tl.constexpr, ROWS: tl.constexpr):
    """Store UPDATE(x, mask, args), a value and where to store it, for every tile x of a chunk."""
    body, head, body_numel = split(address, numel, ELEMENT)
    for start in range(0, body_numel, tile_numel(ROWS, ELEMENT)):
        offsets, mask = body_tile(start, body_numel, ROWS, ELEMENT)
        y, changed = UPDATE(tl.load(body + offsets, mask), mask, args)
        tl.store(body + offsets, y, changed)
    if body_numel != numel:
        offsets, mask = edge_tile(numel, head, body_numel, ELEMENT)
        y, changed = UPDATE(tl.load(body + offsets, mask), mask, args)
        tl.store(body + offsets, y, changed)


@triton.jit
def widen(x):
    """Return float16 and bfloat16 as float32, the others as they are."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x| as an integer of the same width: ordered like |x|, with nan above inf."""
    x = widen(x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits
