"""Mixed precision: GradScaler's protocol on every route, and autocast."""

from __future__ import annotations

from typing import Any

import optim_cases as cases
import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import fastclip
from fastclip import ClippedOptimizer, attach

MAKERS = {
    "native": lambda params: AdamW(params, lr=1e-2),
    "torch_fused": lambda params: type("Subclassed", (Adam,), {})(params, lr=1e-2, fused=True),
    "plain": lambda params: RMSprop(params, lr=1e-2),
}


def make_scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("route", MAKERS)
def test_scaled_steps_equal_unscaled_ones(route: str, unscale_first: bool) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer = ClippedOptimizer(MAKERS[route](ours), max_norm=cases.MAX_NORM)
    plain: Optimizer = MAKERS[route](theirs)
    scaler = make_scaler()
    for grads in cases.gradients(6):
        optimizer.zero_grad()
        scaler.scale(cases.loss_of(ours, grads)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        cases.give(theirs, grads)
        norm = torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
        plain.step()
        assert optimizer.route == route
        torch.testing.assert_close(optimizer.last.total_norm, norm, rtol=1e-5, atol=0)
    assert scaler.get_scale() == 2.0**13  # grown three times
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("route", MAKERS)
def test_an_overflow_leaves_out_the_step_and_lowers_the_scale(
    route: str, unscale_first: bool, nonfinite: str
) -> None:
    params = cases.parameters()
    optimizer = ClippedOptimizer(MAKERS[route](params), max_norm=1.0, nonfinite=nonfinite)
    scaler = make_scaler()
    steps = list(cases.gradients(3))
    steps[0][2][3, 1] = float("inf")  # before there is any state
    steps[2][2][3, 1] = float("nan")
    skipped = []
    for grads in steps:
        optimizer.zero_grad()
        scaler.scale(cases.loss_of(params, grads)).backward()
        before = cases.snapshot(params, optimizer.optimizer)
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(bool(optimizer.last.skipped))
        if skipped[-1]:
            cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))
    assert skipped == [True, False, True]
    assert scaler.get_scale() == 2.0**8
    assert optimizer.stats().skipped == 2


@pytest.mark.parametrize("fused", [False, True])
def test_attached_clipping_takes_part_in_scaling(fused: bool) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, plain = Adam(ours, lr=1e-2, fused=fused), Adam(theirs, lr=1e-2, fused=fused)
    attach(optimizer, cases.MAX_NORM)
    scaler = make_scaler()
    steps = list(cases.gradients(5))
    steps[2][0][0, 0] = float("inf")
    for grads in steps:
        optimizer.zero_grad()
        scaler.scale(cases.loss_of(ours, grads)).backward()
        scaler.step(optimizer)
        scaler.update()
        if torch.isfinite(grads[0]).all():
            cases.give(theirs, grads)
            torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
            plain.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


def test_autocast_with_float32_parameters_trains() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = ClippedOptimizer(AdamW(net.parameters(), lr=1e-2), max_norm=1.0)
    x = torch.randn(64, 8)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.route == "native"
    assert losses[-1] < losses[0] / 4


def test_scale_and_verdict_set_by_hand_are_used() -> None:
    params = cases.parameters()
    grads = next(cases.gradients(1))
    cases.give(params, [4 * g for g in grads])
    before = [p.detach().clone() for p in params]
    optimizer = ClippedOptimizer(SGD(params, lr=1.0), max_norm=float("inf"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.stats().skipped == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.step()
    for param, start, grad in zip(params, before, grads, strict=True):
        torch.testing.assert_close(param.detach(), start - grad.float())


class MasterWeights(Optimizer):
    """SGD with momentum for 16-bit parameters, with float32 weights and momentum in its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["master"] = param.float()
                    state["momentum"] = torch.zeros_like(state["master"])
                state["momentum"].mul_(0.9).add_(param.grad)
                state["master"].sub_(state["momentum"], alpha=group["lr"])
                param.copy_(state["master"])


def sgd_with_float32_momentum(params: Any) -> Optimizer:
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    for param in params:
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param, dtype=torch.float32)
    return optimizer


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("make", [MasterWeights, sgd_with_float32_momentum])
def test_bfloat16_parameters_with_float32_state(make: Any, scaled: bool) -> None:
    ours, theirs = cases.parameters(torch.bfloat16), cases.parameters(torch.bfloat16)
    optimizer, plain = ClippedOptimizer(make(ours), cases.MAX_NORM), make(theirs)
    scaler = fastclip.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for step, grads in enumerate(cases.gradients(12)):
        scaler.scale(cases.loss_of(ours, grads)).backward()
        if step == 5:
            ours[1].grad.fill_(float("nan"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.route == "plain"
        if step != 5:
            cases.give(theirs, grads)
            fastclip.clip_grad_norm_(theirs, cases.MAX_NORM)
            plain.step()
    assert optimizer.stats().skipped == 1
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}
    cases.assert_same(cases.snapshot(theirs, plain), cases.snapshot(ours, optimizer))


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_float32_state_that_torch_refuses_is_refused_by_torch(options: dict[str, bool]) -> None:
    messages = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: ClippedOptimizer(optimizer, 1.0)):
        params = cases.parameters(torch.bfloat16)
        inner = AdamW(params, **options)
        cases.give(params, next(cases.gradients(1)))
        inner.step()
        for state in inner.state.values():
            state |= {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
        before = [param.detach().clone() for param in params]
        with pytest.raises(RuntimeError) as refused:
            wrap(inner).step()
        messages.append(str(refused.value))
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert messages[0] == messages[1]
