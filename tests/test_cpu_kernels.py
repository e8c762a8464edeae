"""The CPU's kernels: the promised error at every size; the same bits for all threads and instruction sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import tolerance
import torch
from cases import BY_NAME, DTYPES, NORM_TYPES, Case, dtype_id

import fastclip
from fastclip import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

HALF_TYPES = (torch.bfloat16, torch.float16)


SIZES = (1, 2, 5, 10, 100, 1_000, 12_345, 100_003, 1_000_000, 5_000_011, 20_000_003)


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.empty(max(SIZES)).normal_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=dtype_id)
@pytest.mark.parametrize("numel", SIZES)
def test_accepted_error_at_every_size(normal: torch.Tensor, numel: int, dtype: torch.dtype) -> None:
    tensor = normal[-numel:].to(dtype, copy=True)
    with fastclip.use_backend("cpu"):
        norm = fastclip.get_total_norm(tensor).item()
    want = reference.total_norm([tensor])
    assert abs(norm - want) <= tolerance.ACCEPTED_NORM_ERROR * want


def bits(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


LARGER = [
    BY_NAME[name] for name in ("many_chunks", "around_one_chunk", "1200_tiny", "mixed_dtypes", "misaligned")
]


@every_dtype
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_norms_have_the_same_bits_for_threads_instruction_sets_and_runs(
    case: Case,
    dtype: torch.dtype,
    threads: Callable[[int], None],
    instruction_sets: list[str],
    select_instruction_set: Callable[[str], None],
) -> None:
    tensors = case.tensors("cpu", dtype)
    for norm_type in NORM_TYPES:
        seen = set()
        for name, count in itertools.product(instruction_sets, (1, 2, 8, 2)):
            select_instruction_set(name)
            threads(count)
            seen.add(bits([fastclip.get_total_norm(tensors, norm_type)]))
        assert len(seen) == 1, norm_type


@every_dtype
def test_what_is_written_has_the_same_bits_for_threads_and_instruction_sets(
    dtype: torch.dtype,
    threads: Callable[[int], None],
    instruction_sets: list[str],
    select_instruction_set: Callable[[str], None],
) -> None:
    names = (
        "many_chunks",
        "misaligned",
        "mixed_dtypes",
        "inf",
        "duplicates_in_many_chunks",
        "subnormal_among_normal",
    )
    for name in names:
        seen = set()
        for instruction_set in instruction_sets:
            select_instruction_set(instruction_set)
            for count in (1, 2, 8):
                threads(count)
                clipped, clamped = (BY_NAME[name].parameters("cpu", dtype) for _ in range(2))
                with fastclip.use_backend("cpu"):
                    fastclip.clip_grad_norm_(clipped, 0.37)
                    fastclip.clip_grad_value_(clamped, 0.37)
                seen.add(bits([p.grad for p in (*clipped, *clamped)]))
        assert len(seen) == 1, name
