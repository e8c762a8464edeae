"""The host side of the Triton backend: spans, chunks, tables and their cache. Needs no triton."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from cases import DTYPES, dtype_id
from torch import Tensor

from fastclip.kernels import table as tables
from fastclip.kernels.step_table import StepOperand, build_step_table, read_operands
from fastclip.kernels.table import Int64Array, TableCache, build_table, chunk_nbytes, cut, overlap, read_spans

CPU = torch.device("cpu")
FLOAT32 = tables.DTYPES.index(torch.float32)


def spans_of(*rows: tuple[int, int, int]) -> Int64Array:
    return np.array(rows, np.int64).reshape(-1, 3)


def test_spans_hold_address_numel_and_dtype() -> None:
    tensors = [torch.zeros(6, dtype=dtype) for dtype in tables.DTYPES] + [torch.zeros(7)[3:]]
    spans = read_spans(tensors)
    assert spans[:, 0].tolist() == [t.data_ptr() for t in tensors]
    assert spans[:, 1].tolist() == [6, 6, 6, 6, 4]
    assert spans[:, 2].tolist() == [0, 1, 2, 3, 0]


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
    lists = [read_spans([torch.zeros(n)]) for n in range(1, 5)]
    first, second, *_ = (cache.get(spans, CPU) for spans in lists[:3])
    assert cache.get(lists[0], CPU) is first
    cache.get(lists[3], CPU)
    assert len(cache) == 3
    assert cache.get(lists[0], CPU) is first
    assert cache.get(lists[1], CPU) is not second


def test_thousands_of_tensors() -> None:
    tensors = list(torch.zeros(5000 * 16).split(16))
    table = TableCache(build_table).get(read_spans(tensors), CPU)
    assert (table.num_tensors, table.num_chunks) == (5000, 5000)
    assert table.first_chunks.tolist() == list(range(5001))
    assert table.chunks[:, 0].tolist() == [t.data_ptr() for t in tensors]
    assert not table.overlaps


def test_a_new_table_starts_with_ticket_zero_and_aligned_rows() -> None:
    table = build_table(read_spans([torch.zeros(9), torch.zeros(0)]), CPU)
    assert table.ticket.tolist() == [0]
    assert (table.chunks.data_ptr() - table.ticket.data_ptr()) % 32 == 0
    assert table.partials.shape == (1, 2)


def test_threads_share_the_cache() -> None:
    cache = TableCache(build_table, capacity=4)
    lists = [read_spans([torch.zeros(n)]) for n in range(1, 9)]
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


def operand(
    starts: tuple[int, ...], dtype: torch.dtype = torch.float32, counter: Tensor | None = None, numel: int = 8
) -> StepOperand:
    """An operand whose gradient, parameter and state begin so many elements into memory of their own."""
    memories = [torch.zeros(64, dtype=dtype)[start : start + numel] for start in starts]
    grad, param, *state = memories
    return StepOperand(param, grad, state, counter, rule=3, fresh=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_a_step_say_whether_all_memories_lie_alike(dtype: torch.dtype) -> None:
    vector = 16 // dtype.itemsize
    starts = [(0, 0, 0, 0), (1, 1, 1 + vector, 1), (0, 1, 0, 0), (0, 0, 0, 1), (1, 0), (vector, 0)]
    operands = [operand(s, dtype) for s in starts]
    rows = read_operands(operands)
    assert (rows[:, 7] & 1).tolist() == [1, 1, 0, 0, 0, 1]
    assert rows[:, 0].tolist() == [o.grad.data_ptr() for o in operands]
    assert rows[1, 1:5].tolist() == [t.data_ptr() for t in (operands[1].param, *operands[1].state)] + [0]
    assert rows[:, 6].tolist() == [3] * 6


def test_rows_of_a_step_tell_counters_and_fresh_state_apart() -> None:
    counters = [torch.zeros(()), torch.zeros((), dtype=torch.float64), None]
    operands = [operand((0, 0), counter=counter) for counter in counters]
    operands[2].fresh = True
    rows = read_operands(operands)
    assert rows[:, 5].tolist() == [counters[0].data_ptr(), counters[1].data_ptr(), 0]
    assert (rows[:, 7] & 6).tolist() == [0, 4, 2]


def test_what_is_shared_is_known_of_a_table() -> None:
    memory, counter = torch.zeros(16), torch.zeros(())

    def shared(params: list[Tensor], grads: list[Tensor], counters: list[Tensor | None]) -> list[str | None]:
        rows = [
            StepOperand(param, grad, [], count, 0, False)
            for param, grad, count in zip(params, grads, counters, strict=True)
        ]
        table = build_step_table(read_operands(rows), CPU)
        return [table.shared(with_grads=False), table.shared(with_grads=True)]

    apart, other = [memory[:8], memory[8:]], [torch.zeros(8), torch.zeros(8)]
    assert shared(apart, other, [None, None]) == [None, None]
    assert shared([memory[:8], memory[7:15]], other, [None, None]) == ["two parameters share memory"] * 2
    assert shared(apart, [other[0]] * 2, [None, None]) == [None, "two gradients share memory"]
    assert shared(apart, other, [counter, counter]) == ["two parameters share a step counter"] * 2
    assert shared(apart, other, [counter, torch.zeros(())]) == [None, None]
