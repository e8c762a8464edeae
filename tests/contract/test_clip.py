"""Clipping: every target, case and dtype beside the float64 definition, and what may be written when."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator

import pytest
import tolerance
import torch
from cases import BY_NAME, DTYPES, Case, parameters_of, present
from targets import NATIVE, Target, cases_and_dtypes, dtypes, on
from torch import Tensor

import fastclip
from fastclip import backends, reference

INF, NAN = math.inf, math.nan


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


def versions(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def joined_by_dtype(tensors: list[Tensor]) -> list[Tensor]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return [torch.cat(vectors) for vectors in by_dtype.values()]


def thresholds(target: Target, norm: float, dtype: torch.dtype) -> Iterator[float]:
    """Some below the norm, whose gradients are scaled, and above, whose are not touched."""
    yield min(norm / 2, 1e300) if math.isfinite(norm) else 1.0
    if math.isfinite(norm) and (target.is_quick or dtype == torch.float32):
        yield 2 * norm + 1


@on("case dtype", cases_and_dtypes(lambda target: [case for case in target.cases if not case.aliased]))
def test_clip_grad_norm(target: Target, case: Case, dtype: torch.dtype) -> None:
    original = case.tensors(target.device, dtype)
    if target.is_native and not case.dense:
        with pytest.raises(fastclip.BackendUnavailableError, match="is not dense in memory"):
            fastclip.clip_grad_norm_(parameters_of(original), 1.0)
        assert bits(original) == bits(case.tensors(target.device, dtype))
        return
    for norm_type in (2.0, INF, 3.0) if target.is_quick else (2.0,):
        if norm_type == INF and case.has_empty:
            continue
        norm, relative = case.oracle_norm(dtype, norm_type), target.bound(original, norm_type)
        for max_norm in thresholds(target, norm, dtype):
            parameters = case.parameters(target.device, dtype)
            grads = present(p.grad for p in parameters)
            counted = versions(grads)
            returned = fastclip.clip_grad_norm_(parameters, max_norm, norm_type)
            tolerance.assert_norm(returned, norm, relative)
            if target.is_native and target.is_quick:
                measured = fastclip.get_total_norm(original, norm_type)
                torch.testing.assert_close(returned, measured, rtol=0, atol=0, equal_nan=True)
            coefficient = reference.clip_coefficient(norm, max_norm)
            if coefficient == 1.0 and target.is_native:
                assert bits(grads) == bits(original)
                if target.knows_what_it_wrote:
                    assert versions(grads) == counted
                continue
            assert [g.stride() for g in grads] == [t.stride() for t in original]
            for got, before in zip(joined_by_dtype(grads), joined_by_dtype(original), strict=True):
                want = before.to("cpu", torch.float64) * coefficient
                tolerance.assert_scaled(got, before, want, tolerance.scaled(got.dtype, relative))


@on("case dtype", cases_and_dtypes(lambda target: [case for case in target.cases if case.aliased]))
def test_shared_memory_is_counted_and_scaled_as_often_as_given(
    target: Target, case: Case, dtype: torch.dtype
) -> None:
    expected = case.tensors(target.device, dtype)
    norm = reference.total_norm(expected)
    if not target.scales_in_turn:
        calls = (
            lambda given: fastclip.clip_grad_norm_(given, 1e-3),
            lambda given: fastclip.clip_grads_with_norm_(given, 1e-3, torch.tensor(1.0)),
            lambda given: fastclip.clip_grad_value_(given, 1e-3),
        )
        for call in calls:
            with pytest.raises(fastclip.BackendUnavailableError, match="two gradients share memory"):
                call(parameters_of(expected))
        assert bits(expected) == bits(case.tensors(target.device, dtype))
        return
    factor = torch.tensor(0.5 / (norm + 1e-6), dtype=torch.promote_types(dtype, torch.float32))
    for tensor in expected:
        tensor.mul_(factor)
    for _ in range(3 if target.is_quick else 1):
        parameters = case.parameters(target.device, dtype)
        fastclip.clip_grad_norm_(parameters, 0.5)
        for p, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.filterwarnings("ignore:fastclip. max_norm is negative")
@pytest.mark.parametrize("max_norm", [0.0, -1.0, 1e-40, 1e9, NAN, INF])
@on("value", lambda _: ((value,) for value in (1.0, INF, NAN)))
def test_any_threshold(target: Target, value: float, max_norm: float) -> None:
    before = torch.tensor([value, -2.0])
    (parameter,) = parameters_of([before.to(target.device, copy=True)])
    fastclip.clip_grad_norm_(parameter, max_norm)
    (want,) = reference.clipped([before], max_norm)
    tolerance.assert_scaled(parameter.grad, before, want, tolerance.scaled(torch.float32, 1e-7))


def types_and_norms(target: Target) -> Iterator[tuple[torch.dtype, float]]:
    for dtype in DTYPES:
        few = target.is_interpreted and dtype != torch.float32
        yield from ((dtype, norm) for norm in ((5.0,) if few else (5.0, 0.0, 1e-9, NAN, INF)))


@on("dtype norm", types_and_norms)
def test_clip_by_a_known_norm(target: Target, dtype: torch.dtype, norm: float) -> None:
    name = "many_chunks" if target.is_quick else "shapes"
    before = BY_NAME[name].tensors(target.device, dtype)
    for norm_dtype in (torch.float64, torch.float32):
        parameters = BY_NAME[name].parameters(target.device, dtype)
        known = torch.tensor(norm, dtype=norm_dtype, device=target.device)
        assert fastclip.clip_grads_with_norm_(parameters, 1.0, known) is None
        coefficient = reference.clip_coefficient(known.item(), 1.0)
        grads = [p.grad for p in parameters]
        if coefficient == 1.0:
            assert bits(grads) == bits(before)
        for grad, original in zip(grads, before, strict=True):
            want = original.to("cpu", torch.float64) * coefficient
            tolerance.assert_scaled(grad, original, want, tolerance.scaled(dtype, 0.0))


@on("dtype", dtypes)
def test_scale_by_one_coefficient_or_one_each(target: Target, dtype: torch.dtype) -> None:
    case = BY_NAME["mixed_dtypes"]
    before = case.tensors(target.device, dtype)
    each = torch.tensor([0.25, 1.0, 0.3, 0.0, 2.0], dtype=torch.float64)
    for coefs in (torch.tensor([1 / 3], dtype=torch.float64), each):
        parameters = case.parameters(target.device, dtype)
        backends.run(backends.Backend.scale_grads_, parameters, coefs.to(target.device))
        for p, original, coef in zip(parameters, before, coefs.expand(len(before)).tolist(), strict=True):
            if coef == 1.0:
                assert bits([p.grad]) == bits([original])
            want = original.to("cpu", torch.float64) * coef
            tolerance.assert_scaled(p.grad, original, want, tolerance.scaled(p.grad.dtype, 0.0))


@on("dtype", dtypes, NATIVE)
def test_a_product_is_rounded_once_and_to_nearest_even(target: Target, dtype: torch.dtype) -> None:
    """Every finite 16-bit pattern times a coefficient: float32 product, one rounding, as torch does it."""
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
    else:
        values = torch.randn(2**15, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if target.is_interpreted:
        values = values[::17].contiguous()
    for coefficient in (0.5, 0.3, 2.0**-9, 1 - 2**-12):
        norm = torch.tensor(1.0 - 1e-6, dtype=torch.float64, device=target.device)
        (parameter,) = parameters_of([values.to(target.device, copy=True)])
        fastclip.clip_grads_with_norm_([parameter], coefficient, norm)
        exact = coefficient / (norm.item() + 1e-6)
        factor = torch.tensor(exact, dtype=torch.promote_types(dtype, torch.float32))
        want = (values.to(factor.dtype) * factor).to(dtype)
        assert bits([parameter.grad]) == bits([want])


UNCLIPPED = ("shapes", "channels_last", "scalar", "zeros", "mixed_dtypes", "many_chunks", "1200_tiny")


@on(
    "case dtype",
    cases_and_dtypes(lambda target: target.named(*UNCLIPPED[: 7 if target.is_quick else 2])),
    NATIVE,
)
def test_nothing_is_written_below_the_threshold(target: Target, case: Case, dtype: torch.dtype) -> None:
    parameters = case.parameters(target.device, dtype)
    grads = [p.grad for p in parameters]
    before, counted = bits(grads), versions(grads)
    norm = fastclip.clip_grad_norm_(parameters, 1e6)
    fastclip.clip_grads_with_norm_(parameters, 1e6, norm)
    fastclip.clip_grad_value_(parameters, 1e6)
    assert bits(grads) == before
    if target.knows_what_it_wrote:
        assert versions(grads) == counted
    assert norm < 1e6


@on("", targets=[target for target in NATIVE if not target.is_real])
def test_read_only_memory_below_the_threshold(target: Target) -> None:
    """Below the threshold gradients may even be read-only."""
    memory = mmap.mmap(-1, 4 * 4096, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        grad = torch.frombuffer(memory, dtype=torch.float32)
    (parameter,) = parameters_of([grad])
    assert fastclip.clip_grad_norm_([parameter], 1.0).item() == 0.0
    fastclip.clip_grad_value_([parameter], 1.0)


WRITTEN = ("shapes", "some_none", "nan", "inf", "only_empty", "channels_last", "many_chunks")


@on("case dtype", cases_and_dtypes(lambda t: t.named(*WRITTEN) if t.is_quick else t.named("some_none")))
def test_version_counters_rise_where_something_is_written(
    target: Target, case: Case, dtype: torch.dtype
) -> None:
    parameters = case.parameters(target.device, dtype)
    grads = present(p.grad for p in parameters)
    before = versions(grads)
    fastclip.get_total_norm(grads)
    assert versions(grads) == before
    fastclip.clip_grad_norm_(parameters, 1e-3)
    if case.name != "only_empty":
        assert versions(grads) == [version + 1 for version in before]


@on()
def test_backward_notices_a_clipped_gradient(target: Target) -> None:
    grad = torch.full((3,), 2.0, device=target.device)
    (parameter,) = parameters_of([grad])
    weight = torch.ones(3, requires_grad=True, device=target.device)
    product = (weight * grad).sum()  # saves grad
    fastclip.clip_grad_norm_([parameter], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@on("", targets=NATIVE)
def test_a_coefficient_that_rounds_to_one_writes_only_float64(target: Target) -> None:
    narrow = torch.tensor([3.0], device=target.device)
    wide = torch.tensor([4.0], dtype=torch.float64, device=target.device)
    before = versions([narrow, wide])
    fastclip.clip_grad_norm_(parameters_of([narrow, wide]), 5.0 + 1e-6 - 1e-9)
    assert (narrow.item(), wide.item() < 4.0) == (3.0, True)
    if target.knows_what_it_wrote:
        assert versions([narrow, wide]) == [before[0], before[1] + 1]


MEASURED = ("nan", "inf_then_nan", "large", "shapes", "inf", "many_chunks")


@on("case dtype", cases_and_dtypes(lambda target: target.named(*MEASURED[: 6 if target.is_quick else 2])))
def test_infinite_max_norm_never_writes(target: Target, case: Case, dtype: torch.dtype) -> None:
    parameters = case.parameters(target.device, dtype)
    grads = [p.grad for p in parameters]
    before, counted = bits(grads), versions(grads)
    norm = fastclip.clip_grad_norm_(parameters, INF)
    fastclip.clip_grads_with_norm_(parameters, INF, norm)
    assert (bits(grads), versions(grads)) == (before, counted)
    tolerance.assert_norm(norm, case.oracle_norm(dtype, 2.0), 1e-6)


@pytest.mark.parametrize(("value", "counts"), [(NAN, "1 nan and 0 inf"), (-INF, "0 nan and 1 inf")])
@on("dtype", lambda target: dtypes(target) if target.is_quick else [(torch.bfloat16,)])
def test_error_if_nonfinite(target: Target, dtype: torch.dtype, value: float, counts: str) -> None:
    shapes = ((3,), (4, 50), (2,))
    grads = [torch.ones(shape, dtype=dtype, device=target.device) for shape in shapes]
    grads[1][1, 7] = grads[2][:] = value
    parameters = parameters_of([None, *grads])
    before, counted = bits(grads), versions(grads)
    message = (
        r"^The total norm of order 2\.0 for gradients from `parameters` is non-finite, so it cannot be "
        r"clipped\. To disable this error and scale the gradients by the non-finite norm anyway, set "
        r"`error_if_nonfinite=False`"
        rf"[\s\S]*position 2, shape \(4, 50\), {dtype}, {counts} of 200 elements"
    )
    with pytest.raises(RuntimeError, match=message):
        fastclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert bits(grads) == before
    if target.knows_what_it_wrote:
        assert versions(grads) == counted


@on()
def test_error_if_nonfinite_asks_for_the_norm(target: Target) -> None:
    tensors = [torch.ones(2, device=target.device), torch.tensor(NAN, device=target.device)]
    with pytest.raises(RuntimeError, match=r"non-finite[\s\S]*position 1"):
        fastclip.get_total_norm(tensors, error_if_nonfinite=True)
    beyond = torch.full((4,), 3e38, device=target.device)
    with pytest.raises(RuntimeError, match=r"non-finite[\s\S]*Every element is finite"):
        fastclip.clip_grad_norm_(parameters_of([beyond]), 1.0, error_if_nonfinite=True)
    assert beyond.tolist() == torch.full((4,), 3e38).tolist()
    (parameter,) = parameters_of([torch.tensor([3.0, 4.0], device=target.device)])
    assert fastclip.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True) == 5.0
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
