"""grad_norms and find_nonfinite: each gradient's own measurements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import tolerance
import torch
from cases import BY_NAME, DTYPES, NORM_TYPES, Case, dtype_id, parameters_of, present, select

import fastclip
from fastclip import Nonfinite, reference

if TYPE_CHECKING:
    from conftest import Target

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@every_dtype
@pytest.mark.parametrize("case", [c for c in select() if c.name != "1200_tiny"], ids=lambda case: case.name)
def test_oracle(target: Target, dtype: torch.dtype, case: Case) -> None:
    parameters = case.parameters(target.device, dtype)
    if target.is_native and not case.dense:
        with pytest.raises(fastclip.BackendUnavailableError, match="is not dense in memory"):
            fastclip.grad_norms(parameters)
        return
    grads = present(p.grad for p in parameters)
    for norm_type in (1.0, 2.0, math.inf, 3.0):
        norms = fastclip.grad_norms(parameters, norm_type)
        wide = any(g.dtype == torch.float64 for g in grads)
        assert (norms.shape, norms.dtype) == ((len(grads),), torch.float64 if wide else torch.float32)
        for norm, grad in zip(norms, grads, strict=True):
            want = reference.total_norm([grad], norm_type)
            tolerance.assert_norm(
                norm, want, tolerance.norm(grad.dtype, grad.numel(), norm_type), f"p={norm_type:g}"
            )


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_one_gradient_has_the_total_norm(target: Target, norm_type: float) -> None:
    (parameter,) = parameters_of([BY_NAME["many_chunks"].tensors(target.device, torch.float32)[0]])
    assert fastclip.grad_norms(parameter, norm_type).equal(
        fastclip.clip_grad_norm_(parameter, math.inf, norm_type).reshape(1)
    )


def test_nothing_is_written(target: Target) -> None:
    parameters = BY_NAME["inf_then_nan"].parameters(target.device, torch.float32)
    before = [(p.grad.clone(), p.grad._version) for p in parameters]
    fastclip.grad_norms(parameters)
    fastclip.find_nonfinite(enumerate_names(parameters))
    for parameter, (grad, version) in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
        assert parameter.grad._version == version


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -math.inf, math.nan, "-2"])
def test_other_orders_are_refused(norm_type: float) -> None:
    with pytest.raises(ValueError, match=r"grad_norms: norm_type=.*; expected p > 0 or inf"):
        fastclip.grad_norms([], norm_type)


def test_no_gradients(target: Target) -> None:
    assert fastclip.grad_norms([torch.nn.Parameter(torch.ones(2))]).shape == (0,)
    assert fastclip.find_nonfinite([]) == {}


def enumerate_names(parameters: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"layer.{i}", p) for i, p in enumerate(parameters)]


@every_dtype
def test_nonfinite_elements_are_counted_and_named(target: Target, dtype: torch.dtype) -> None:
    many = torch.ones(100_003, dtype=dtype)
    many[::1000] = math.nan
    many[7::5000] = -math.inf
    few = torch.tensor([[1.0, math.inf], [-math.inf, math.inf]], dtype=dtype)
    largest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    parameters = parameters_of(
        [None, largest, many, few, torch.empty(0, dtype=dtype), torch.tensor(math.nan, dtype=dtype)]
    )
    found = fastclip.find_nonfinite(enumerate_names(parameters))
    assert list(found.items()) == [
        ("layer.2", Nonfinite(nan=101, inf=20)),
        ("layer.3", Nonfinite(nan=0, inf=3)),
        ("layer.5", Nonfinite(nan=1, inf=0)),
    ]


def test_every_16_bit_pattern(target: Target) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        grad = patterns.view(dtype)
        found = fastclip.find_nonfinite([("all", parameters_of([grad])[0])])
        assert found == {"all": Nonfinite(int(grad.isnan().sum()), 2)}
        finite = grad[grad.isfinite()]
        want = reference.total_norm([finite])
        tolerance.assert_norm(
            fastclip.get_total_norm([finite]), want, tolerance.norm(dtype, finite.numel(), 2.0)
        )


def test_sparse_gradients_are_searched() -> None:
    class HasGrad:
        grad = torch.tensor([0.0, math.nan, 1.0]).to_sparse()

    assert fastclip.find_nonfinite([("embedding", HasGrad())]) == {"embedding": Nonfinite(1, 0)}  # type: ignore[list-item]


def test_a_dtype_without_kernel_is_refused_by_name() -> None:
    class HasGrad:
        grad = torch.ones(3, dtype=torch.int8)

    with pytest.raises((TypeError, RuntimeError)):
        fastclip.grad_norms([HasGrad()])  # type: ignore[list-item]
