"""The three ways to clip and step: which one is taken, and that all of them equal torch's clip and step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import optim_cases as cases
import pytest
import torch
from optim_oracle import Oracle
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop

import fastclip
from fastclip import ClippedOptimizer
from fastclip.backends import cpu

needs_extension = pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built")


class SubclassedAdamW(AdamW):
    """Takes torch's step, but is not exactly AdamW."""


class OwnStepAdamW(AdamW):
    """Has a step that knows nothing of grad_scale."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


def clipped(optimizer: Optimizer, **settings: Any) -> ClippedOptimizer:
    return ClippedOptimizer(optimizer, **{"max_norm": cases.MAX_NORM, **settings})


@needs_extension
@pytest.mark.parametrize(
    ("make", "settings", "route"),
    [
        (AdamW, {}, "native"),
        (lambda p: AdamW(p, fused=True), {}, "native"),
        (lambda p: AdamW(p, foreach=True), {}, "native"),
        (lambda p: SGD(p, lr=0.1), {"norm_type": 1}, "native"),
        (lambda p: SGD(p, lr=0.1, fused=True), {"norm_type": -1}, "torch_fused"),
        (lambda p: SubclassedAdamW(p, fused=True), {}, "torch_fused"),
        (lambda p: Adagrad(p, fused=True), {}, "torch_fused"),
        (SubclassedAdamW, {}, "plain"),
        (lambda p: OwnStepAdamW(p, fused=True), {}, "plain"),
        (RMSprop, {}, "plain"),
        (lambda p: AdamW(p, differentiable=True), {}, "plain"),
        (AdamW, {"fused": False}, "plain"),
    ],
)
def test_the_best_route_is_taken(make: Callable[..., Optimizer], settings: Any, route: str) -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    optimizer = clipped(make(params), **settings)
    assert optimizer.route is None
    for param in params:
        param.requires_grad_(False)  # torch's differentiable step refuses leaves that do
    optimizer.step()
    assert optimizer.route == route


# Without 16-bit SGD: torch 2.13's fused CPU kernel leaves most elements of such a parameter as they are.
FUSED = [
    (option, dtype)
    for option, (kind, _) in cases.OPTIONS.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if kind is not SGD or dtype == torch.float32
]


@pytest.mark.parametrize(("option", "dtype"), FUSED, ids=str)
def test_torchs_fused_route_is_within_the_bound(option: str, dtype: torch.dtype) -> None:
    params = cases.parameters(dtype)
    inner = cases.make(option, params, fused=True)
    optimizer = clipped(inner)
    inner.register_step_pre_hook(lambda *_: None)  # what keeps fastclip's kernels out
    oracle = Oracle(inner, cases.MAX_NORM)
    for grads in cases.gradients(50):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        optimizer.step()
        assert optimizer.route == "torch_fused"
    oracle.assert_near(inner)
    assert not hasattr(inner, "grad_scale")
    assert not hasattr(inner, "found_inf")


@pytest.mark.parametrize("option", cases.OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plain_route_is_within_the_bound(option: str, dtype: torch.dtype) -> None:
    params = cases.parameters(dtype)
    optimizer = clipped(cases.make(option, params), fused=False)
    oracle = Oracle(optimizer.optimizer, cases.MAX_NORM)
    for grads in cases.gradients(50):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        optimizer.step()
    assert optimizer.route == "plain"
    oracle.assert_near(optimizer.optimizer)


@pytest.mark.parametrize("kind", [RMSprop, torch.optim.NAdam, torch.optim.Rprop, torch.optim.Adagrad])
def test_any_other_optimizer_equals_clip_and_step(kind: type[Optimizer]) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, plain = clipped(kind(ours)), kind(theirs)
    for grads in cases.gradients(8):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        optimizer.step()
        fastclip.clip_grad_norm_(theirs, cases.MAX_NORM)
        plain.step()
    cases.assert_same(cases.snapshot(theirs, plain), cases.snapshot(ours, optimizer.optimizer))


@pytest.mark.parametrize("option", cases.OPTIONS)
@pytest.mark.parametrize("more", [{}, {"fused": True}, {"foreach": False}], ids=["default", "fused", "loop"])
def test_first_step_makes_the_state_that_torch_makes(option: str, more: dict[str, Any]) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    grads = next(cases.gradients(1))
    cases.give(ours, grads)
    cases.give(theirs, grads)
    optimizer, plain = clipped(cases.make(option, ours, **more)), cases.make(option, theirs, **more)
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
    plain.step()
    assert list(optimizer.state_dict()["state"]) == list(plain.state_dict()["state"])
    for mine, torchs in zip(ours, theirs, strict=True):
        got, want = optimizer.state[mine], plain.state[torchs]
        assert list(got) == list(want)
        for name in want:
            assert (got[name].dtype, got[name].device) == (want[name].dtype, want[name].device)
            assert got[name].stride() == want[name].stride()
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)


def test_groups_have_their_own_options_and_one_norm() -> None:
    ours, theirs = cases.parameters(), cases.parameters()

    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "lr": 0.1},
            {"params": params[2:], "weight_decay": 0.5, "momentum": 0.9, "nesterov": True},
        ]

    optimizer, plain = clipped(SGD(groups(ours), lr=0.01)), SGD(groups(theirs), lr=0.01)
    for grads in cases.gradients(5):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
        plain.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


def test_mixed_dtypes_share_one_norm() -> None:
    params = [
        *cases.parameters(torch.float32),
        *cases.parameters(torch.bfloat16),
        *cases.parameters(torch.float64),
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    before = [p.detach().clone() for p in params]
    optimizer = clipped(SGD(params, lr=1.0), max_norm=1.0)
    optimizer.step()
    coef = 1.0 / sum(p.numel() for p in params) ** 0.5
    assert optimizer.last.total_norm.dtype == torch.float64
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), (start.double() - coef).to(param.dtype))


def test_fused_is_a_demand() -> None:
    params = cases.parameters()
    with pytest.raises(fastclip.BackendUnavailableError, match=r"kernels: .*RMSprop; torch's fused step: "):
        clipped(RMSprop(params), fused=True)
    with fastclip.use_backend("eager"):
        optimizer = clipped(AdamW(params), fused=True)
        cases.give(params, next(cases.gradients(1)))
        before = cases.snapshot(params, optimizer.optimizer)
        with pytest.raises(fastclip.BackendUnavailableError, match="'eager' was chosen"):
            optimizer.step()
    cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))


def test_sparse_gradients_are_clipped_by_the_plain_route() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    want = table.weight.detach().clone()
    optimizer = clipped(SGD(table.parameters(), lr=1.0), max_norm=1.0)
    table(torch.tensor([1, 1, 7])).sum().backward()
    optimizer.step()
    want[1] -= 2 / 20**0.5
    want[7] -= 1 / 20**0.5
    assert optimizer.route == "plain"
    torch.testing.assert_close(optimizer.last.total_norm, torch.tensor(20.0).sqrt())
    torch.testing.assert_close(table.weight.detach(), want)


@pytest.mark.parametrize("clip", [ClippedOptimizer, fastclip.attach])
def test_torchs_fused_step_writes_no_gradient_with_gaps(clip: Callable[..., Any]) -> None:
    param = torch.nn.Parameter(torch.zeros(2, 2))
    memory = torch.ones(2, 4)
    param.grad = memory[:, ::2]
    optimizer = AdamW([param], fused=True)
    clipped = clip(optimizer, 1.0)
    clipped.optimizer.step() if clip is fastclip.attach else clipped.step()
    torch.testing.assert_close(memory, torch.tensor([0.5, 1.0] * 4).reshape(2, 4))


@pytest.mark.parametrize(
    "clip", [lambda o: ClippedOptimizer(o, 0.5, write_grads=True), lambda o: fastclip.attach(o, 0.5)]
)
def test_torchs_fused_step_divides_no_gradient_twice(clip: Callable[[Optimizer], Any]) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(2)) for _ in range(2)] for _ in range(2))
    optimizer, plain = SGD(ours, 1.0, fused=True), SGD(theirs, 1.0)
    clipped = clip(optimizer)
    for params in (ours, theirs):
        params[0].grad = params[1].grad = torch.ones(2)
    clipped.step() if isinstance(clipped, Optimizer) else optimizer.step()
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    plain.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs])


def test_an_optimizers_own_hooks_run() -> None:
    params, seen = cases.parameters(), []
    inner = AdamW(params)
    inner.register_step_pre_hook(lambda *_: seen.append("pre"))
    inner.register_step_post_hook(lambda *_: seen.append("post"))
    cases.give(params, next(cases.gradients(1)))
    clipped(inner).step()
    assert seen == ["pre", "post"]


def test_state_in_another_dtype_or_place_goes_to_torch() -> None:
    params = cases.parameters()
    optimizer = clipped(AdamW(params), fused=None)
    cases.give(params, next(cases.gradients(1)))
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].to("meta")
    before = copy.deepcopy(optimizer.state[params[1]]["step"])
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()  # as torch's own does
    assert optimizer.state[params[1]]["step"] in (before, before + 1)
    optimizer = clipped(AdamW(params), fused=True)
    optimizer.state[params[0]] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3)}
    with pytest.raises(fastclip.BackendUnavailableError, match="group 0: its exp_avg has another"):
        optimizer.step()
