"""`ClippedOptimizer` as an optimizer: to schedulers, hooks, closures, copies, checkpoints; and bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import optim_cases as cases
import pytest
import torch
from sklearn.datasets import load_digits
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import fastclip
from fastclip import ClippedOptimizer, attach

MAKERS = {
    "native": lambda params: AdamW(params, lr=1e-2),
    "torch_fused": lambda params: type("Subclassed", (Adam,), {})(params, lr=1e-2, fused=True),
    "plain": lambda params: RMSprop(params, lr=1e-2),
}


def ready(optimizer_of: Any = AdamW, **settings: Any) -> tuple[list[torch.nn.Parameter], ClippedOptimizer]:
    """Parameters with gradients, and their optimizer."""
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    return params, ClippedOptimizer(optimizer_of(params), **{"max_norm": 1.0, **settings})


def poison(params: list[torch.nn.Parameter], value: float = math.nan) -> None:
    params[2].grad[4, 5] = value


def test_is_an_optimizer_whose_parts_are_the_wrapped_ones() -> None:
    _, optimizer = ready()
    assert isinstance(optimizer, Optimizer)
    for name in ("state", "param_groups", "defaults"):
        assert getattr(optimizer, name) is getattr(optimizer.optimizer, name)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert optimizer.optimizer.param_groups[1]["lr"] == 0.5
    assert "max_norm=1.0" in repr(optimizer)
    assert "AdamW" in repr(optimizer)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


class Outer(Optimizer):
    """Another wrapper, which passes on what is set."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda s: s.inner.param_groups, lambda s, v: setattr(s.inner, "param_groups", v))
    state = property(lambda s: s.inner.state, lambda s, v: setattr(s.inner, "state", v))
    defaults = property(lambda s: s.inner.defaults, lambda s, v: setattr(s.inner, "defaults", v))


@pytest.mark.parametrize("around", [lambda optimizer: optimizer, Outer])
def test_its_parts_can_be_set_as_in_torch(around: Any) -> None:
    params, optimizer = ready()
    optimizer.step()
    moved = copy.deepcopy(optimizer.state)
    state = type(moved)(dict, zip(params, moved.values(), strict=True))
    groups = [
        {**optimizer.param_groups[0], "params": [p], "lr": lr}
        for p, lr in zip(params, (0, 0, 1), strict=True)
    ]
    for name, value in (("state", state), ("param_groups", groups), ("defaults", {"lr": 1.0})):
        setattr(around(optimizer), name, value)
        assert getattr(optimizer, name) is getattr(optimizer.optimizer, name) is value
    before = cases.snapshot(params, optimizer)
    optimizer.step()
    assert optimizer.route == "native"
    assert [torch.equal(p, b) for p, b in zip(params, before[0], strict=True)] == [True, True, False]
    assert state[params[0]]["step"] == 2


@pytest.mark.parametrize("to_wrapped", [True, False])
def test_a_group_may_be_added_on_either_side_under_a_scheduler_of_either(to_wrapped: bool) -> None:
    params, optimizer = ready()
    scheduled, added = (optimizer.optimizer, optimizer) if to_wrapped else (optimizer, optimizer.optimizer)
    scheduler: LRScheduler = CosineAnnealingLR(scheduled, T_max=10)
    late = torch.nn.Parameter(torch.zeros(2))
    late.grad = torch.ones(2)
    added.add_param_group({"params": [late], "lr": 0.5, "initial_lr": 0.5})
    scheduler.base_lrs.append(0.5)
    optimizer.step()
    scheduler.step()
    assert late.tolist() == pytest.approx([-0.5, -0.5], rel=1e-6)
    assert optimizer.param_groups[1]["lr"] < 0.5
    assert set(optimizer.state) == {*params, late}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params, optimizer = ready()
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_schedulers_drive_it() -> None:
    _, optimizer = ready()
    scheduler: LRScheduler = CosineAnnealingLR(optimizer, T_max=10)
    plain = AdamW(cases.parameters())
    reference = CosineAnnealingLR(plain, T_max=10)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        plain.step()
        reference.step()
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_a_scheduler_of_the_wrapped_optimizer_does_not_warn() -> None:
    params = cases.parameters()
    inner = AdamW(params)
    scheduler = CosineAnnealingLR(inner, T_max=10)
    optimizer = ClippedOptimizer(inner, 1.0)
    cases.give(params, next(cases.gradients(1)))
    optimizer.step()
    scheduler.step()
    assert optimizer.route == "native"


def test_hooks_run_with_the_wrapper() -> None:
    _, optimizer = ready()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(f"pre {opt is optimizer}"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(f"post {opt is optimizer}"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(f"load {state['mine']}"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre True", "post True", "state pre", "load 1", "loaded"]


def test_several_side_by_side() -> None:
    first_params, first = ready()
    _, second = ready(lambda p: SGD(p, lr=0.1), max_norm=2.0)
    poison(first_params)
    first.step()
    second.step()
    assert (first.stats().skipped, second.stats().skipped) == (1, 0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("route", MAKERS)
def test_copies_go_on_alone(route: str, clone: Any) -> None:
    params, optimizer = ready(MAKERS[route] if route != "torch_fused" else lambda p: Adam(p, fused=True))
    optimizer.step()
    before = cases.snapshot(params, optimizer.optimizer)
    other = clone(optimizer)
    for param, twin in zip(params, other.param_groups[0]["params"], strict=True):
        twin.grad = param.grad.clone()
    other.step()
    assert (other.stats().steps, optimizer.stats().steps) == (2, 1)
    cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))
    optimizer.step()
    cases.assert_same(
        cases.snapshot(params, optimizer.optimizer),
        cases.snapshot(other.param_groups[0]["params"], other.optimizer),
    )


@pytest.mark.parametrize("route", MAKERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(route: str, value: float, first: bool) -> None:
    params, optimizer = ready(MAKERS[route])
    if not first:
        optimizer.step()
    before = cases.snapshot(params, optimizer.optimizer)
    poison(params, value)
    optimizer.step()
    cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))
    assert optimizer.route == route
    assert bool(optimizer.last.skipped)
    assert optimizer.stats().skipped == 1
    assert len(optimizer.state) == (0 if first else len(params))


@pytest.mark.parametrize("route", MAKERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_propagate_does_what_torch_does(route: str, value: float) -> None:
    params, optimizer = ready(MAKERS[route], nonfinite="propagate")
    theirs = cases.parameters()
    cases.give(theirs, [p.grad for p in params])
    plain = MAKERS[route](theirs)
    poison(params, value)
    poison(theirs, value)
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    plain.step()
    for param, twin in zip(params, theirs, strict=True):
        torch.testing.assert_close(param.detach(), twin.detach(), equal_nan=True)
    assert optimizer.stats().skipped == 0


@pytest.mark.parametrize("route", MAKERS)
def test_raise_names_the_parameter_and_changes_nothing(route: str) -> None:
    params = cases.parameters()
    named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
    cases.give(params, next(cases.gradients(1)))
    poison(params)
    optimizer = ClippedOptimizer(MAKERS[route](named), 1.0, nonfinite="raise")
    before = cases.snapshot(params, optimizer.optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 2 \(layer2.weight\) of group 0, .* 1 nan"):
        optimizer.step()
    cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))


def test_too_many_skips_in_a_row_raise() -> None:
    params, optimizer = ready(max_consecutive_skips=3)
    good = copy.deepcopy([p.grad for p in params])
    for bad_first in (True, True, False, True, True):
        cases.give(params, good)
        if bad_first:
            poison(params)
        optimizer.step()
    poison(params)
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped"):
        optimizer.step()
    assert optimizer.stats().consecutive_skips == 3


def test_last_and_stats() -> None:
    params, optimizer = ready(lambda p: SGD(p, lr=0.1), max_norm=60.0)
    assert optimizer.last is None
    assert optimizer.stats().clip_fraction == 0.0
    norms = []
    for grads in cases.gradients(4):
        cases.give(params, grads)
        norms.append(fastclip.get_total_norm([p.grad for p in params]).item())
        optimizer.step()
        assert optimizer.last.total_norm.item() == norms[-1]
        assert optimizer.last.clip_coef.item() == pytest.approx(min(1.0, 60.0 / norms[-1]), rel=1e-6)
    stats = optimizer.stats()
    assert (stats.steps, stats.clipped, stats.skipped, stats.clip_fraction) == (4, 2, 0, 0.5)
    assert stats.largest_norm == max(norms)
    optimizer.max_norm = 1.0
    optimizer.step()
    assert optimizer.stats().clipped == 3
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.stats().clipped == 3
    assert optimizer.last.total_norm == 0


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_resuming_gives_the_same_bits(option: str) -> None:
    steps = list(cases.gradients(8))
    whole_params = cases.parameters()
    whole = ClippedOptimizer(cases.make(option, whole_params), cases.MAX_NORM)
    for grads in steps[:4]:
        cases.give(whole_params, grads)
        whole.step()
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in whole_params], "optimizer": whole.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [torch.nn.Parameter(p) for p in saved["params"]]
    resumed = ClippedOptimizer(cases.make(option, params), cases.MAX_NORM)
    resumed.load_state_dict(saved["optimizer"])
    for grads in steps[4:]:
        for one_params, optimizer in ((whole_params, whole), (params, resumed)):
            cases.give(one_params, grads)
            optimizer.step()
    cases.assert_same(
        cases.snapshot(whole_params, whole.optimizer), cases.snapshot(params, resumed.optimizer)
    )
    assert whole.stats() == resumed.stats()


def test_checkpoints_go_in_and_out_of_plain_torch() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, plain = ClippedOptimizer(AdamW(ours), 1e9), AdamW(theirs)
    for grads in cases.gradients(3):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        optimizer.step()
        plain.step()
    from_ours, from_torch = AdamW(cases.twins(ours)), ClippedOptimizer(AdamW(cases.twins(theirs)), 1e9)
    from_ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    from_torch.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert from_torch.stats().steps == 0
    for one in (from_ours, from_torch):
        cases.give(one.param_groups[0]["params"], grads)
        one.step()
    plain.step()
    for one in (from_ours, from_torch):
        for param, twin in zip(one.param_groups[0]["params"], theirs, strict=True):
            torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)
            assert one.state[param]["step"] == 4


@pytest.mark.parametrize("route", MAKERS)
def test_a_closure_is_evaluated_once_and_its_gradients_clipped(route: str) -> None:
    params = cases.parameters()
    optimizer = ClippedOptimizer(MAKERS[route](params), max_norm=1.0)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0
    assert optimizer.stats().clipped == 1


@pytest.mark.parametrize("route", MAKERS)
def test_an_exception_in_the_closure_applies_nothing(route: str) -> None:
    params, optimizer = ready(MAKERS[route])
    before = cases.snapshot(params, optimizer.optimizer)

    def closure() -> float:
        raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError, match="in the model"):
        optimizer.step(closure)
    cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))
    assert optimizer.stats().steps == 0


def quadratic(optimizer: Optimizer, fail_at: int = 0, error: bool = False) -> Any:
    """A closure of Rosenbrock's function that goes wrong at one evaluation."""
    (param,) = optimizer.param_groups[0]["params"]
    count = 0

    def closure() -> torch.Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = (1 - param[0]) ** 2 + 100 * (param[1] - param[0] ** 2) ** 2
        loss.backward()
        if count == fail_at:
            if error:
                raise ZeroDivisionError
            param.grad.fill_(math.nan)
        return loss

    return closure


def test_lbfgs_clips_after_every_evaluation() -> None:
    param = torch.nn.Parameter(torch.tensor([-1.0, 1.5]))
    optimizer = ClippedOptimizer(LBFGS([param], lr=0.5, max_iter=5), max_norm=0.1)
    optimizer.step(quadratic(optimizer))
    assert optimizer.route == "plain"
    assert param.grad.norm() <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize("fail_at", [1, 3])
@pytest.mark.parametrize("error", [False, True])
def test_lbfgs_is_put_back_when_it_fails_midway(fail_at: int, error: bool) -> None:
    param = torch.nn.Parameter(torch.tensor([-1.0, 1.5]))
    optimizer = ClippedOptimizer(LBFGS([param], max_iter=5), max_norm=10.0)
    optimizer.step(quadratic(optimizer))
    before = cases.snapshot([param], optimizer.optimizer)
    if error:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(quadratic(optimizer, fail_at, error))
    else:
        assert optimizer.step(quadratic(optimizer, fail_at)) is None
        assert bool(optimizer.last.skipped)
    cases.assert_same(before, cases.snapshot([param], optimizer.optimizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_norm": 0}, "max_norm=0; expected a number > 0"),
        ({"max_norm": -1.0}, "max_norm=-1.0; expected"),
        ({"max_norm": math.nan}, "max_norm=nan; expected"),
        ({"max_norm": 1.0, "norm_type": math.nan}, "norm_type=nan; expected"),
        ({"max_norm": 1.0, "nonfinite": "ignore"}, "nonfinite='ignore'; expected one of skip, raise"),
        ({"max_norm": 1.0, "max_consecutive_skips": 0}, "max_consecutive_skips=0; expected at least 1"),
    ],
)
@pytest.mark.parametrize("function", [ClippedOptimizer, attach])
def test_settings_that_make_no_sense(function: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}: {message}"):
        function(AdamW(cases.parameters()), **settings)


def test_what_cannot_be_wrapped() -> None:
    _, optimizer = ready()
    attached = AdamW(cases.parameters())
    attach(attached, 1.0)
    for function in (ClippedOptimizer, attach):
        with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, not list"):
            function([], 1.0)
        for clipped in (optimizer, attached):
            with pytest.raises(TypeError, match="is clipped already"):
                function(clipped, 1.0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]})


def test_a_nan_batch_in_the_middle_of_training() -> None:
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32).flatten(1), torch.tensor(data.target)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = ClippedOptimizer(SGD(net.parameters(), lr=0.3, momentum=0.9), max_norm=0.25)
    for epoch in range(8):
        for number, batch in enumerate(train[torch.randperm(1400)].split(32)):
            inputs = x[batch].clone()
            if (epoch, number) == (4, 10):
                inputs[3] = math.nan
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(inputs), y[batch]).backward()
            optimizer.step()
    accuracy = (net(x[test]).argmax(1) == y[test]).float().mean().item()
    assert optimizer.stats().skipped == 1
    assert accuracy >= 0.93
