"""What a drop-in must honour: the values that come out, each beside torch's own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from cases import DTYPES, dtype_id, parameters_of, present, select
from contract_comparison import assert_same, assert_same_outcome, outcome, rtol_of
from torch.nn import utils

import fastclip

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

# Where torch's norm leaves its dtype or loses accuracy, fastclip's is another and the oracle decides.
COMPARABLE = [
    case
    for case in select()
    if case.name not in ("large", "small", "four_times_large", "large_and_small", "subnormal", "largest")
]


@every_dtype
@pytest.mark.parametrize("case", COMPARABLE, ids=lambda case: case.name)
def test_clipping(dtype: torch.dtype, case: Any) -> None:
    """Values, return, layout, aliases: nothing, None, empty, nan, inf, mixed dtypes, duplicates, views."""
    # torch measures 16-bit gradients in their dtype, which costs it up to an eps per sum.
    rtol = 8 * rtol_of(torch.bfloat16 if case.name == "mixed_dtypes" else dtype)
    for max_norm in (0.5, 1e4):
        ours, theirs = case.parameters("cpu", dtype), case.parameters("cpu", dtype)
        norm, torch_norm = fastclip.clip_grad_norm_(ours, max_norm), utils.clip_grad_norm_(theirs, max_norm)
        assert_same(norm, torch_norm, rtol)
        half = (torch.bfloat16, torch.float16)
        assert norm.dtype == (torch.float32 if torch_norm.dtype in half else torch_norm.dtype)
        for p, q in zip(ours, theirs, strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert_same(p.grad, q.grad, 2 * rtol)


def test_expanded_gradients_raise() -> None:
    for module in (fastclip, utils):
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            parameters = parameters_of([torch.ones(1).expand(4)])
            with pytest.raises(RuntimeError, match="single memory location"):
                getattr(module, name)(parameters, 0.5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=dtype_id)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_complex(dtype: torch.dtype, norm_type: float) -> None:
    values = torch.randn(20, dtype=dtype, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        parameters_of([values.clone(), torch.ones(3)]),
        parameters_of([values.clone(), torch.ones(3)]),
    )
    assert_same_outcome(
        fastclip.clip_grad_norm_(ours, 0.5, norm_type), utils.clip_grad_norm_(theirs, 0.5, norm_type)
    )
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=dtype_id)
@pytest.mark.parametrize("name", ["get_total_norm", "clip_grad_norm_", "clip_grad_value_"])
def test_integers(name: str, dtype: torch.dtype) -> None:
    class HasGrad:
        def __init__(self) -> None:
            self.grad = torch.ones(3, dtype=dtype)

    outcomes = []
    for module in (fastclip, utils):
        argument: list[Any] = [torch.ones(3, dtype=dtype)] if name == "get_total_norm" else [HasGrad()]
        outcomes.append(outcome(lambda: getattr(module, name)(argument, 2.0)))  # noqa: B023
    if not isinstance(outcomes[1], Exception):
        assert_same_outcome(*outcomes)
    else:
        assert isinstance(outcomes[0], type(outcomes[1]))


def test_torch_gives_up_where_fastclip_is_right() -> None:
    """The first and second intended difference: finite gradients that torch zeroes or measures roughly."""
    ours, theirs = parameters_of([torch.full((4,), 6e31)]), parameters_of([torch.full((4,), 6e31)])
    assert fastclip.clip_grad_norm_(ours, 1.0).item() == pytest.approx(1.2e32, rel=1e-7)
    assert utils.clip_grad_norm_(theirs, 1.0).item() == math.inf
    assert ours[0].grad.tolist() == pytest.approx([0.5] * 4, rel=1e-6)
    assert theirs[0].grad.tolist() == [0.0] * 4
    half = torch.full((1001,), 1.0, dtype=torch.bfloat16)
    assert fastclip.get_total_norm([half]).item() == pytest.approx(1001**0.5, rel=1e-7)
    assert fastclip.get_total_norm([half]).dtype == torch.float32


def test_infinite_max_norm_differs_from_torch_only_where_the_norm_is_not_finite() -> None:
    """The third intended difference."""
    ours, theirs = (
        parameters_of([torch.tensor([math.inf, 1.0])]),
        parameters_of([torch.tensor([math.inf, 1.0])]),
    )
    assert fastclip.clip_grad_norm_(ours, math.inf) == utils.clip_grad_norm_(theirs, math.inf) == math.inf
    assert ours[0].grad.tolist() == [math.inf, 1.0]
    assert theirs[0].grad.isnan().all()


def test_create_graph(backend: str) -> None:
    for module in (fastclip, utils):
        weight = torch.tensor([3.0, 4.0], requires_grad=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
            (weight**3).sum().backward(create_graph=True)
        grad = weight.grad
        version = grad._version
        norm = module.clip_grad_norm_([weight], 1.0)
        assert not norm.requires_grad
        assert grad._version > version
        assert grad.requires_grad
        assert grad.norm().item() == pytest.approx(1.0, rel=1e-5)
        weight.grad = None


def test_the_norm_carries_no_graph(backend: str) -> None:
    tensor = torch.tensor([3.0, 4.0], requires_grad=True)
    for module in (fastclip, utils):
        assert not module.get_total_norm([tensor * 1.0]).requires_grad


def test_present_gradients_decide_the_dtype(backend: str) -> None:
    for dtypes in (
        [torch.float32, torch.float64],
        [torch.bfloat16, torch.float32],
        [torch.float16, torch.float64],
    ):
        parameters = parameters_of([None, *(torch.ones(2, dtype=d) for d in dtypes)])
        ours, theirs = fastclip.clip_grad_norm_(parameters, 9.0), utils.clip_grad_norm_(parameters, 9.0)
        assert (ours.dtype, ours.item()) == (theirs.dtype, 2.0)
        assert len(present(p.grad for p in parameters)) == 2
