"""Which optimizers the Triton step takes, and which it declines untouched."""

from __future__ import annotations

import math
from typing import Any

import optim_cases as cases
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import ClippedOptimizer

__all__ = ["interpreted"]

pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("interpreted"),
    # numpy, which stands in for the device, warns where the kernels overflow and divide on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]


class Tagged(torch.Tensor):
    """A subclass that torch functions keep."""


def give_ones(*params: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    for param in params:
        param.grad = torch.ones_like(param)
    return list(params)


def two_of_one_memory() -> Optimizer:
    memory = torch.randn(10)
    return SGD(give_ones(torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[4:])), lr=0.1)


def two_of_one_gradient() -> Optimizer:
    first, second = give_ones(*(torch.nn.Parameter(torch.ones(4)) for _ in range(2)))
    second.grad = first.grad
    return SGD([first, second], lr=0.1)


def two_of_one_counter() -> Optimizer:
    optimizer = AdamW(give_ones(*(torch.nn.Parameter(torch.ones(4)) for _ in range(2))))
    optimizer.step()
    first, second = optimizer.state.values()
    second["step"] = first["step"]
    return optimizer


def another_layout() -> Optimizer:
    param = torch.nn.Parameter(torch.randn(4, 6))
    param.grad = torch.randn(6, 4).t()
    return AdamW([param])


def another_state() -> Optimizer:
    optimizer = AdamW(give_ones(torch.nn.Parameter(torch.ones(4))))
    optimizer.step()
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"] = torch.zeros(4).double()
    return optimizer


def wide_state() -> Optimizer:
    optimizer = another_state()
    (param,) = optimizer.param_groups[0]["params"]
    param.data = param.data.bfloat16()
    give_ones(param)
    state = optimizer.state[param]
    state.update(exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
    return optimizer


def a_subclass() -> Optimizer:
    (param,) = give_ones(torch.nn.Parameter(torch.ones(4)))
    param.grad = param.grad.as_subclass(Tagged)
    return SGD([param], lr=0.1)


def a_gradient_elsewhere() -> Optimizer:
    param = torch.nn.Parameter(torch.ones(4, device="meta"))
    return SGD(give_ones(param), lr=0.1)


def a_rate_elsewhere() -> Optimizer:
    optimizer = SGD(give_ones(torch.nn.Parameter(torch.ones(4))), lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    return optimizer


def a_decay_elsewhere() -> Optimizer:
    optimizer = AdamW(give_ones(torch.nn.Parameter(torch.ones(4))))
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1, device="meta")
    return optimizer


def a_rate_of_integers() -> Optimizer:
    return SGD(give_ones(torch.nn.Parameter(torch.ones(4))), lr=torch.tensor(1))


def a_rate_of_a_subclass() -> Optimizer:
    return SGD(give_ones(torch.nn.Parameter(torch.ones(4))), lr=torch.tensor(0.1).as_subclass(Tagged))


def negated() -> Optimizer:
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch._neg_view(torch.ones(4))
    return SGD([param], lr=0.1)


def not_dense() -> Optimizer:
    return SGD(give_ones(torch.nn.Parameter(torch.ones(8)[::2])), lr=0.1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (two_of_one_memory, "two parameters share memory"),
        (two_of_one_gradient, "two gradients share memory"),
        (two_of_one_counter, "two parameters share a step counter"),
        (another_layout, "parameter 0 of group 0: its gradient has another dtype, shape or layout"),
        (another_state, "its exp_avg has another dtype"),
        (wide_state, "its exp_avg has another dtype"),
        (a_subclass, "its gradient is not a plain torch.Tensor"),
        (a_gradient_elsewhere, "it (has no plain memory|is not on the CPU)"),
        (a_rate_elsewhere, "the lr of group 0 is on meta"),
        (a_decay_elsewhere, "the weight_decay of group 0 is on meta"),
        (a_rate_of_integers, "the lr of group 0 is not one float32 or float64"),
        (a_rate_of_a_subclass, "the lr of group 0 is not one float32 or float64"),
        (negated, "lazily negated"),
        (not_dense, "it is not dense in memory"),
    ],
)
def test_what_the_kernels_cannot_take_is_declined_untouched(make: Any, reason: str) -> None:
    optimizer = make()
    params = optimizer.param_groups[0]["params"]
    before = cases.snapshot(params, optimizer)
    with pytest.raises(fastclip.BackendUnavailableError, match=reason):
        ClippedOptimizer(optimizer, cases.MAX_NORM, fused=True, write_grads=True).step()
    cases.assert_same(before, cases.snapshot(params, optimizer))


def test_two_parameters_with_one_gradient_that_is_only_read() -> None:
    optimizer = two_of_one_gradient()
    ClippedOptimizer(optimizer, math.inf, fused=True).step()
    assert all(torch.allclose(p, torch.tensor(0.9)) for p in optimizer.param_groups[0]["params"])


def test_takes_permuted_layouts_that_agree() -> None:
    weight = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(weight.to(memory_format=torch.channels_last)) for _ in range(2))
    for param in (ours, theirs):
        param.grad = weight.flip(0).to(memory_format=torch.channels_last)
    optimizer = ClippedOptimizer(AdamW([ours]), cases.MAX_NORM, fused=True)
    want = ClippedOptimizer(AdamW([theirs]), cases.MAX_NORM, fused=False)
    optimizer.step()
    want.step()
    assert optimizer.state[ours]["exp_avg"].stride() == want.state[theirs]["exp_avg"].stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
