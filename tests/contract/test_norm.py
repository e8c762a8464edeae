"""Norms: every target, case and dtype within the bound of the float64 definition."""

from __future__ import annotations

import itertools
import math

import pytest
import tolerance
import torch
from cases import BY_NAME, DTYPES, NORM_TYPES, Case, parameters_of, present
from targets import NATIVE, Target, cases_and_dtypes, dtypes, on
from torch import Tensor

import fastclip
from fastclip import reference

INF, NAN = math.inf, math.nan
HALF_TYPES = (torch.bfloat16, torch.float16)


def norm_dtype(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def assert_norm(
    target: Target, norm: Tensor, tensors: list[Tensor], norm_type: float, what: str = ""
) -> None:
    want = reference.total_norm(tensors, norm_type)
    tolerance.assert_norm(norm, want, target.bound(tensors, norm_type), f"{what} p={norm_type:g}")


@on("case dtype", lambda target: itertools.product(target.cases, DTYPES))
def test_total_norm(target: Target, case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(target.device, dtype)
    if target.is_native and not case.dense:
        with pytest.raises(fastclip.BackendUnavailableError, match="is not dense in memory"):
            fastclip.get_total_norm(tensors)
        return
    for norm_type in target.norm_types(dtype):
        if norm_type == INF and case.has_empty:
            with pytest.raises((RuntimeError, IndexError), match="inf"):
                fastclip.get_total_norm(tensors, norm_type)
            continue
        norm = fastclip.get_total_norm(tensors, norm_type)
        assert (norm.dtype, norm.dim()) == (norm_dtype(tensors), 0)
        assert norm.device.type == (target.device if tensors else "cpu")
        want = case.oracle_norm(dtype, norm_type)
        tolerance.assert_norm(norm, want, target.bound(tensors, norm_type), f"p={norm_type:g}")


@on(
    "case dtype",
    cases_and_dtypes(
        lambda target: [
            case
            for case in target.some("some_empty", "mixed_dtypes", "large_and_small", "inf_then_nan", "zeros")
            if case.name != "1200_tiny"
        ]
    ),
)
def test_grad_norms(target: Target, case: Case, dtype: torch.dtype) -> None:
    parameters = case.parameters(target.device, dtype)
    grads = present(p.grad for p in parameters)
    if target.is_native and not case.dense:
        with pytest.raises(fastclip.BackendUnavailableError, match="is not dense in memory"):
            fastclip.grad_norms(parameters)
        return
    for norm_type in (1.0, 2.0, INF, 3.0):
        norms = fastclip.grad_norms(parameters, norm_type)
        assert (norms.shape, norms.dtype) == ((len(grads),), norm_dtype(grads))
        for i, (norm, grad) in enumerate(zip(norms, grads, strict=True)):
            assert_norm(target, norm, [grad], norm_type, f"gradient {i}")


@on("norm_type", lambda target: ((p,) for p in NORM_TYPES))
def test_one_gradient_has_the_total_norm(target: Target, norm_type: float) -> None:
    values = BY_NAME["misaligned"].tensors(target.device, torch.float32)[0]
    (parameter,) = parameters_of([values])
    norm = fastclip.get_total_norm([values], norm_type)
    assert fastclip.grad_norms(parameter, norm_type).equal(norm.reshape(1))


@on()
def test_measuring_writes_nothing(target: Target) -> None:
    parameters = BY_NAME["inf_then_nan"].parameters(target.device, torch.float32)
    before = [(p.grad.clone(), p.grad._version) for p in parameters]
    fastclip.get_total_norm([p.grad for p in parameters])
    fastclip.grad_norms(parameters)
    fastclip.find_nonfinite(enumerate(parameters))
    for parameter, (grad, version) in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
        assert parameter.grad._version == version


@on()
def test_nothing_has_norm_zero(target: Target) -> None:
    for norm in (fastclip.get_total_norm([]), fastclip.clip_grad_norm_([], 1.0)):
        assert (norm.item(), norm.dtype, norm.device.type, norm.dim()) == (0.0, torch.float32, "cpu", 0)
    assert fastclip.clip_grads_with_norm_([], 1.0, torch.tensor(3.0)) is None
    assert fastclip.grad_norms([]).shape == (0,)
    assert fastclip.grad_norms([torch.nn.Parameter(torch.ones(2, device=target.device))]).shape == (0,)
    assert fastclip.find_nonfinite([]) == {}


REPEATED = ("many_chunks", "1200_tiny", "misaligned")


@on("case", lambda t: ((c,) for c in t.named("mixed_dtypes", *(REPEATED if t.is_quick else ()))))
def test_every_run_gives_the_same_bits(target: Target, case: Case) -> None:
    tensors = case.tensors(target.device, torch.float32)
    parameters = parameters_of(tensors)
    for norm_type in (1.0, 2.0, INF, 2.5):
        runs = 20 if target.is_real else 3
        assert len({fastclip.get_total_norm(tensors, norm_type).item() for _ in range(runs)}) == 1, norm_type
        each = [fastclip.grad_norms(parameters, norm_type) for _ in range(2)]
        assert each[0].equal(each[1])


EXTREMES = {
    "float32-squares-overflow": (torch.float32, [1e30, -3e38, 2e20]),
    "float32-one-large": (torch.float32, [6e31, 1.0]),
    "float32-squares-underflow": (torch.float32, [1e-30, -2e-30]),
    "float32-squares-subnormal": (torch.float32, [1.1e-21, 1.3e-21, -1.7e-21]),
    "float32-squares-of-few-bits": (torch.float32, [1.7e-20, 3e-22, 2.5e-19]),
    "float32-sums-overflow": (torch.float32, [1.5e19, 1.5e19]),
    "float32-subnormal": (torch.float32, [1.4e-45, 2.8e-45]),
    "float32-near-the-refused-sum": (torch.float32, [2.0**-50, 2.0**-51, 2.0**-49]),
    "bfloat16-squares-overflow": (torch.bfloat16, [1e30, 3e38]),
    "bfloat16-squares-underflow": (torch.bfloat16, [1e-30, 1e-40]),
    "float16-largest": (torch.float16, [65504.0, -65504.0]),
    "float16-subnormal": (torch.float16, [6e-8, 1.2e-7]),
    "float64-squares-overflow": (torch.float64, [1e200, -1e300, 1e-300]),
    "float64-squares-underflow": (torch.float64, [1e-200, 1e-310, -3e-170]),
    "float64-subnormal": (torch.float64, [5e-324, 1e-323]),
    "float64-across-the-ranges": (torch.float64, [1e-140, 1e-130, 1e-160]),
    "float64-around-the-upper-range": (torch.float64, [1e130, 1e136, 1e140]),
    "negative-zero": (torch.float32, [-0.0, 0.0]),
    "inf": (torch.float32, [INF, 1.0]),
    "minus-inf": (torch.bfloat16, [-INF, 1.0]),
    "nan": (torch.float16, [NAN, 1.0]),
    "nan-and-inf": (torch.float64, [NAN, INF, 1e300]),
}


@on("name", lambda target: ((name,) for name in EXTREMES))
def test_extreme_values(target: Target, name: str) -> None:
    dtype, values = EXTREMES[name]
    alone = torch.tensor(values, dtype=dtype, device=target.device)
    # Among zeros, so that every position of a vector and the scalars behind it are met.
    apart = 1499 if target.is_quick else 211
    places = torch.arange(len(values), device=target.device) * apart
    zeros = torch.zeros(2 * apart + 3, dtype=dtype, device=target.device)
    scattered, repeated = zeros.index_put((places,), alone), alone.repeat(700 if target.is_quick else 130)
    for norm_type in (1.0, 2.0, INF, 0.5, 3.0, 40.0):
        for tensor in (alone, scattered, repeated):
            if target.is_quick or norm_type == 2.0 or tensor is alone:
                assert_norm(target, fastclip.get_total_norm(tensor, norm_type), [tensor], norm_type)


@on("dtype", dtypes, NATIVE)
def test_one_value_that_is_not_finite_reaches_the_norm_from_anywhere(
    target: Target, dtype: torch.dtype
) -> None:
    """Whichever lane, vector or block meets it."""
    numel, apart = (2_011, 701) if target.is_interpreted else (20_011, 509 if target.is_quick else 1_999)
    for position in range(0, numel, apart):
        tensor = torch.ones(numel, dtype=dtype, device=target.device)
        for value in (-INF, NAN):
            tensor[position] = value
            for norm_type in (2.0, INF):
                norm = fastclip.get_total_norm(tensor, norm_type).item()
                assert str(norm) == str(abs(value)), (position, value, norm_type)


# Constants whose squares or partial sums need more bits than the accumulator's type would have.
ADVERSARIAL = (1.0 + 2**-7, 1.0 - 2**-8, 0.1, 1 / 3, 3.0, 0.99951171875, 1000.1, 1e-3)


@on("dtype norm_type", lambda _: itertools.product((torch.float32, *HALF_TYPES), (1.0, 2.0)))
def test_accepted_error_of_constants(target: Target, dtype: torch.dtype, norm_type: float) -> None:
    numels = (7, 1000, 100_003) if target.is_quick else (2001,)
    for value, numel in itertools.product(ADVERSARIAL, numels):
        tensor = torch.full((numel,), value, dtype=dtype, device=target.device)
        error = abs(
            fastclip.get_total_norm(tensor, norm_type).item() - reference.total_norm([tensor], norm_type)
        )
        assert error <= target.accepted_error(norm_type) * value * numel ** (1 / norm_type), (value, numel)


@on("dtype", lambda _: ((dtype,) for dtype in HALF_TYPES))
def test_accepted_error_where_float32_sums_round_most(target: Target, dtype: torch.dtype) -> None:
    """One large element before seven small ones in each run: each addition drops bits of the small one."""
    small = torch.tensor(2.0**-5 * (1 + 2**-6), dtype=dtype, device=target.device)
    tensor = small.repeat(8 * 32 * 40).reshape(40, 8, 32)
    tensor[:, 0] = 1.0 + 2**-6
    error = abs(fastclip.get_total_norm(tensor).item() - (want := reference.total_norm([tensor])))
    assert error <= tolerance.ACCEPTED_NORM_ERROR * want


@on("dtype", lambda _: ((dtype,) for dtype in HALF_TYPES), NATIVE)
def test_every_finite_16_bit_pattern_counts(target: Target, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    tensor = finite.to(target.device) if target.is_quick else finite[::17].contiguous()
    assert_norm(target, fastclip.get_total_norm(tensor), [tensor], 2.0)


@on("dtype", dtypes, NATIVE)
def test_neighbouring_memory_is_neither_read_nor_written(target: Target, dtype: torch.dtype) -> None:
    """At every offset and length around vector, tile and chunk; what lies beside a view is nan."""
    memories, views = [], []
    lengths = target.lengths(dtype)
    for start, numel in itertools.product(target.starts(dtype), lengths):
        if not target.is_quick and start > 1 and numel > lengths[len(lengths) // 2]:
            continue
        memory = torch.full((start + numel + 40,), NAN, dtype=dtype, device=target.device)
        memory[start : start + numel] = 1.0
        memories.append(memory)
        views.append(memory[start : start + numel])
    assert {v.data_ptr() % 16 for v in views if v.numel()} == set(range(0, 16, dtype.itemsize))
    numel = sum(v.numel() for v in views)
    some = [view for view in views if view.numel()]
    for norm_type in target.norm_types(dtype) if target.is_quick else (2.0,):
        got = fastclip.get_total_norm(some, norm_type).item()
        want = 1.0 if norm_type == INF else numel ** (1 / norm_type)
        assert got == pytest.approx(want, rel=target.bound(some, norm_type) + 1e-15)
        norms = fastclip.grad_norms(parameters_of(some), norm_type)
        assert not norms.isnan().any()
    assert fastclip.find_nonfinite(enumerate(parameters_of(views))) == {}
    # A coefficient of 1/4 is exact in every type.
    fastclip.clip_grads_with_norm_(parameters_of(views), 1.0, torch.tensor(4.0 - 1e-6, dtype=torch.float64))
    assert all(bool((view == 0.25).all()) for view in views)
    fastclip.clip_grad_value_(parameters_of(views), 0.125)
    for memory, view in zip(memories, views, strict=True):
        assert bool((view == 0.125).all())
        assert int(memory.isnan().sum()) == memory.numel() - view.numel()
