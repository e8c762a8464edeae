"""`attach`: clipping through step hooks."""

from __future__ import annotations

import copy
import math
from typing import Any

import optim_cases as cases
import pytest
import torch
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Muon, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR

import fastclip
from fastclip import attach

MAKERS = {
    "adamw": AdamW,
    "adamw_fused": lambda params: AdamW(params, fused=True),
    "sgd_fused": lambda params: SGD(params, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": RMSprop,
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_equals_clip_and_step(name: str, with_closure: bool) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, plain = MAKERS[name](ours), MAKERS[name](theirs)
    handle = attach(optimizer, cases.MAX_NORM)
    scheduler = StepLR(optimizer, 2, gamma=0.9)
    plain_scheduler = StepLR(plain, 2, gamma=0.9)
    for grads in cases.gradients(6):

        def closure(grads: list[torch.Tensor] = grads) -> float:
            cases.give(ours, grads)
            return 1.5

        if with_closure:
            assert optimizer.step(closure=closure) == 1.5
        else:
            closure()
            optimizer.step()
        cases.give(theirs, grads)
        torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
        plain.step()
        scheduler.step()
        plain_scheduler.step()
    assert type(optimizer) is type(plain)
    assert handle.stats().clipped == 3
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_skips_what_is_not_finite(name: str, first: bool, with_closure: bool) -> None:
    params = cases.parameters()
    optimizer: Optimizer = MAKERS[name](params)
    handle = attach(optimizer, cases.MAX_NORM)
    cases.give(params, next(cases.gradients(1)))
    if not first:
        optimizer.step()
    before = cases.snapshot(params, optimizer)
    params[0].grad[0, 0] = math.nan
    grads = [p.grad for p in params]
    optimizer.step((lambda: 1.0) if with_closure else None)
    assert handle.stats().skipped == 1
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert {k: v for k, v in vars(optimizer).items() if k in ("grad_scale", "found_inf")} == {}
    after = cases.snapshot(params, optimizer)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert {k: v for k, v in after[1].items() if v} == pytest.approx(before[1]) if first else True
    if not first:
        cases.assert_same(before, after)


def test_raise_and_a_limit_change_nothing() -> None:
    for settings, message in (
        ({"nonfinite": "raise"}, "attach: the total norm .* parameter 0 of group 0"),
        ({"max_consecutive_skips": 1}, "attach: 1 steps in a row"),
    ):
        params = cases.parameters()
        cases.give(params, next(cases.gradients(1)))
        params[0].grad[0, 0] = math.inf
        optimizer = AdamW(params)
        attach(optimizer, 1.0, **settings)
        before = cases.snapshot(params, optimizer)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        cases.assert_same(before, cases.snapshot(params, optimizer))
        assert params[0].grad is not None


def test_remove_gives_the_optimizer_back() -> None:
    params = cases.parameters()
    optimizer = AdamW(params)
    handle = attach(optimizer, 1e-3)
    handle.remove()
    handle.remove()
    cases.give(params, next(cases.gradients(1)))
    grads = copy.deepcopy([p.grad for p in params])
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert handle.stats().steps == 0
    attach(optimizer, 1.0).remove()


def test_a_closure_that_raises_leaves_the_optimizer_usable() -> None:
    params = cases.parameters()
    optimizer = AdamW(params, fused=True)
    attach(optimizer, 1.0)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    cases.give(params, next(cases.gradients(1)))
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_counters_survive_a_checkpoint() -> None:
    params = cases.parameters()
    optimizer = AdamW(params)
    handle = attach(optimizer, 1.0)
    cases.give(params, next(cases.gradients(1)))
    optimizer.step()
    other = AdamW(cases.twins(params))
    other_handle = attach(other, 1.0)
    other.load_state_dict(optimizer.state_dict())
    assert other_handle.stats() == handle.stats()
    AdamW(cases.twins(params)).load_state_dict(optimizer.state_dict())


def test_what_hooks_cannot_do() -> None:
    params = cases.parameters()
    with pytest.raises(fastclip.BackendUnavailableError, match="not made with fused=True"):
        attach(AdamW(params), 1.0, fused=True)
    with pytest.raises(ValueError, match=r"attach: nonfinite='skip' with LBFGS, "):
        attach(LBFGS(params), 1.0)


@pytest.mark.parametrize("make", [Adafactor, Muon])
def test_optimizers_that_torch_keeps_in_private_modules_can_skip(make: type[Optimizer]) -> None:
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make([param])
    handle = attach(optimizer, 1.0)
    param.grad = torch.full((2, 2), math.nan)
    optimizer.step()
    assert handle.stats().skipped == 1
    assert param.equal(torch.ones(2, 2))


def test_lbfgs_is_clipped_at_every_evaluation() -> None:
    param = torch.nn.Parameter(torch.tensor([-1.0, 1.5]))
    optimizer = LBFGS([param], lr=0.5, max_iter=3)
    handle = attach(optimizer, 0.1, nonfinite="propagate")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (1 - param[0]) ** 2 + 100 * (param[1] - param[0] ** 2) ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert handle.stats().steps >= 3
    assert param.grad.norm() <= 0.1 * (1 + 1e-6)
