"""Clamping: every target gives the bits of torch's, and writes where an element is outside."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import BY_NAME, DTYPES, Case, parameters_of
from targets import NATIVE, Target, on

import fastclip
from fastclip import backends
from fastclip.backends import Backend

NAMES = (
    *("offset", "inf_then_nan", "some_empty", "mixed_dtypes", "largest"),
    *("shapes", "many_chunks", "channels_last", "overlapping"),
)


def sizes(target: Target) -> list[tuple[Case, torch.dtype]]:
    cases = target.cases if target.is_real else target.named(*NAMES[: 9 if target.is_quick else 5])
    fit = [
        c
        for c in cases
        if c.dense and (target.scales_in_turn or not c.aliased) and c.tensors("cpu", DTYPES[0])
    ]
    return list(itertools.product(fit, DTYPES))


@on("case dtype", sizes, NATIVE)
def test_gives_the_bits_of_torch(target: Target, case: Case, dtype: torch.dtype) -> None:
    limits = (0.3, 0.0, 1e-45, 1e-30, 6e4, math.inf, -0.5) if target.is_quick else (0.3, 0.0, math.inf, -0.5)
    for limit in limits:
        ours, theirs = (case.parameters(device, dtype) for device in (target.device, "cpu"))
        fastclip.clip_grad_value_(ours, limit)
        torch.nn.utils.clip_grad_value_(theirs, limit)
        for got, want in zip(ours, theirs, strict=True):
            if want.grad is not None:
                torch.testing.assert_close(got.grad.cpu(), want.grad, rtol=0, atol=0, equal_nan=True)


@on("dtype", lambda target: [(dtype,) for dtype in DTYPES])
def test_a_limit_may_be_on_the_device(target: Target, dtype: torch.dtype) -> None:
    """As a strategy has it that knows a GradScaler's scale no better."""
    grads = [torch.linspace(-3, 3, 3001, dtype=dtype, device=target.device), torch.full((), 2.0, dtype=dtype)]
    expected = [grad.cpu().clamp(-0.7, 0.7) for grad in grads]
    parameters = parameters_of([grads[0], grads[1].to(target.device)])
    limit = torch.tensor(0.7, dtype=torch.float64, device=target.device)
    backends.run(Backend.elementwise_, parameters, "clamp", limit)
    for parameter, want in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), want, rtol=0, atol=0)


@on("", targets=NATIVE)
def test_writes_where_an_element_is_outside(target: Target) -> None:
    inside, outside = (torch.full((7_000,), 0.5, device=target.device) for _ in range(2))
    outside[6_999] = -3.0
    before = [inside._version, outside._version]
    fastclip.clip_grad_value_(parameters_of([inside, outside]), 1.0)
    assert (outside[6_999].item(), outside[0].item(), inside.unique().tolist()) == (-1.0, 0.5, [0.5])
    assert outside._version == before[1] + 1
    if target.knows_what_it_wrote:
        assert inside._version == before[0]


@on("", targets=NATIVE)
def test_a_lazily_negated_view_is_measured_and_not_clamped(target: Target) -> None:
    grad = torch._neg_view(torch.tensor([3.0, -4.0], device=target.device))
    assert fastclip.get_total_norm([grad]) == 5.0
    with pytest.raises(fastclip.BackendUnavailableError, match="lazily negated"):
        fastclip.clip_grad_value_(parameters_of([grad]), 1.0)
    assert grad.tolist() == [-3.0, 4.0]


@on("", targets=NATIVE)
def test_nan_is_no_limit_of_a_kernel(target: Target) -> None:
    (parameter,) = parameters_of([torch.full((3,), 5.0, device=target.device)])
    with pytest.raises(fastclip.BackendUnavailableError, match="clamp by nan"):
        fastclip.clip_grad_value_(parameter, math.nan)
    assert parameter.grad.tolist() == [5.0] * 3


@on()
def test_a_case_without_gradients_is_an_error_as_in_torch(target: Target) -> None:
    for parameters in ([], BY_NAME["all_none"].parameters(target.device, torch.float32)):
        with pytest.raises(RuntimeError):
            fastclip.clip_grad_value_(parameters, 1.0)
