"""A list of tensors as a table of chunks in device memory, and the cache of such tables.

The number of tensors, their addresses, sizes and dtypes are data, not part of a kernel: nothing is compiled
again when they change. A table is uploaded once and used until one of them changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64Array = npt.NDArray[np.int64]
Built = TypeVar("Built")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""By tag, in the order of csrc/span.h."""

ITEM_SIZES = np.array([dtype.itemsize for dtype in DTYPES], np.int64)
"""Bytes of an element, by tag."""

# Columns of a span, as `fastclip._C` reads it, and of a chunk.
_ADDRESS, _NUMEL, _DTYPE = range(3)
ROW_ADDRESS, ROW_NUMEL, ROW_DTYPE, ROW_SPAN, ROW_LENGTH = range(5)
# The ticket comes first, padded so that the rows of chunks lie on 32-byte boundaries, one memory sector each.
_HEADER_LENGTH = 4

VECTOR_NBYTES = 16
"""What a thread loads or stores at once."""

MIN_CHUNK_NBYTES = 16 * 1024
"""Two tiles: below that, the latency of reading the table counts."""

MAX_CHUNK_NBYTES = 1024 * 1024
"""2^19 elements of 16 bits, the most for which accumulate's float32 squares are safe."""

TARGET_NUM_CHUNKS = 16 * 1024
"""Enough that the last, partial round of a persistent grid costs little; few enough to upload at once."""


def chunk_nbytes(total_nbytes: int) -> int:
    """Return the size of a chunk, a power of two: a function of the sizes alone."""
    wanted = max(-(-total_nbytes // TARGET_NUM_CHUNKS), MIN_CHUNK_NBYTES)
    return int(min(1 << (wanted - 1).bit_length(), MAX_CHUNK_NBYTES))


def cut(spans: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Cut spans into chunks.

    Returns:
        (c, 4) rows of address, numel, dtype tag and span, in the order of the spans; and the n + 1 indices
        of each span's first chunk, the last one being c. Empty spans have no chunk.
    """
    item_sizes = ITEM_SIZES[spans[:, _DTYPE]]
    steps = chunk_nbytes(int((spans[:, _NUMEL] * item_sizes).sum())) // item_sizes
    counts = -(-spans[:, _NUMEL] // steps)
    first_chunks = np.concatenate(([0], np.cumsum(counts)))
    span = np.repeat(np.arange(len(spans)), counts)
    begin = (np.arange(first_chunks[-1]) - first_chunks[span]) * steps[span]
    chunks = np.empty((len(span), ROW_LENGTH), np.int64)
    chunks[:, ROW_ADDRESS] = spans[span, _ADDRESS] + begin * item_sizes[span]
    chunks[:, ROW_NUMEL] = np.minimum(spans[span, _NUMEL] - begin, steps[span])
    chunks[:, ROW_DTYPE] = spans[span, _DTYPE]
    chunks[:, ROW_SPAN] = span
    return chunks, first_chunks


def overlap(spans: Int64Array) -> bool:
    """Whether two spans share memory, as the same gradient given twice does."""
    filled = spans[spans[:, _NUMEL] > 0]
    filled = filled[np.argsort(filled[:, _ADDRESS])]
    ends = filled[:, _ADDRESS] + filled[:, _NUMEL] * ITEM_SIZES[filled[:, _DTYPE]]
    return bool((filled[1:, _ADDRESS] < ends[:-1]).any())


@dataclass(frozen=True)
class Table:
    """What the kernels read of one list of tensors, on one device and stream.

    Attributes:
        chunks: (c, 4) int64, see columns.py.
        first_chunks: (n + 1,) int64.
        ticket: (1,) int64, 0 between launches.
        partials: (c, 2) float64 of scratch, at least one row; its content means nothing between launches.
        overlaps: Whether two tensors share memory.
    """

    chunks: Tensor
    first_chunks: Tensor
    ticket: Tensor
    partials: Tensor
    overlaps: bool

    @property
    def num_chunks(self) -> int:
        """Count the chunks."""
        return self.chunks.shape[0]

    @property
    def num_tensors(self) -> int:
        """Count the tensors."""
        return self.first_chunks.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return self.chunks.device


def build_table(spans: Int64Array, device: torch.device) -> Table:
    """Cut spans into chunks and upload the table on the current stream, without waiting for it."""
    chunks, first_chunks = cut(spans)
    header = np.zeros(_HEADER_LENGTH, np.int64)
    words = torch.from_numpy(np.concatenate((header, chunks.reshape(-1), first_chunks)))
    words = upload(words, device)
    rows_end = _HEADER_LENGTH + chunks.size
    return Table(
        chunks=words[_HEADER_LENGTH:rows_end].view(-1, ROW_LENGTH),
        first_chunks=words[rows_end:],
        ticket=words[:1],
        partials=scratch(max(len(chunks), 1), 2, device),
        overlaps=overlap(spans),
    )


def scratch(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Return float64 memory for what one launch leaves for the next; its content means nothing."""
    return torch.empty(num_rows, num_columns, dtype=torch.float64, device=device)


def upload(words: Tensor, device: torch.device) -> Tensor:
    """Return a table's words on the device, copied on the current stream, without waiting for it."""
    if device.type == "cpu":
        return words
    if torch.cuda.is_current_stream_capturing():
        return _reserve.take(words).to(device, non_blocking=True)
    _reserve.refill()
    return words.pin_memory().to(device, non_blocking=True)


class _PinnedReserve:
    """Page-locked memory for tables that are uploaded while a CUDA graph is captured.

    The graph copies them again at every replay and nothing says when it is gone, so what was taken is never
    given back: 32 bytes per chunk of a captured call. Page-locked memory cannot be had during a capture
    everywhere, hence the reserve; a call before the capture fills it.
    """

    NUM_WORDS = 1 << 18

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.int64)
        self._taken: list[Tensor] = []

    def refill(self) -> None:
        """Make room for the next capture; to be called outside of one."""
        if self._free.numel() < self.NUM_WORDS // 2:
            self._free = torch.empty(self.NUM_WORDS, dtype=torch.int64, pin_memory=True)

    def take(self, words: Tensor) -> Tensor:
        """Return a page-locked copy that lives as long as the process."""
        if words.numel() <= self._free.numel():
            pinned, self._free = self._free[: words.numel()], self._free[words.numel() :]
        else:
            pinned = torch.empty(words.numel(), dtype=torch.int64, pin_memory=True)
        self._taken.append(pinned)
        return pinned.copy_(words)


_reserve = _PinnedReserve()


class TableCache(Generic[Built]):
    """The tables used last, by device, stream and content; safe to use from several threads.

    A table belongs to one stream: launches that share its scratch then run one after the other. Evicted
    tables go back to torch's allocator, which orders reuse of their memory on the same stream.
    """

    def __init__(self, build: Callable[[Int64Array, torch.device], Built], capacity: int = 16) -> None:
        """Keep at most `capacity` of the tables that `build` makes of rows on a device."""
        self._build = build
        self._capacity = capacity
        self._tables: OrderedDict[tuple[torch.device, int, bytes], Built] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count the tables kept."""
        return len(self._tables)

    def get(self, rows: Int64Array, device: torch.device) -> Built:
        """Return the table of these rows, built anew if an address, a size or anything else in them changed.

        During the capture of a CUDA graph every call gets a table of its own: one from the cache could be
        evicted, and its memory reused, while the graph lives.
        """
        if device.type == "cpu":
            stream = 0
        elif torch.cuda.is_current_stream_capturing():
            return self._build(rows, device)
        else:
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (device, stream, rows.tobytes())
        with self._lock:
            if (table := self._tables.get(key)) is not None:
                self._tables.move_to_end(key)
                return table
            table = self._tables[key] = self._build(rows, device)
            if len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
            return table
