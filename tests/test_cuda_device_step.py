"""On a GPU: the folded step by each backend for it, beside the oracle; scalers, graphs, synchronization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import optim_cases as cases
import pytest
import torch
from optim_oracle import Oracle
from torch.optim import SGD, Adam, AdamW, Optimizer

import fastclip
from fastclip import ClippedOptimizer
from fastclip.backends import cuda
from fastclip.bench.launches import forbidden_waits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUM_STEPS = 50

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    if reason := cuda.unavailable_reason():
        pytest.skip(f"needs the cuda backend: {reason}")
    with fastclip.use_backend("cuda"):
        yield


def on_device(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def give(params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    cases.give(params, [grad.cuda() for grad in grads])


def native(optimizer: Optimizer, **settings: Any) -> ClippedOptimizer:
    return ClippedOptimizer(optimizer, **{"max_norm": cases.MAX_NORM, "fused": True, **settings})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_is_within_the_bound_of_the_formula(option: str, dtype: torch.dtype) -> None:
    on_host = cases.parameters(dtype)
    params = on_device(on_host)
    clipped = native(cases.make(option, params))
    oracle = Oracle(cases.make(option, on_host), cases.MAX_NORM)
    for grads in cases.gradients(NUM_STEPS):
        give(params, grads)
        oracle.step([p.grad for p in params])
        clipped.step()
        assert clipped.route == "native"
    oracle.assert_near(clipped.optimizer)
    assert clipped.stats().clipped == NUM_STEPS // 2
    for param in params:
        if "step" in clipped.state[param]:
            assert clipped.state[param]["step"].is_cuda
            assert clipped.state[param]["step"] == NUM_STEPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_unaligned_and_many_tensors_are_within_the_bound(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3_000_001, generator=generator).to("cuda", dtype)
    pieces = [memory[:2_000_000], memory[2_000_001:2_900_000], *memory[2_900_000:2_904_000].split(2)]
    params = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    params[1] = torch.nn.Parameter(memory[2_000_001:2_900_000])  # a view at an odd place
    on_host = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    # A norm of 1000 and this eps keep the squares within float16, where the bound says something.
    options, max_norm = {"lr": 1e-2, "eps": 1e-3}, 1000.0
    clipped = native(AdamW(params, **options), max_norm=max_norm)
    oracle = Oracle(AdamW(on_host, **options), max_norm)
    for _ in range(3):
        for param in params:
            param.grad = param.detach().clone()
        oracle.step([p.grad.cpu() for p in params])
        clipped.step()
    # In float64 the oracle has roundings of its own, as many as the step.
    oracle.assert_near(clipped.optimizer, times=2.0 if dtype == torch.float64 else 1.0)


def test_a_nonfinite_step_changes_nothing_and_the_first_makes_no_state() -> None:
    params = on_device(cases.parameters())
    clipped = native(AdamW(params))
    skipped = []
    for number, grads in enumerate(cases.gradients(4)):
        if number in (0, 2):
            grads[2][3, 1] = math.nan
        give(params, grads)
        before = cases.snapshot(params, clipped.optimizer)
        clipped.step()
        skipped.append(bool(clipped.last.skipped))
        if skipped[-1]:
            cases.assert_same(before, cases.snapshot(params, clipped.optimizer))
    assert skipped == [True, False, True, False]
    assert {float(state["step"]) for state in clipped.state.values()} == {2.0}


@pytest.mark.parametrize("option", ["adamw", "sgd_momentum"])
def test_only_a_step_that_makes_state_waits(option: str) -> None:
    params = on_device(cases.parameters())
    clipped = native(cases.make(option, params))
    steps = list(cases.gradients(4))
    give(params, steps[0])
    clipped.step()
    for number, grads in enumerate(steps[1:]):
        if number == 1:
            grads[0][0, 0] = math.nan
        give(params, grads)
        with forbidden_waits():
            clipped.step()
    assert clipped.stats().skipped == 1


@pytest.mark.parametrize("unscale_first", [False, True])
def test_scaled_steps_equal_unscaled_ones_and_overflows_are_left_out(unscale_first: bool) -> None:
    ours, theirs = on_device(cases.parameters()), on_device(cases.parameters())
    clipped, plain = native(Adam(ours, lr=1e-2)), native(Adam(theirs, lr=1e-2))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=100)
    for number, grads in enumerate(cases.gradients(5)):
        if number == 2:
            grads[1].fill_(math.inf)
        clipped.zero_grad()
        loss = sum((p * g.to(p)).sum() for p, g in zip(ours, grads, strict=True))
        scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(clipped)
        scaler.step(clipped)
        scaler.update()
        give(theirs, grads)
        plain.step()
        assert clipped.route == "native"
    assert clipped.stats().skipped == plain.stats().skipped == 1
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tensors", [3, 2500])
def test_a_graph_of_the_whole_step_replays(num_tensors: int) -> None:
    start = torch.randn(num_tensors, 4, device="cuda")
    lists = [[torch.nn.Parameter(row.clone()) for row in start] for _ in range(2)]
    rates = [torch.tensor(0.1, device="cuda") for _ in lists]
    optimizers = [native(AdamW(p, lr=lr), max_norm=1.0) for p, lr in zip(lists, rates, strict=True)]
    grads = torch.ones_like(start)
    for params in lists:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizers[0].step()  # makes the state
    side.synchronize()
    optimizers[1].step()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for number, value in enumerate((3.0, 1e-4, math.nan, 0.5)):
        grads.fill_(value)
        for rate in rates:
            rate.fill_(0.1 / (1 + number))
        graph.replay()
        optimizers[1].step()
        torch.testing.assert_close(*lists, rtol=0, atol=0)
        assert bool(optimizers[0].last.skipped) == (number == 2)
    assert optimizers[0].stats() == optimizers[1].stats()
    assert optimizers[0].stats().steps == 5
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {4.0}


def test_a_capture_without_state_raises() -> None:
    params = on_device(cases.parameters())
    give(params, next(cases.gradients(1)))
    clipped = native(AdamW(params))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # so that the graph is not empty, of which torch warns
        with pytest.raises(RuntimeError, match="Take one step before it"):
            clipped.step()
    assert not clipped.state


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
def test_checkpoints_go_in_and_out_of_plain_torch(options: dict[str, bool]) -> None:
    ours, theirs = on_device(cases.parameters()), on_device(cases.parameters())
    clipped, plain = native(AdamW(ours, **options), max_norm=math.inf), AdamW(theirs, **options)

    def both_step(number: int) -> None:
        for grads in cases.gradients(number):
            give(ours, grads)
            give(theirs, grads)
            clipped.step()
            plain.step()

    both_step(2)
    ours_saved, theirs_saved = clipped.state_dict(), plain.state_dict()
    for index, entry in ours_saved["state"].items():
        assert entry["step"].device == theirs_saved["state"][index]["step"].device
    clipped.load_state_dict(theirs_saved)
    plain.load_state_dict(ours_saved)
    both_step(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {float(state["step"]) for state in clipped.state.values()} == {4.0}


def test_a_side_stream_is_followed() -> None:
    param = torch.nn.Parameter(torch.zeros(2**20, device="cuda"))
    param.grad = torch.zeros_like(param)
    clipped = native(SGD([param], lr=1.0), max_norm=math.inf)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        param.grad += 1
        clipped.step()
    stream.synchronize()
    assert param[-1].item() == -1.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_on_two_devices_are_declined() -> None:
    params = [torch.nn.Parameter(torch.zeros(2, device=f"cuda:{index}")) for index in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(fastclip.BackendUnavailableError, match="is on another device than the first"):
        native(SGD(params, lr=0.1)).step()
