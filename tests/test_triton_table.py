"""The host side of the Triton backend: chunks, tables and their cache. Needs no triton."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from cases import DTYPES, dtype_id
from torch import Tensor

from fastclip.kernels import table as tables
from fastclip.kernels.step_table import build_step_table
from fastclip.kernels.table import Int64Array, TableCache, build_table, chunk_nbytes, cut, overlap

CPU = torch.device("cpu")
FLOAT32 = tables.DTYPES.index(torch.float32)


def spans_of(*rows: tuple[int, int, int]) -> Int64Array:
    return np.array(rows, np.int64).reshape(-1, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("numel", [0, 1, 4095, 8192, 8193, 100_000])
def test_chunks_cover_a_span_once_and_in_order(numel: int, dtype: torch.dtype) -> None:
    tag = tables.DTYPES.index(dtype)
    chunks, first_chunks = cut(spans_of((4096, numel, tag), (1 << 40, 3, tag)))
    end = 4096
    for address, chunk_numel, chunk_tag, span in chunks[:-1].tolist():
        assert (address, chunk_tag, span) == (end, tag, 0)
        assert 0 < chunk_numel * dtype.itemsize <= tables.MIN_CHUNK_NBYTES
        end += chunk_numel * dtype.itemsize
    assert end == 4096 + numel * dtype.itemsize
    assert chunks[-1].tolist() == [1 << 40, 3, tag, 1]
    assert first_chunks.tolist() == [0, len(chunks) - 1, len(chunks)]


def test_a_span_beyond_32_bits() -> None:
    numel = 2**33 + 5
    chunks, _ = cut(spans_of((64, numel, tables.DTYPES.index(torch.bfloat16))))
    assert chunks[:, 1].sum() == numel
    assert chunks[-1, 0] + 2 * chunks[-1, 1] == 64 + 2 * numel
    assert chunks[:, 1].max() <= 2**19


def test_chunks_are_powers_of_two_between_the_limits() -> None:
    sizes = [chunk_nbytes(n) for n in (0, 1, 10**6, 10**8, 498 * 10**6, 16 * 10**9, 10**12)]
    assert sizes == sorted(sizes)
    assert {size.bit_count() for size in sizes} == {1}
    assert (sizes[0], sizes[-1]) == (tables.MIN_CHUNK_NBYTES, tables.MAX_CHUNK_NBYTES)
    # 16 GB are a table of half a megabyte, not one that grows with the gradients.
    assert len(cut(spans_of((64, 8 * 10**9, tables.DTYPES.index(torch.bfloat16))))[0]) < 16 * 1024


def test_the_cut_depends_on_sizes_alone() -> None:
    sizes = (5, 70_000, 0, 12_345)
    here, there = (
        cut(spans_of(*((base + 4096 * i, n, FLOAT32) for i, n in enumerate(sizes))))[0]
        for base in (64, 1 << 45)
    )
    assert np.array_equal(here[:, 1:], there[:, 1:])


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(64, 4, FLOAT32), (80, 4, FLOAT32)], False),
        ([(80, 4, FLOAT32), (64, 5, FLOAT32)], True),
        ([(64, 4, FLOAT32), (64, 4, FLOAT32)], True),
        ([(64, 100, FLOAT32), (80, 0, FLOAT32)], False),
        ([(0, 0, FLOAT32), (0, 0, FLOAT32)], False),
        ([(64, 400, FLOAT32), (2000, 4, FLOAT32), (200, 4, FLOAT32)], True),
    ],
    ids=["adjacent", "by_one", "same", "empty_inside", "empties", "nested"],
)
def test_overlap(spans: list[tuple[int, int, int]], expected: bool) -> None:
    assert overlap(spans_of(*spans)) is expected


def test_a_table_is_used_again_until_something_changes() -> None:
    cache = TableCache(build_table)
    spans = spans_of((64, 50, FLOAT32), (264, 50, FLOAT32))
    table = cache.get(spans, CPU)
    assert cache.get(spans.copy(), CPU) is table
    changes = {
        "address": [(68, 50, FLOAT32), (268, 50, FLOAT32)],
        "size": [(64, 49, FLOAT32), (264, 50, FLOAT32)],
        "dtype": [(64, 50, FLOAT32), (264, 50, FLOAT32 + 1)],
        "order": [(264, 50, FLOAT32), (64, 50, FLOAT32)],
        "count": [(64, 50, FLOAT32)],
    }
    for name, rows in changes.items():
        assert cache.get(spans_of(*rows), CPU) is not table, name
    assert cache.get(spans, CPU) is table


def test_the_table_used_longest_ago_is_evicted() -> None:
    cache = TableCache(build_table, capacity=3)
    lists = [spans_of((64, n, FLOAT32)) for n in range(1, 5)]
    first, second, *_ = (cache.get(spans, CPU) for spans in lists[:3])
    assert cache.get(lists[0], CPU) is first
    cache.get(lists[3], CPU)
    assert len(cache) == 3
    assert cache.get(lists[0], CPU) is first
    assert cache.get(lists[1], CPU) is not second


def test_thousands_of_tensors() -> None:
    addresses = range(4096, 4096 + 5000 * 64, 64)
    table = TableCache(build_table).get(spans_of(*((here, 16, FLOAT32) for here in addresses)), CPU)
    assert (table.num_tensors, table.num_chunks) == (5000, 5000)
    assert table.first_chunks.tolist() == list(range(5001))
    assert table.chunks[:, 0].tolist() == list(addresses)
    assert not table.overlaps


def test_a_new_table_starts_with_ticket_zero_and_aligned_rows() -> None:
    table = build_table(spans_of((64, 9, FLOAT32), (0, 0, FLOAT32)), CPU)
    assert table.ticket.tolist() == [0]
    assert (table.chunks.data_ptr() - table.ticket.data_ptr()) % 32 == 0
    assert table.partials.shape == (1, 2)


def test_threads_share_the_cache() -> None:
    cache = TableCache(build_table, capacity=4)
    lists = [spans_of((64 * n, n, FLOAT32)) for n in range(1, 9)]
    wrong: list[Tensor] = []

    def work(offset: int) -> None:
        for i in range(400):
            spans = lists[(i * (offset + 1)) % len(lists)]
            table = cache.get(spans, CPU)
            if table.chunks[0, 0] != spans[0, 0]:
                wrong.append(table.chunks)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) == 4


def test_captured_tables_are_kept_and_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory is ordinary memory here: what is tested is who owns it."""
    empty = torch.empty
    reserve = tables._PinnedReserve()
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    monkeypatch.setattr(reserve, "NUM_WORDS", 100)
    reserve.refill()
    words = [torch.full((40,), i) for i in range(4)]  # two fit, two need memory of their own
    kept = [reserve.take(w) for w in words]
    reserve.refill()
    kept.append(reserve.take(torch.full((40,), 4)))
    assert [k.unique().tolist() for k in kept] == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_targets_say_whether_all_memories_lie_alike(dtype: torch.dtype) -> None:
    item, tag = dtype.itemsize, tables.DTYPES.index(dtype)
    # Of gradient, parameter and states, beyond a 16-byte boundary; None where there is no such state.
    offsets = [
        ((0, 0, 0, 0, None), True),
        ((item, item, item, item, item), True),
        ((0, item, 0, 0, None), False),
        ((0, 0, 0, 0, item), False),
        ((item, 0, None, None, None), False),
        ((0, 0, None, None, None), True),
    ]
    rows = []
    for i, (of_one, _) in enumerate(offsets):
        starts = range(4096 * (5 * i + 1), 4096 * (5 * i + 6), 4096)
        addresses = (0 if o is None else start + o for start, o in zip(starts, of_one, strict=True))
        rows.append([*addresses, 0, 3, 0, 0, 8, tag])
    table = build_step_table(np.array(rows, np.int64), CPU)
    assert table.targets[:, :7].tolist() == [row[:7] for row in rows]
    assert table.targets[:, 7].tolist() == [int(alike) for _, alike in offsets]
    assert table.grads.chunks[:, :3].tolist() == [[row[0], 8, tag] for row in rows]


def test_targets_tell_counters_and_fresh_state_apart() -> None:
    rows = [[64, 128, 0, 0, 0, 192, 0, fresh, wide, 8, FLOAT32] for fresh in (0, 1) for wide in (0, 1)]
    table = build_step_table(np.array(rows, np.int64), CPU)
    assert (table.targets[:, 7] & 6).tolist() == [0, 4, 2, 6]
