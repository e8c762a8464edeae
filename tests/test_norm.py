"""The total norm: each backend, dtype and case against the oracle; the same bits however it is computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import tolerance
import torch
from cases import BY_NAME, CASES, DTYPES, NORM_TYPES, Case, dtype_id, parameters_of, select

import fastclip
from fastclip import reference

if TYPE_CHECKING:
    from conftest import Target

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

HALF_TYPES = (torch.bfloat16, torch.float16)


def bound(tensors: list[torch.Tensor], norm_type: float) -> float:
    """The loosest of the tensors' bounds."""
    numel = sum(t.numel() for t in tensors)
    return max((tolerance.norm(t.dtype, numel, norm_type) for t in tensors), default=0.0)


def norm_types_of(case: Case) -> list[float]:
    return [p for p in NORM_TYPES if not (p == math.inf and case.has_empty)]


def norm_dtype(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle(target: Target, dtype: torch.dtype, case: Case) -> None:
    tensors = case.tensors(target.device, dtype)
    if target.is_native and not case.dense:
        with pytest.raises(fastclip.BackendUnavailableError, match="is not dense in memory"):
            fastclip.get_total_norm(tensors)
        return
    for norm_type in norm_types_of(case):
        norm = fastclip.get_total_norm(tensors, norm_type)
        assert (norm.dtype, norm.dim()) == (norm_dtype(tensors), 0)
        want = case.oracle_norm(dtype, norm_type)
        tolerance.assert_norm(norm, want, bound(tensors, norm_type), f"p={norm_type:g}")


@every_dtype
@pytest.mark.parametrize("case", select(dense=True), ids=lambda case: case.name)
def test_clipping_returns_the_same_norm(native: Target, dtype: torch.dtype, case: Case) -> None:
    for norm_type in norm_types_of(case):
        parameters = case.parameters(native.device, dtype)
        norm = fastclip.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
        for max_norm in (math.inf, 1e-3):  # the second changes the gradients, after measuring them
            returned = fastclip.clip_grad_norm_(parameters, max_norm, norm_type)
            torch.testing.assert_close(returned, norm, rtol=0, atol=0, equal_nan=True)


def test_an_empty_gradient_has_no_inf_norm(target: Target) -> None:
    with pytest.raises((RuntimeError, IndexError), match="inf"):
        fastclip.get_total_norm(BY_NAME["some_empty"].tensors(target.device, torch.float32), math.inf)


SIZES = (1, 2, 5, 10, 100, 1_000, 12_345, 100_003, 1_000_000, 5_000_011, 20_000_003)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=dtype_id)
@pytest.mark.parametrize("numel", SIZES)
def test_accepted_error_at_every_size(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    tensor = torch.empty(numel, dtype=dtype).normal_(generator=generator)
    with fastclip.use_backend("cpu"):
        norm = fastclip.get_total_norm(tensor).item()
    want = reference.total_norm([tensor])
    assert abs(norm - want) <= tolerance.ACCEPTED_NORM_ERROR * want


# Constants whose squares or partial sums need more bits than the accumulator's type would have.
ADVERSARIAL = (1.0 + 2**-7, 1.0 - 2**-8, 0.1, 1 / 3, 3.0, 0.99951171875, 1000.1, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=dtype_id)
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_accepted_error_of_constants(native: Target, norm_type: float, dtype: torch.dtype) -> None:
    for value, numel in itertools.product(ADVERSARIAL, (7, 1000, 100_003)):
        tensor = torch.full((numel,), value, dtype=dtype)
        norm = fastclip.get_total_norm(tensor, norm_type).item()
        want = reference.total_norm([tensor], norm_type)
        assert abs(norm - want) <= tolerance.ACCEPTED_NORM_ERROR * want, (value, numel)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=dtype_id)
def test_accepted_error_where_float32_sums_round_most(native: Target, dtype: torch.dtype) -> None:
    """One large element before seven small ones in each run: each addition drops bits of the small one."""
    small = torch.tensor(2.0**-5 * (1 + 2**-6), dtype=dtype)
    tensor = small.repeat(8 * 32 * 40).reshape(40, 8, 32)
    tensor[:, 0] = 1.0 + 2**-6
    norm = fastclip.get_total_norm(tensor).item()
    want = reference.total_norm([tensor])
    assert abs(norm - want) <= tolerance.ACCEPTED_NORM_ERROR * want


def test_float64_beyond_the_range_of_its_squares(native: Target) -> None:
    tensors = [torch.full((4,), 1e200, dtype=torch.float64), torch.full((5,), 1e-200, dtype=torch.float64)]
    norm = fastclip.get_total_norm(tensors)
    assert norm.item() == pytest.approx(2e200, rel=1e-15)


def bits(norm: torch.Tensor) -> bytes:
    return norm.numpy().tobytes()


LARGER = [
    BY_NAME[name] for name in ("many_chunks", "around_one_chunk", "1200_tiny", "mixed_dtypes", "misaligned")
]


@every_dtype
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_same_bits_for_threads_instruction_sets_and_runs(
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
            seen.add(bits(fastclip.get_total_norm(tensors, norm_type)))
        assert len(seen) == 1, norm_type


@every_dtype
@pytest.mark.parametrize(
    "name", ["many_chunks", "large_and_small", "subnormal", "inf_then_nan", "some_empty"]
)
def test_a_list_and_its_parts_agree(native: Target, name: str, dtype: torch.dtype) -> None:
    """The norm of several tensors is that of their concatenation."""
    tensors = BY_NAME[name].tensors(native.device, dtype)
    joined = torch.cat([t.reshape(-1) for t in tensors])
    got, want = fastclip.get_total_norm(tensors), fastclip.get_total_norm([joined])
    torch.testing.assert_close(got, want, rtol=2e-7, atol=0, equal_nan=True)


def test_layout_does_not_matter(native: Target) -> None:
    contiguous = torch.randn(6, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    permuted = contiguous.to(memory_format=torch.channels_last)
    got, want = fastclip.get_total_norm(permuted).item(), fastclip.get_total_norm(contiguous).item()
    assert got == pytest.approx(want, rel=tolerance.ACCEPTED_NORM_ERROR)


def test_neighbouring_memory_is_not_read(native: Target) -> None:
    """What lies before and after a view is poison, at every offset and length around the block."""
    for start, numel in itertools.product((0, 1, 2, 3, 15, 16), (1, 31, 32, 33, 255, 257)):
        for dtype in DTYPES:
            memory = torch.full((start + numel + 300,), torch.nan, dtype=dtype)
            memory[start : start + numel] = 1.0
            for norm_type in (1.0, 2.0, math.inf, 3.0):
                want = 1.0 if norm_type == math.inf else numel ** (1 / norm_type)
                got = fastclip.get_total_norm(memory[start : start + numel], norm_type).item()
                assert got == pytest.approx(want, rel=1e-6), (start, numel, dtype, norm_type)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0])
def test_parameters_and_tensors_agree(norm_type: float, target: Target) -> None:
    tensors = BY_NAME["shapes"].tensors(target.device, torch.float32)
    of_tensors = fastclip.get_total_norm(tensors, norm_type)
    of_gradients = fastclip.clip_grad_norm_(parameters_of(tensors), math.inf, norm_type)
    assert of_tensors.item() == of_gradients.item()
