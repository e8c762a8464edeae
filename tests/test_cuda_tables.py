"""Span tables: found again, rebuilt, evicted, captured, used by several threads. No GPU; see cuda_library."""

from __future__ import annotations

import ctypes
import shutil
import threading
from pathlib import Path

import cuda_library
import pytest
import torch
from cuda_library import CudaError, Library

pytestmark = pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16")

BY_VALUE = 1343
"""Spans that fit the kernel arguments, beside the entry that ends the table."""
NUM_MANY = 3000
"""Spans that do not, and take three launches to upload."""
UPLOADS = 3
KERNELS = 2
"""Launches of a clip."""
TABLES_PER_STREAM = 4


library = pytest.fixture(cuda_library.on_a_new_stream)


def many(
    num_tensors: int = NUM_MANY, numel: int = 2, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    return list(torch.ones(num_tensors * numel, dtype=dtype).split(numel))


def launches_of_clip(library: Library, tensors: list[torch.Tensor]) -> int:
    """Clip to half the norm, check the result, return the number of launches."""
    before = library.num_launches
    expected = torch.cat(tensors).double().norm().item()
    norm = library.clip_grad_norm(tensors, expected / 2)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert library.total_norm(tensors)[0].item() == pytest.approx(expected / 2, rel=1e-5)
    return library.num_launches - before - 1


@pytest.mark.parametrize("num_spans", [1, 127, 128, BY_VALUE])
def test_tables_by_value_are_never_uploaded(library: Library, num_spans: int) -> None:
    launches_of_clip(library, many(1))  # the stream's ticket
    allocations = library.num_allocations
    assert launches_of_clip(library, many(num_spans)) == KERNELS
    assert library.num_allocations == allocations


def test_a_table_beyond_the_arguments_is_uploaded_once(library: Library) -> None:
    tensors = many(BY_VALUE + 1)
    assert launches_of_clip(library, tensors) == KERNELS + 2
    allocations = library.num_allocations
    assert [launches_of_clip(library, tensors) for _ in range(3)] == [KERNELS] * 3
    assert library.num_allocations == allocations


@pytest.mark.parametrize("position", [0, 1500, NUM_MANY - 1])
def test_a_new_pointer_size_or_dtype_rebuilds_the_table(library: Library, position: int) -> None:
    tensors = many()
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    tensors[position] = torch.full((2,), 3.0)
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    tensors[position] = tensors[position][:1]
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    tensors[position] = tensors[position].view(torch.bfloat16)[1:]
    tensors[position].fill_(2.0)
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    assert launches_of_clip(library, tensors) == KERNELS
    assert launches_of_clip(library, tensors[:-1]) == KERNELS + UPLOADS


def test_values_that_change_need_no_new_table(library: Library) -> None:
    tensors = many()
    launches_of_clip(library, tensors)
    for tensor in tensors:
        tensor.fill_(5.0)
    assert launches_of_clip(library, tensors) == KERNELS


def test_the_table_unused_for_longest_makes_room(library: Library) -> None:
    lists = [many(NUM_MANY + i) for i in range(TABLES_PER_STREAM + 1)]
    for tensors in lists[:-1]:
        assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    assert launches_of_clip(library, lists[0]) == KERNELS  # so that the second is the oldest
    allocations = library.num_allocations
    assert launches_of_clip(library, lists[-1]) == KERNELS + UPLOADS
    assert library.num_allocations == allocations, "the evicted table's memory serves again"
    assert launches_of_clip(library, lists[0]) == KERNELS
    assert launches_of_clip(library, lists[1]) == KERNELS + UPLOADS


def test_small_and_large_tables_alternate_in_one_slot(library: Library) -> None:
    for round_ in range(2):
        for size in (NUM_MANY, *range(2, 2 + TABLES_PER_STREAM), 5000):
            launches_of_clip(library, many(size + round_))


def test_streams_do_not_share_a_table(library: Library) -> None:
    tensors = many()
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    library.stream += 1
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS
    library.stream -= 1
    assert launches_of_clip(library, tensors) == KERNELS


def captured_clip(
    library: Library, num_spans: int, mode: str = "global"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Capture a clip to 1; return the gradients and where the graph writes their norm."""
    tensors = many(num_spans)
    library.begin_capture(mode)
    norm = library.clip_grad_norm(tensors, 1.0)
    assert library.end_capture() == KERNELS
    return tensors, norm


def check_replays(library: Library, tensors: list[torch.Tensor], norm: torch.Tensor) -> None:
    for value in (1.0, 7.0):
        for tensor in tensors:
            tensor.fill_(value)
        library.replay()
        expected = value * (2 * len(tensors)) ** 0.5
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        assert tensors[-1].tolist() == pytest.approx([value / expected] * 2, rel=1e-5)


@pytest.mark.parametrize("mode", cuda_library.CAPTURE_MODES)
@pytest.mark.parametrize("num_spans", [5, NUM_MANY])
def test_a_captured_graph_replays_with_new_gradients(library: Library, num_spans: int, mode: str) -> None:
    tensors, norm = captured_clip(library, num_spans, mode)
    workspace = library.workspace
    # What happens to the stream's tables in between must not matter to the graph.
    for i in range(2 * TABLES_PER_STREAM):
        launches_of_clip(library, many(NUM_MANY + i))
    workspace.fill_(cuda_library.POISON)
    check_replays(library, tensors, norm)


@pytest.mark.parametrize("num_spans", [5, NUM_MANY])
def test_the_first_call_of_all_may_be_captured(library: Library, num_spans: int, tmp_path: Path) -> None:
    new = Library(Path(shutil.copy(library.path, tmp_path)))  # which knows of no device yet
    check_replays(new, *captured_clip(new, num_spans))
    new.begin_capture()
    new.check(new.c.fastclip_cuda_probe(1))
    assert new.end_capture() == 0


def test_a_capture_survives_calls_of_other_threads(library: Library) -> None:
    """Which allocate, wait and ask for their stream's id."""
    tensors = many(NUM_MANY)
    library.begin_capture()
    thread = threading.Thread(target=launches_of_clip, args=(Library(library.path, stream=-1), many(5000)))
    thread.start()
    thread.join()
    norm = library.clip_grad_norm(tensors, 1.0)
    assert library.end_capture() == KERNELS
    check_replays(library, tensors, norm)


@pytest.mark.parametrize("mode", cuda_library.CAPTURE_MODES)
def test_an_emulated_capture_refuses_what_a_real_one_does(library: Library, mode: str) -> None:
    word = ctypes.c_uint64()
    of_this, of_another = ctypes.c_void_p(library.stream), ctypes.c_void_p(-1)
    always = [
        lambda: library.c.cudaStreamGetId(of_this, ctypes.byref(word)),
        lambda: library.c.cudaStreamSynchronize(of_this),
    ]
    outside_relaxed_mode = [
        lambda: library.c.cudaMalloc(ctypes.byref(word), ctypes.c_size_t(1)),
        lambda: library.c.cudaStreamCreateWithFlags(ctypes.byref(word), 0),
        lambda: library.c.cudaStreamGetId(of_another, ctypes.byref(word)),
        lambda: library.c.cudaStreamSynchronize(of_another),
        library.c.emulation_function_attributes,
    ]
    for call in (*always, *outside_relaxed_mode):
        refused = call in always or mode != "relaxed"
        library.begin_capture(mode)
        assert call() == (900 if refused else 0)
        if refused:
            with pytest.raises(CudaError):
                library.total_norm(many(5))
        assert library.end_capture() == (-1 if refused else 0)
        assert call() == 0


def test_captures_of_the_same_list_share_a_table(library: Library) -> None:
    tensors = many(NUM_MANY + 77)
    allocations = []
    for _ in range(3):
        library.begin_capture()
        library.clip_grad_norm(tensors, 1.0)
        assert library.end_capture() == KERNELS
        allocations.append(library.num_allocations)
    assert len(set(allocations)) == 1


def test_a_failed_allocation_is_reported_and_forgotten(library: Library) -> None:
    launches_of_clip(library, many(1))  # the stream's ticket
    tensors = many()
    library.c.emulation_set_allocations_until_failure(0)
    with pytest.raises(CudaError, match="out of memory"):
        library.total_norm(tensors)
    library.c.emulation_set_allocations_until_failure(-1)
    assert launches_of_clip(library, tensors) == KERNELS + UPLOADS


def test_without_a_driver_every_call_says_so(library: Library) -> None:
    library.c.emulation_set_driver(False)
    with pytest.raises(CudaError, match="driver version is insufficient"):
        library.total_norm([torch.ones(3)])
    with pytest.raises(CudaError, match="driver version is insufficient"):
        library.check(library.c.fastclip_cuda_probe(0))


def test_threads_prepare_tables_at_once(library: Library) -> None:
    """More lists than tables, so that threads evict each other's; the lock must hold until the launch."""
    lists = [many(BY_VALUE + 1 + i) for i in range(TABLES_PER_STREAM + 2)]
    errors: list[BaseException] = []

    def clip(tensors: list[torch.Tensor]) -> None:
        private = Library(library.path)
        private.stream = library.stream
        try:
            for _ in range(5):
                norm = private.total_norm(tensors)[0].item()
                assert norm == pytest.approx((2 * len(tensors)) ** 0.5, rel=1e-6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=clip, args=(tensors,)) for tensors in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
