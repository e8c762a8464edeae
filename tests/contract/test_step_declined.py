"""The folded step: what kernels cannot take is declined by every target, with the reason and untouched."""

from __future__ import annotations

import math
from collections.abc import Iterator

import optim_cases as cases
import pytest
import torch
from targets import STEPPING, Target, on
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

import fastclip


class Tagged(Tensor):
    """A subclass that torch functions keep."""


class Odd:
    """Optimizers that kernels decline, by name, on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=self.device)

    def two_of_one_memory(self) -> Optimizer:
        memory = self.ones(10)
        return SGD(cases.with_ones(memory[:6], memory[4:]), lr=0.1)

    def two_of_one_gradient(self) -> Optimizer:
        first, second = cases.with_ones(self.ones(4), self.ones(4))
        second.grad = first.grad
        return SGD([first, second], lr=0.1)

    def two_of_one_counter(self) -> Optimizer:
        optimizer = AdamW(cases.with_ones(self.ones(4), self.ones(4)))
        optimizer.step()
        first, second = optimizer.state.values()
        second["step"] = first["step"] = first["step"].to(self.device)
        return optimizer

    def another_layout(self) -> Optimizer:
        param = Parameter(self.ones(4, 6))
        param.grad = self.ones(6, 4).t()
        return AdamW([param])

    def another_state(self) -> Optimizer:
        optimizer = AdamW(cases.with_ones(self.ones(4)))
        optimizer.step()
        (state,) = optimizer.state.values()
        state["exp_avg"] = state["exp_avg"].double()
        return optimizer

    def wide_state(self) -> Optimizer:
        optimizer = AdamW(cases.with_ones(self.ones(4)))
        optimizer.step()
        (param,) = optimizer.param_groups[0]["params"]
        param.data = param.data.bfloat16()
        cases.with_ones(param)
        return optimizer

    def a_subclass(self) -> Optimizer:
        (param,) = cases.with_ones(self.ones(4))
        param.grad = param.grad.as_subclass(Tagged)
        return SGD([param], lr=0.1)

    def a_gradient_elsewhere(self) -> Optimizer:
        return SGD(cases.with_ones(torch.ones(4, device="meta")), lr=0.1)

    def a_rate_elsewhere(self) -> Optimizer:
        optimizer = SGD(cases.with_ones(self.ones(4)), lr=0.1)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
        return optimizer

    def a_decay_elsewhere(self) -> Optimizer:
        optimizer = AdamW(cases.with_ones(self.ones(4)))
        optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.1, device="meta")
        return optimizer

    def betas_elsewhere(self) -> Optimizer:
        optimizer = AdamW(cases.with_ones(self.ones(4)))
        optimizer.param_groups[0]["betas"] = (torch.zeros((), device="meta"), 0.9)
        return optimizer

    def a_rate_of_integers(self) -> Optimizer:
        return SGD(cases.with_ones(self.ones(4)), lr=torch.tensor(1, device=self.device))

    def a_rate_of_a_subclass(self) -> Optimizer:
        return SGD(cases.with_ones(self.ones(4)), lr=self.ones().mul(0.1).as_subclass(Tagged))

    def negated(self) -> Optimizer:
        (param,) = cases.with_ones(self.ones(4))
        param.grad = torch._neg_view(self.ones(4))
        return SGD([param], lr=0.1)

    def not_dense(self) -> Optimizer:
        return SGD(cases.with_ones(self.ones(8)[::2]), lr=0.1)


DECLINED = {
    "two_of_one_memory": "two parameters share memory",
    "two_of_one_gradient": "two gradients share memory",
    "two_of_one_counter": "two parameters share a step counter",
    "another_layout": "parameter 0 of group 0: its gradient has another dtype, shape or layout",
    "another_state": "its exp_avg has another dtype",
    "wide_state": "its exp_avg has another dtype",
    "a_subclass": "its gradient is not a plain torch.Tensor",
    "a_gradient_elsewhere": "it (has no plain memory|is not on )|the parameters are on meta",
    "a_rate_elsewhere": "the lr of group 0 is on meta",
    "a_decay_elsewhere": "the weight_decay of group 0 is on meta",
    "betas_elsewhere": "the betas of group 0 is on meta",
    "a_rate_of_integers": "the lr of group 0 is not one float32 or float64",
    "a_rate_of_a_subclass": "the lr of group 0 is not one float32 or float64",
    "negated": "lazily negated",
    "not_dense": "it is not dense in memory",
}


def declined_by(target: Target) -> Iterator[tuple[str]]:
    taken = {"wide_state"} if target.takes_wide_state else set()
    taken |= {"two_of_one_counter"} if target.takes_shared_counters else set()
    taken |= set() if target.reads_rates_itself else {"a_rate_of_integers", "a_rate_of_a_subclass"}
    yield from ((name,) for name in DECLINED if name not in taken)


@on("name", declined_by, STEPPING)
def test_what_the_kernels_cannot_take_is_declined_untouched(target: Target, name: str) -> None:
    optimizer = getattr(Odd(target.device), name)()
    params = optimizer.param_groups[0]["params"]
    before = cases.snapshot(params, optimizer)
    with pytest.raises(fastclip.BackendUnavailableError, match=DECLINED[name]):
        cases.folded(optimizer, write_grads=True).step()
    cases.assert_same(before, cases.snapshot(params, optimizer))


@on("", targets=STEPPING)
def test_an_empty_gradient_has_no_inf_norm(target: Target) -> None:
    params = cases.with_ones(torch.zeros(0, device=target.device))
    with pytest.raises(fastclip.BackendUnavailableError, match="empty, which has no inf-norm"):
        cases.folded(SGD(params, lr=0.1), norm_type=math.inf).step()
