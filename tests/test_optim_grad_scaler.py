"""`fastclip.GradScaler`: torch's in all it does, without torch's pass over the gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import optim_cases as cases
import pytest
import torch
from optim_oracle import Oracle
from torch.optim import SGD, Adam, AdamW, Optimizer

import fastclip
from fastclip import ClippedOptimizer, attach

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "native": lambda params: AdamW(params, lr=1e-2),
    "torch_fused": lambda params: type("Subclassed", (Adam,), {})(params, lr=1e-2, fused=True),
    "plain": lambda params: type("Subclassed", (AdamW,), {})(params, lr=1e-2),
}

OVERFLOWS = {0: math.inf, 7: math.nan, 8: -math.inf, 31: math.inf, 52: math.nan}
"""Step -> what one element of its gradients is; the first one comes before there is any state."""


def steps(num_steps: int = 60) -> Iterator[list[torch.Tensor]]:
    for step, grads in enumerate(cases.gradients(num_steps)):
        if step in OVERFLOWS:
            grads[step % 2 * 2].view(-1)[0] = OVERFLOWS[step]
        yield grads


def make_scaler(kind: type[Any] = fastclip.GradScaler, **options: Any) -> Any:
    return kind("cpu", **{"init_scale": 2.0**10, "growth_interval": 5, **options})


def backward(scaler: Any, params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    for param in params:
        param.grad = None
    scaler.scale(cases.loss_of(params, grads)).backward()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients each of torch's passes has read."""
    seen: list[int] = []
    own = torch._amp_foreach_non_finite_check_and_unscale_

    def counting(grads: list[torch.Tensor], *args: torch.Tensor) -> None:
        seen.append(len(grads))
        own(grads, *args)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counting)
    return seen


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("route", MAKERS)
def test_equals_torchs_scaler(route: str, unscale_first: bool, nonfinite: str, passes: list[int]) -> None:
    finals = []
    for kind in (fastclip.GradScaler, torch.amp.GradScaler):
        passes.clear()
        params = cases.parameters()
        optimizer = ClippedOptimizer(MAKERS[route](params), cases.MAX_NORM, nonfinite=nonfinite)
        oracle = Oracle(optimizer.optimizer, cases.MAX_NORM)
        scaler = make_scaler(kind)
        scales = []
        for step, grads in enumerate(steps()):
            backward(scaler, params, grads)
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            assert bool(optimizer.last.skipped) is (step in OVERFLOWS)
            if step not in OVERFLOWS:
                assert optimizer.route == route
                oracle.step([grad.float() for grad in grads])
        assert optimizer.stats().skipped == len(OVERFLOWS)
        oracle.assert_near(optimizer.optimizer)
        asked = unscale_first or kind is torch.amp.GradScaler
        assert passes == [len(params)] * 60 * asked
        finals.append([scales, scaler.state_dict(), cases.snapshot(params, optimizer.optimizer)])
    ours, theirs = finals
    assert ours[:2] == theirs[:2]
    assert min(ours[0]) < 2.0**10 < max(ours[0]), "the scale has to back off and to grow"
    cases.assert_same(theirs[2], ours[2])


@pytest.mark.parametrize("max_norm", [cases.MAX_NORM, math.inf])
def test_overflow_of_one_optimizer_lowers_the_scale_and_leaves_the_others_alone(
    max_norm: float, passes: list[int]
) -> None:
    first, second, third, idle = (cases.parameters(seed=seed) for seed in range(4))
    optimizers = [
        ClippedOptimizer(AdamW(first), max_norm),
        ClippedOptimizer(SGD(second, lr=0.1), max_norm),
        AdamW(third),
        ClippedOptimizer(SGD(idle, lr=0.1), max_norm),  # never has a gradient
    ]
    scaler = make_scaler()
    for step, grads in enumerate(cases.gradients(3)):
        spoiled = [grad.clone() for grad in grads]
        spoiled[0][0, 0] = math.inf if step == 1 else 1.0
        losses = [
            cases.loss_of(params, g)
            for params, g in zip((first, second, third), (grads, spoiled, grads), strict=True)
        ]
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(torch.stack(losses).sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert [optimizer.stats().skipped for optimizer in optimizers if optimizer is not optimizers[2]] == [
        0,
        1,
        0,
    ]
    assert optimizers[2].state[third[0]]["step"] == 3
    assert passes == [3, 3, 3], "only the optimizer that fastclip does not clip needs torch's pass"


@pytest.mark.parametrize("route", MAKERS)
def test_resume_has_the_same_bits(route: str) -> None:
    def start(params: list[torch.nn.Parameter]) -> Any:
        return params, ClippedOptimizer(MAKERS[route](params), cases.MAX_NORM), make_scaler()

    runs = [start(cases.parameters())]
    for step, grads in enumerate(steps()):
        if step == 33:
            resumed = start(cases.twins(runs[0][0]))
            for of, to in zip(runs[0][1:], resumed[1:], strict=True):
                to.load_state_dict(copy.deepcopy(of.state_dict()))
            runs.append(resumed)
        for params, optimizer, scaler in runs:
            backward(scaler, params, grads)
            scaler.step(optimizer)
            scaler.update()
    (params, optimizer, scaler), (resumed_params, other, other_scaler) = runs
    assert other.stats() == optimizer.stats()
    assert other_scaler.state_dict() == scaler.state_dict()
    cases.assert_same(cases.snapshot(params, optimizer), cases.snapshot(resumed_params, other))


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_attached_to_a_fused_optimizer_it_needs_no_pass_either(nonfinite: str, passes: list[int]) -> None:
    finals = []
    for kind in (fastclip.GradScaler, torch.amp.GradScaler):
        params = cases.parameters()
        optimizer, scaler = Adam(params, fused=True), make_scaler(kind)
        handle = attach(optimizer, cases.MAX_NORM, nonfinite=nonfinite)
        for grads in steps(10):
            backward(scaler, params, grads)
            scaler.step(optimizer)
            scaler.update()
        finals.append([scaler.state_dict(), handle.stats(), cases.snapshot(params, optimizer)])
        if kind is fastclip.GradScaler:
            assert passes == []
    assert finals[0][:2] == finals[1][:2]
    cases.assert_same(finals[1][2], finals[0][2])


def test_attached_to_any_other_optimizer_torch_unscales(passes: list[int]) -> None:
    params = cases.parameters()
    optimizer, scaler = AdamW(params), make_scaler()
    handle = attach(optimizer, cases.MAX_NORM)
    for grads in steps(2):
        backward(scaler, params, grads)
        scaler.step(optimizer)
        scaler.update()
    assert passes == [3, 3]
    assert handle.stats().steps == 1  # torch does not even call a step that overflows
    assert scaler.get_scale() == 2.0**9


def test_a_norm_that_may_hide_an_overflow_leaves_the_search_to_torch(passes: list[int]) -> None:
    params = cases.parameters()
    optimizer, scaler = ClippedOptimizer(AdamW(params), 1.0, norm_type=-1), make_scaler()
    before = cases.snapshot(params, optimizer)
    backward(scaler, params, next(steps()))
    scaler.step(optimizer)
    scaler.update()
    cases.assert_same(before, cases.snapshot(params, optimizer))
    assert passes == [3]
    assert scaler.get_scale() == 2.0**9


def test_sparse_gradients_are_searched_too(passes: list[int]) -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer, scaler = ClippedOptimizer(SGD(table.parameters(), lr=0.1), 1.0), make_scaler()
    before = table.weight.detach().clone()
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(table(torch.tensor([1, 1, 4])).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(table.weight.detach(), before) is (factor == math.inf)
    assert scaler.get_scale() == 2.0**9
    assert passes == []


def test_the_default_dtype_does_not_matter() -> None:
    params = cases.parameters()
    optimizer, scaler = ClippedOptimizer(AdamW(params), 1.0), make_scaler()
    try:
        torch.set_default_dtype(torch.float64)
        backward(scaler, params, next(steps()))
        scaler.step(optimizer)
        scaler.update()
    finally:
        torch.set_default_dtype(torch.float32)
    assert scaler.get_scale() == 2.0**9


def test_disabled_it_only_steps() -> None:
    params = cases.parameters()
    optimizer, scaler = ClippedOptimizer(AdamW(params), 1.0), make_scaler(enabled=False)
    for grads in steps(2):
        backward(scaler, params, grads)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.stats().steps, optimizer.stats().skipped) == (2, 1)
    assert scaler.state_dict() == {}


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    params = cases.parameters()
    optimizer = ClippedOptimizer(AdamW(params), 1.0, max_consecutive_skips=1)
    scaler = make_scaler()
    grads, *_, finite = steps(2)
    backward(scaler, params, grads)
    with pytest.raises(RuntimeError, match="1 steps in a row were skipped"):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    backward(scaler, params, finite)
    scaler.step(optimizer)
    norm = torch.cat([grad.flatten() for grad in finite]).norm()
    torch.testing.assert_close(optimizer.last.total_norm.double(), norm, rtol=1e-6, atol=0)


def test_what_torchs_scaler_refuses_is_refused() -> None:
    params = cases.parameters()
    optimizer, scaler = ClippedOptimizer(AdamW(params), 1.0), make_scaler()
    backward(scaler, params, next(cases.gradients(1)))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 1.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


KINDS = pytest.mark.parametrize("kind", [torch.amp.GradScaler, fastclip.GradScaler])


@KINDS
@pytest.mark.parametrize("route", MAKERS)
def test_unscaled_by_way_of_the_wrapped_optimizer_it_is_unscaled_once(route: str, kind: Any) -> None:
    finals = []
    for unscaled in (None, "wrapper", "wrapped"):
        params, scaler = cases.parameters(), make_scaler(kind)
        optimizer = ClippedOptimizer(MAKERS[route](params), cases.MAX_NORM)
        for grads in steps(10):
            backward(scaler, params, grads)
            if unscaled:
                scaler.unscale_(optimizer if unscaled == "wrapper" else optimizer.optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert vars(optimizer).keys().isdisjoint(("grad_scale", "found_inf"))
        finals.append([scaler.state_dict(), optimizer.stats(), cases.snapshot(params, optimizer)])
    assert finals[0][:2] == finals[1][:2] == finals[2][:2]
    cases.assert_same(finals[1][2], finals[2][2])
    torch.testing.assert_close(finals[0][2], finals[2][2], rtol=1e-5, atol=1e-6)


@KINDS
def test_what_would_unscale_twice_is_refused(kind: Any) -> None:
    def start() -> Any:
        params, scaler = cases.parameters(), make_scaler(kind)
        optimizer = ClippedOptimizer(AdamW(params), 1.0)
        backward(scaler, params, next(cases.gradients(1)))
        return scaler, optimizer, cases.snapshot(params, optimizer), params

    scaler, optimizer, before, params = start()
    scaler.unscale_(optimizer.optimizer)
    if kind is torch.amp.GradScaler:
        scaler.unscale_(optimizer)  # which it takes for another optimizer
        with pytest.raises(
            RuntimeError, match=r"^ClippedOptimizer\.step: .* already by way of the wrapped AdamW"
        ):
            scaler.step(optimizer)
    else:
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
            scaler.unscale_(optimizer)
    cases.assert_same(before, cases.snapshot(params, optimizer))

    scaler, optimizer, before, params = start()
    scaler.step(optimizer.optimizer)
    before = cases.snapshot(params, optimizer)
    with pytest.raises(RuntimeError, match=r"already been called|unscaled these gradients already"):
        scaler.step(optimizer)
    cases.assert_same(before, cases.snapshot(params, optimizer))


def test_ours_knows_the_wrapped_optimizer_once_the_clipped_one_is_unscaled() -> None:
    """torch's scaler cannot: nothing of fastclip takes part in a step of the wrapped optimizer."""
    params, scaler = cases.parameters(), make_scaler()
    optimizer = ClippedOptimizer(SGD(params, lr=1.0), 1e9)
    before = [p.detach().clone() for p in params]
    grads = next(cases.gradients(1))
    backward(scaler, params, grads)
    scaler.unscale_(optimizer)
    scaler.step(optimizer.optimizer)
    scaler.update()
    for param, start, grad in zip(params, before, grads, strict=True):
        torch.testing.assert_close(param.detach(), start - grad.float(), rtol=1e-5, atol=1e-6)
