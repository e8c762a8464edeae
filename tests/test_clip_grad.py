"""Clipping: each backend, dtype and case against the oracle, and what may be written when."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import tolerance
import torch
from cases import BY_NAME, DTYPES, Case, dtype_id, parameters_of, present, select

import fastclip
from fastclip import reference

if TYPE_CHECKING:
    from conftest import Target

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
every_case = pytest.mark.parametrize("case", select(aliased=False), ids=lambda case: case.name)

# Near the norm of most cases, far below it, and above nearly all.
MAX_NORMS = {2.0: (10.0, 1e-3, 0.0, 1e33), math.inf: (0.5,), 3.0: (0.5,)}


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


def versions(tensors: list[torch.Tensor]) -> list[int]:
    return [t._version for t in tensors]


def joined_by_dtype(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return [torch.cat(vectors) for vectors in by_dtype.values()]


@every_dtype
@every_case
def test_oracle(target: Target, dtype: torch.dtype, case: Case) -> None:
    if target.is_native and not case.dense:
        before = case.gradients(target.device, dtype)
        with pytest.raises(fastclip.BackendUnavailableError, match="is not dense in memory"):
            fastclip.clip_grad_norm_(parameters_of(before), 1.0)
        assert bits(present(before)) == bits(case.tensors(target.device, dtype))
        return
    original = case.tensors(target.device, dtype)
    for norm_type, max_norms in MAX_NORMS.items():
        if norm_type == math.inf and case.has_empty:
            continue
        norm = case.oracle_norm(dtype, norm_type)
        norm_error = max((tolerance.norm(t.dtype, 10**6, norm_type) for t in original), default=0.0)
        for max_norm in max_norms:
            parameters = case.parameters(target.device, dtype)
            fastclip.clip_grad_norm_(parameters, max_norm, norm_type)
            coefficient = reference.clip_coefficient(norm, max_norm)
            grads = present(p.grad for p in parameters)
            assert [g.stride() for g in grads] == [t.stride() for t in original]
            for got, before in zip(joined_by_dtype(grads), joined_by_dtype(original), strict=True):
                want = before.to("cpu", torch.float64) * coefficient
                tolerance.assert_scaled(got, before, want, tolerance.scaled(got.dtype, norm_error))


@every_dtype
def test_same_bits_for_threads_and_instruction_sets(
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
                seen.add(b"".join(bits([p.grad for p in (*clipped, *clamped)])))
        assert len(seen) == 1, name


@every_dtype
def test_half_precision_rounds_to_nearest_even(native: Target, dtype: torch.dtype) -> None:
    """Every finite 16-bit pattern times a coefficient: float32 product, one rounding, as torch does it."""
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
    else:
        values = torch.randn(2**15, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for coefficient in (0.5, 0.3, 2.0**-9, 1 - 2**-12):
        norm = torch.tensor(1.0 - 1e-6, dtype=torch.float64)
        parameters = parameters_of([values.clone()])
        fastclip.clip_grads_with_norm_(parameters, coefficient, norm)
        exact = coefficient / (norm.item() + 1e-6)
        factor = torch.tensor(exact, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        want = (values.to(factor.dtype) * factor).to(dtype)
        assert bits([parameters[0].grad]) == bits([want])


@every_dtype
@pytest.mark.parametrize(
    "name", ["shapes", "many_chunks", "1200_tiny", "channels_last", "scalar", "zeros", "mixed_dtypes"]
)
def test_nothing_is_written_below_the_threshold(native: Target, name: str, dtype: torch.dtype) -> None:
    parameters = BY_NAME[name].parameters(native.device, dtype)
    grads = [p.grad for p in parameters]
    before, counted = bits(grads), versions(grads)
    norm = fastclip.clip_grad_norm_(parameters, 1e6)
    fastclip.clip_grads_with_norm_(parameters, 1e6, norm)
    fastclip.clip_grad_value_(parameters, 1e6)
    assert (bits(grads), versions(grads)) == (before, counted)
    assert norm < 1e6


def test_read_only_memory_below_the_threshold(native: Target) -> None:
    """Below the threshold gradients may even be read-only."""
    memory = mmap.mmap(-1, 4 * 4096, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        grad = torch.frombuffer(memory, dtype=torch.float32)
    (parameter,) = parameters_of([grad])
    assert fastclip.clip_grad_norm_([parameter], 1.0).item() == 0.0
    fastclip.clip_grad_value_([parameter], 1.0)


@every_dtype
@pytest.mark.parametrize(
    "name", ["shapes", "some_none", "many_chunks", "nan", "inf", "only_empty", "channels_last"]
)
def test_version_counters_rise_where_something_is_written(
    target: Target, name: str, dtype: torch.dtype
) -> None:
    parameters = BY_NAME[name].parameters(target.device, dtype)
    grads = present(p.grad for p in parameters)
    before = versions(grads)
    fastclip.clip_grad_norm_(parameters, 1e-3)
    if name != "only_empty":
        assert versions(grads) == [version + 1 for version in before]


def test_version_counters_of_clamping_rise_where_an_element_was_outside(native: Target) -> None:
    inside, outside = torch.full((70_000,), 0.5), torch.full((70_000,), 0.5)
    outside[69_999] = -3.0
    parameters = parameters_of([inside, outside])
    before = versions([inside, outside])
    fastclip.clip_grad_value_(parameters, 1.0)
    assert versions([inside, outside]) == [before[0], before[1] + 1]
    assert outside[69_999] == -1.0


def test_backward_notices_a_clipped_gradient(target: Target) -> None:
    grad = torch.full((3,), 2.0)
    (parameter,) = parameters_of([grad])
    weight = torch.ones(3, requires_grad=True)
    product = (weight * grad).sum()  # saves grad
    fastclip.clip_grad_norm_([parameter], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_coefficient_that_rounds_to_one_writes_only_float64(native: Target) -> None:
    narrow, wide = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)
    parameters = parameters_of([narrow, wide])
    before = versions([narrow, wide])
    fastclip.clip_grad_norm_(parameters, 5.0 + 1e-6 - 1e-9)
    assert versions([narrow, wide]) == [before[0], before[1] + 1]
    assert (narrow.item(), wide.item() < 4.0) == (3.0, True)


@every_dtype
@pytest.mark.parametrize("name", ["shapes", "nan", "inf", "inf_then_nan", "large", "many_chunks"])
def test_infinite_max_norm_never_writes(target: Target, name: str, dtype: torch.dtype) -> None:
    parameters = BY_NAME[name].parameters(target.device, dtype)
    grads = [p.grad for p in parameters]
    before, counted = bits(grads), versions(grads)
    norm = fastclip.clip_grad_norm_(parameters, math.inf)
    fastclip.clip_grads_with_norm_(parameters, math.inf, norm)
    assert (bits(grads), versions(grads)) == (before, counted)
    tolerance.assert_norm(norm, BY_NAME[name].oracle_norm(dtype, 2.0), 1e-6)


@every_dtype
@pytest.mark.parametrize(("value", "counts"), [(math.nan, "1 nan and 0 inf"), (-math.inf, "0 nan and 1 inf")])
def test_error_if_nonfinite(target: Target, value: float, counts: str, dtype: torch.dtype) -> None:
    grads = [
        None,
        torch.ones(3, dtype=dtype),
        torch.ones(4, 50, dtype=dtype),
        torch.full((2,), value, dtype=dtype),
    ]
    grads[2][1, 7] = value
    parameters = parameters_of(grads)
    before, counted = bits(present(grads)), versions(present(grads))
    message = (
        r"^The total norm of order 2\.0 for gradients from `parameters` is non-finite, so it cannot be "
        r"clipped\. To disable this error and scale the gradients by the non-finite norm anyway, set "
        r"`error_if_nonfinite=False`"
        rf"[\s\S]*position 2, shape \(4, 50\), {dtype}, {counts} of 200 elements"
    )
    with pytest.raises(RuntimeError, match=message):
        fastclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert (bits(present(grads)), versions(present(grads))) == (before, counted)


def test_error_if_nonfinite_of_tensors(target: Target) -> None:
    with pytest.raises(RuntimeError, match=r"non-finite[\s\S]*position 1"):
        fastclip.get_total_norm([torch.ones(2), torch.tensor(math.nan)], error_if_nonfinite=True)


def test_error_if_nonfinite_of_a_norm_beyond_its_dtype(target: Target) -> None:
    grad = torch.full((4,), 3e38)
    with pytest.raises(RuntimeError, match=r"non-finite[\s\S]*Every element is finite"):
        fastclip.clip_grad_norm_(parameters_of([grad]), 1.0, error_if_nonfinite=True)
    assert grad.tolist() == torch.full((4,), 3e38).tolist()


def test_a_finite_norm_passes_error_if_nonfinite(target: Target) -> None:
    (parameter,) = parameters_of([torch.tensor([3.0, 4.0])])
    assert fastclip.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True) == 5.0
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


@every_dtype
@pytest.mark.parametrize(
    "name",
    ["shapes", "many_chunks", "channels_last", "inf_then_nan", "overlapping", "mixed_dtypes", "largest"],
)
@pytest.mark.parametrize("clip_value", [0.3, 0.0, 1e-45, 1e-30, 6e4, math.inf, -0.5])
def test_clamp_gives_the_bits_of_torch(
    native: Target, clip_value: float, name: str, dtype: torch.dtype
) -> None:
    ours, theirs = (BY_NAME[name].parameters(native.device, dtype) for _ in range(2))
    fastclip.clip_grad_value_(ours, clip_value)
    torch.nn.utils.clip_grad_value_(theirs, clip_value)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", [5.0, 0.0, 1e-9, math.nan, math.inf])
@every_dtype
def test_known_norm(target: Target, dtype: torch.dtype, norm: float) -> None:
    before = BY_NAME["many_chunks"].tensors(target.device, dtype)
    parameters = BY_NAME["many_chunks"].parameters(target.device, dtype)
    assert fastclip.clip_grads_with_norm_(parameters, 1.0, torch.tensor(norm, dtype=torch.float64)) is None
    coefficient = reference.clip_coefficient(norm, 1.0)
    for parameter, original in zip(parameters, before, strict=True):
        want = original.to("cpu", torch.float64) * coefficient
        tolerance.assert_scaled(parameter.grad, original, want, tolerance.scaled(dtype, 0.0))
