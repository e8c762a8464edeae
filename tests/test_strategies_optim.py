"""Strategies and threshold tensors in the place of max_norm: every route, groups, scalers, checkpoints."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import cuda_library
import optim_cases as cases
import pytest
import torch
from distributed_clients import strategies_on_ranks
from ranks import ranks
from strategy_cases import REMEMBERING, STRATEGIES, gradients
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from triton_interpreter import interpreted, needs_triton

import fastclip
from fastclip import ClippedOptimizer, strategies
from fastclip.backends import cpu
from fastclip.strategies import Gradients, Strategy

__all__ = ["interpreted"]


needs_emulation = pytest.mark.skipif(
    cpu._C is None or cuda_library.compiler() is None, reason="needs the extension and g++ with _Float16"
)


def train(
    optimizer: Any, params: list[nn.Parameter], steps: range, bad: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Take steps; in one of them a gradient has a nan."""
    told = []
    for step in steps:
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        if step == bad:
            params[0].grad[0] = math.nan  # type: ignore[index]
        optimizer.step()
        told.append((optimizer.last.total_norm, optimizer.last.clip_coef, optimizer.last.skipped))
    return told


def by_hand(
    strategy: Strategy, optimizer: Optimizer, params: list[nn.Parameter], steps: range, bad: int | None
) -> None:
    """Clip by the strategy's own function, and step unless the norm is not finite or the step an outlier."""
    for step in steps:
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        if step == bad:
            params[0].grad[0] = math.nan  # type: ignore[index]
        grads = [p.grad.double() for p in params if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        if isinstance(strategy, strategies.Skip) and norm.isfinite():
            decision = strategy.decide(Gradients(params, norm))
            if bool(decision.outlier):
                continue
            for param in params:
                param.grad *= float(decision.coefs)
        elif not strategy.clip_grad_norm_(params).isfinite():
            continue
        optimizer.step()


ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "native": ({}, {"fused": True}),
    "torch_fused": ({"fused": True}, {}),
    "plain": ({}, {"fused": False}),
}


@pytest.mark.parametrize(("nonfinite", "is_skipped"), [("skip", True), ("propagate", False)])
def test_what_is_not_finite_is_no_outlier_to_those_who_want_it(nonfinite: Any, is_skipped: bool) -> None:
    params = cases.parameters()
    strategy = strategies.Skip(strategies.MedianMAD(window=16, warmup=5))
    optimizer = ClippedOptimizer(AdamW(params, lr=1e-2), strategy, nonfinite=nonfinite)
    told = train(optimizer, params, range(8), bad=6)
    assert bool(told[6][2]) == is_skipped
    assert bool(params[0].isnan().any()) != is_skipped


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_every_route_takes_the_same_steps(name: str, route: str, kind: type[Optimizer]) -> None:
    options, settings = ROUTES[route]
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer = kind(ours, lr=1e-2, **options)  # type: ignore[call-arg]
    if route == "torch_fused":
        handle: Any = fastclip.attach(optimizer, STRATEGIES[name]())
        handle.step = optimizer.step
    else:
        handle = ClippedOptimizer(optimizer, STRATEGIES[name](), **settings)
    told = train(handle, ours, range(20), bad=13)
    by_hand(STRATEGIES[name](), kind(theirs, lr=1e-2), theirs, range(20), 13)  # type: ignore[call-arg]
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert bool(told[13][2])
    assert [bool(t[2]) for t in told].count(True) == handle.stats().skipped
    if route == "native":
        assert handle.route == "native"


WAYS_TO_A_KERNEL = ["median_mad", "zscore", "per_tensor", "skip"]
"""A threshold on the device; a coefficient for all and one for each; a verdict: interpreting is slow."""


@needs_triton
@pytest.mark.parametrize("name", WAYS_TO_A_KERNEL)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_the_triton_kernels_take_the_same_steps(name: str) -> None:
    check_steps_on_device(name, "triton", range(4, 10))


@needs_emulation
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_cuda_kernels_take_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_library.take_steps_of_the_cpu(monkeypatch)
    check_steps_on_device(name, "auto", range(15))


def check_steps_on_device(name: str, backend: str, steps: range) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    handle = ClippedOptimizer(AdamW(ours, lr=1e-2), STRATEGIES[name](), fused=True)
    with fastclip.use_backend(backend):
        told = train(handle, ours, steps, bad=7)
    with fastclip.use_backend("cpu"):
        expected = train(ClippedOptimizer(AdamW(theirs, lr=1e-2), STRATEGIES[name]()), theirs, steps, bad=7)
    assert handle.route == "native"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for found, known in zip(told, expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("how", ["wrapper", "attach"])
def test_a_resumed_run_has_the_same_bits(name: str, how: str) -> None:
    def made() -> tuple[Any, Any, list[nn.Parameter]]:
        params = cases.parameters()
        optimizer = AdamW(params, lr=1e-2)
        if how == "wrapper":
            clipped = ClippedOptimizer(optimizer, STRATEGIES[name]())
            return clipped, clipped, params
        handle: Any = fastclip.attach(optimizer, STRATEGIES[name]())
        handle.step = optimizer.step
        return handle, optimizer, params

    handle, whole, params = made()
    train(handle, params, range(15), bad=11)
    file = io.BytesIO()
    torch.save({"params": [p.detach().clone() for p in params], "optimizer": whole.state_dict()}, file)
    expected = train(handle, params, range(15, 25))
    handle, other, others = made()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for param, value in zip(others, saved["params"], strict=True):
            param.copy_(value)
    other.load_state_dict(saved["optimizer"])
    found = train(handle, others, range(15, 25))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(others, params, rtol=0, atol=0)
    assert handle.stats().steps == 25


@needs_emulation
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_run_on_a_device_is_resumed_with_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_library.take_steps_of_the_cpu(monkeypatch)
    params, others = cases.parameters(), cases.parameters()
    clipped = ClippedOptimizer(AdamW(params, lr=1e-2), STRATEGIES[name](), fused=True)
    train(clipped, params, range(15), bad=11)
    saved = copy.deepcopy(clipped.state_dict())
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    resumed = ClippedOptimizer(AdamW(others, lr=1e-2), STRATEGIES[name](), fused=True)
    resumed.load_state_dict(saved)
    told = [train(c, p, range(15, 22)) for c, p in ((clipped, params), (resumed, others))]
    torch.testing.assert_close(told[0], told[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(params, others, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["median_mad", "zscore", "per_tensor", "ema"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
def test_gradients_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(4, dtype=dtype))
    clipped = ClippedOptimizer(SGD([param], lr=1.0), STRATEGIES[name]())
    for step in range(8):
        param.grad = torch.full((4,), 1000.0 if step == 7 else 1.0, dtype=dtype)
        before = param.detach().clone()
        clipped.step()
    assert clipped.last is not None
    assert float(clipped.last.total_norm) == pytest.approx(2000.0)
    assert clipped.last.total_norm.dtype == (torch.float32 if dtype == torch.complex64 else torch.float64)
    assert float((param.detach() - before).norm()) < 10.0


def test_a_checkpoint_of_another_strategy_is_refused_and_changes_nothing() -> None:
    params = cases.parameters()
    clipped = ClippedOptimizer(AdamW(params, lr=1e-2), strategies.MedianMAD(window=8, warmup=2))
    train(clipped, params, range(4))
    saved = clipped.state_dict()
    others = cases.parameters()
    other = ClippedOptimizer(AdamW(others, lr=0.5), strategies.Percentile())
    train(other, others, range(2))
    before = repr(other.state_dict())
    with pytest.raises(ValueError, match="state of MedianMAD; expected that of Percentile"):
        other.load_state_dict(saved)
    assert repr(other.state_dict()) == before
    broken = {**saved, "param_groups": []}
    before = repr(clipped.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        clipped.load_state_dict(broken)
    assert repr(clipped.state_dict()) == before


def test_a_load_that_fails_leaves_an_attached_strategy_as_it_was() -> None:
    params = cases.parameters()
    optimizer = AdamW(params, lr=1e-2)
    handle: Any = fastclip.attach(optimizer, strategies.MedianMAD(window=8, warmup=2))
    handle.step = optimizer.step
    train(handle, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    train(handle, params, range(4, 6))
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({**saved, "param_groups": []})
    assert repr(optimizer.state_dict()) == before
    optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == repr(saved)


def test_plain_torch_loads_a_checkpoint_with_strategies() -> None:
    params = cases.parameters()
    groups = [{"params": params[:1], "max_norm": strategies.Fixed(2)}, {"params": params[1:]}]
    clipped = ClippedOptimizer(AdamW(groups, lr=1e-2), strategies.MedianMAD(window=8, warmup=2))
    train(clipped, params, range(4))
    saved = clipped.state_dict()
    assert all("max_norm" not in group for group in saved["param_groups"])
    AdamW([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(saved)
    clipped.load_state_dict(saved)
    assert isinstance(clipped.param_groups[0]["max_norm"], strategies.Fixed)


def test_each_group_is_clipped_by_its_own() -> None:
    """Numbers, tensors and strategies, of groups with their own; the rest together by the optimizer's."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(5)]
    groups: list[dict[str, Any]] = [
        {"params": params[:2], "max_norm": 1.0},
        {"params": params[2:3], "max_norm": torch.tensor(0.5)},
        {"params": params[3:4]},
        {"params": params[4:], "max_norm": strategies.Fixed(math.inf)},
    ]
    for settings in ({}, {"fused": False}):
        clipped = ClippedOptimizer(SGD(copy.deepcopy(groups), lr=1.0), 2.0, **settings)
        listed = [p for group in clipped.param_groups for p in group["params"]]
        for number, param in enumerate(listed):
            param.grad = torch.full((4,), 1.0 + number)
        clipped.step()
        sizes = [(2.0**2 + 4.0**2) ** 0.5, 6.0, 8.0]
        coefs = [1 / sizes[0], 1 / sizes[0], 0.5 / sizes[1], 2.0 / sizes[2], 1.0]
        for number, (param, coef) in enumerate(zip(listed, coefs, strict=True)):
            torch.testing.assert_close(param.detach(), torch.full((4,), -(1.0 + number) * coef))
        assert float(clipped.last.total_norm) == pytest.approx(math.sqrt(4 * (1 + 4 + 9 + 16 + 25)))  # type: ignore[union-attr]


def test_a_bad_group_is_named() -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    clipped = ClippedOptimizer(SGD([{"params": [param], "max_norm": -1}], lr=1.0), 1.0)
    with pytest.raises(ValueError, match="max_norm=-1; expected a number > 0"):
        clipped.step()
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    shared = strategies.MedianMAD()
    groups = [{"params": [param], "max_norm": shared}, {"params": [other]}]
    with pytest.raises(ValueError, match="two parameter groups share one strategy"):
        ClippedOptimizer(SGD(groups, lr=1.0), shared).step()


SCALED = ["median_mad", "zscore", "ema_per_tensor", "value", "norm_stabilised", "agc"]


@pytest.mark.parametrize("name", SCALED)
def test_a_scaler_changes_nothing_but_the_scale(name: str) -> None:
    """Scaled gradients, with an overflow, are as the unscaled ones with that step left out."""

    def run(scaler: Any) -> tuple[list[nn.Parameter], Any]:
        params = cases.parameters()
        clipped = ClippedOptimizer(AdamW(params, lr=1e-2), STRATEGIES[name]())
        for step in range(12):
            clipped.zero_grad()
            loss = sum((p * g).sum() for p, g in zip(params, gradients(params, step), strict=True))
            if step == 8:
                loss = loss * math.inf
            if scaler is None:
                loss.backward()  # type: ignore[union-attr]
                clipped.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(clipped)
                scaler.update()
        return params, clipped

    expected, reference = run(None)
    for scaler in (
        torch.amp.GradScaler("cpu", init_scale=1024.0),
        fastclip.GradScaler("cpu", init_scale=64.0),
    ):
        found, clipped = run(scaler)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert clipped.stats().skipped == reference.stats().skipped
        assert scaler.get_scale() in (512.0, 32.0)


@pytest.mark.parametrize("name", ["median_mad", "zscore", "per_tensor", "skip"])
def test_a_closure_that_is_evaluated_many_times(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    data, target = torch.randn(32, 4), torch.randn(32, 1)
    clipped = ClippedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.5), STRATEGIES[name]())

    def closure() -> Tensor:
        clipped.zero_grad()
        loss = nn.functional.mse_loss(model(data), target)
        loss.backward()
        return loss

    losses = [float(clipped.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_the_threshold_of_a_step_stays_with_its_outcome() -> None:
    params = cases.parameters()
    clipped = ClippedOptimizer(AdamW(params), strategies.Schedule(lambda step: 4.0 - step))
    kept = []
    for step in range(3):
        train(clipped, params, range(step, step + 1))
        kept.append(clipped.last)
    assert [float(outcome.threshold) for outcome in kept] == [4.0, 3.0, 2.0]  # type: ignore[union-attr, arg-type]
    fixed = ClippedOptimizer(AdamW(params), 1.0)
    train(fixed, params, range(1))
    assert fixed.last is not None
    assert fixed.last.threshold is None


def test_copies_of_an_optimizer_learn_by_themselves() -> None:
    params = cases.parameters()
    clipped = ClippedOptimizer(AdamW(params), strategies.MedianMAD(window=8, warmup=2))
    train(clipped, params, range(4))
    twin = copy.deepcopy(clipped)
    assert twin.max_norm is not clipped.max_norm
    before = repr(clipped.state_dict()["fastclip"])
    train(twin, [p for g in twin.param_groups for p in g["params"]], range(4, 8))
    assert repr(clipped.state_dict()["fastclip"]) == before


def test_a_class_in_the_place_of_a_strategy_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"ClippedOptimizer: max_norm=.*MedianMAD.*; expected a number"):
        ClippedOptimizer(AdamW(cases.parameters()), strategies.MedianMAD)  # type: ignore[arg-type]


CLIPS: dict[str, Callable[[list[nn.Parameter], Any], Any]] = {
    "clip_grad_norm_": lambda params, limit: fastclip.clip_grad_norm_(params, limit),
    "clip_grads_with_norm_": lambda params, limit: fastclip.clip_grads_with_norm_(
        params, limit, fastclip.get_total_norm([p.grad for p in params if p.grad is not None])
    ),
    "wrapper": lambda params, limit: ClippedOptimizer(SGD(params, lr=1.0), limit).step(),
    "wrapper_plain": lambda params, limit: ClippedOptimizer(SGD(params, lr=1.0), limit, fused=False).step(),
    "wrapper_write": lambda params, limit: ClippedOptimizer(
        SGD(params, lr=1.0), limit, write_grads=True
    ).step(),
}


def check_tensor_threshold(backend: str, how: str, limit: float, dtype: torch.dtype) -> None:
    one, two = cases.parameters(), cases.parameters()
    for params in (one, two):
        for param, grad in zip(params, gradients(params, 1), strict=True):
            param.grad = grad
    with fastclip.use_backend(backend):
        CLIPS[how](one, torch.tensor(limit, dtype=dtype))
        CLIPS[how](two, limit)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in one], [p.grad for p in two], rtol=0, atol=0)


LIMITS = [(0.5, torch.float32), (1e6, torch.float64), (math.inf, torch.float32), (2.0, torch.int64)]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize(("limit", "dtype"), LIMITS)
def test_a_tensor_is_as_its_number(backend: str, how: str, limit: float, dtype: torch.dtype) -> None:
    check_tensor_threshold(backend, how, limit, dtype)


@needs_triton
@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize(("limit", "dtype"), LIMITS)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_the_kernels_of_a_device_read_the_tensor(how: str, limit: float, dtype: torch.dtype) -> None:
    check_tensor_threshold("triton", how, limit, dtype)


def test_a_tensor_changed_in_place_counts_in_the_next_step() -> None:
    params = [nn.Parameter(torch.zeros(4))]
    limit = torch.tensor(1.0)
    clipped = ClippedOptimizer(SGD(params, lr=1.0), limit)
    for value in (1.0, 0.25):
        limit.fill_(value)
        params[0].grad = torch.ones(4) * 3
        before = params[0].detach().clone()
        clipped.step()
        assert float((params[0].detach() - before).norm()) == pytest.approx(value, rel=1e-5)


def test_a_tensor_of_several_elements_is_refused() -> None:
    params = cases.parameters()
    for call in (
        lambda: fastclip.clip_grad_norm_(params, torch.ones(2)),
        lambda: ClippedOptimizer(SGD(params, lr=1.0), torch.ones(2)),
        lambda: fastclip.attach(SGD(params, lr=1.0), torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"max_norm is a tensor of shape \(2,\)"):
            call()


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "agc"])
def test_ranks_agree_with_one_process(name: str) -> None:
    found = ranks(2).run(strategies_on_ranks, name)
    for one in found:
        assert one["far"] < 1e-5
        assert one["thresholds"] == found[0]["thresholds"]
        assert one["skipped"] == found[0]["skipped"]
        assert one["route"] == "native"
