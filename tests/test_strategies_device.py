"""On a GPU: strategies and threshold tensors beside the same on the CPU; graphs, synchronization."""

from __future__ import annotations

import math

import optim_cases as cases
import pytest
import torch
from strategy_cases import STRATEGIES, gradients
from torch.optim import AdamW

import fastclip
from fastclip import ClippedOptimizer, strategies
from fastclip.bench.launches import forbidden_waits

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WITHOUT_A_WAIT = [name for name in STRATEGIES if name != "schedule"]
"""A schedule is asked on the host, which copies a number and waits for nothing, but allocates."""


def pair() -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    on_host = cases.parameters()
    return [torch.nn.Parameter(p.detach().cuda()) for p in on_host], on_host


def give(
    ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], step: int, bad: bool = False
) -> None:
    grads = gradients(theirs, step)
    if bad:
        grads[0][0] = math.nan
    cases.give(ours, [grad.cuda() for grad in grads])
    cases.give(theirs, grads)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_steps_are_those_of_the_cpu(name: str, backend: str) -> None:
    ours, theirs = pair()
    on_device = ClippedOptimizer(AdamW(ours, lr=1e-2), STRATEGIES[name](), fused=True)
    on_host = ClippedOptimizer(AdamW(theirs, lr=1e-2), STRATEGIES[name](), fused=True)
    for step in range(20):
        give(ours, theirs, step, bad=step == 13)
        with fastclip.use_backend(backend):
            on_device.step()
        on_host.step()
        assert on_device.last is not None
        assert on_host.last is not None
        assert bool(on_device.last.skipped) == bool(on_host.last.skipped), f"step {step}"
    assert on_device.route == "native"
    torch.testing.assert_close([p.cpu() for p in ours], [p.detach() for p in theirs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT_A_WAIT)
def test_no_step_waits(name: str) -> None:
    ours, theirs = pair()
    optimizer = ClippedOptimizer(AdamW(ours, lr=1e-2), STRATEGIES[name](), fused=True)
    for step in range(8):
        give(ours, theirs, step)
        optimizer.step()
    give(ours, theirs, 8)
    torch.cuda.synchronize()
    with forbidden_waits():
        optimizer.step()


@pytest.mark.parametrize("name", ["median_mad", "percentile_window", "quantile_servo", "zscore", "ema"])
def test_a_captured_step_goes_on_learning(name: str) -> None:
    ours, theirs = pair()
    captured = ClippedOptimizer(AdamW(ours, lr=torch.tensor(1e-2, device="cuda")), STRATEGIES[name]())
    eager = ClippedOptimizer(AdamW(theirs, lr=1e-2), STRATEGIES[name]())
    give(ours, theirs, 0)
    grads = [p.grad for p in ours]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()  # makes state, tables and compiled kernels
    torch.cuda.current_stream().wait_stream(stream)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 15):
        fresh = gradients(theirs, step)
        cases.give(theirs, fresh)
        for grad, new in zip(grads, fresh, strict=True):
            grad.copy_(new)  # type: ignore[union-attr]
        graph.replay()
        eager.step()
    torch.testing.assert_close([p.cpu() for p in ours], [p.detach() for p in theirs], rtol=1e-4, atol=1e-5)


def test_a_graph_reads_the_threshold_that_is_written() -> None:
    param = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    param.grad = torch.full_like(param, 3.0)
    limit = torch.tensor(1.0, device="cuda")
    fastclip.clip_grad_norm_([param], limit)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastclip.clip_grad_norm_([param], limit)
    for value in (1.0, 0.25, 8.0):
        limit.fill_(value)
        param.grad.fill_(3.0)
        graph.replay()
        assert float(param.grad.norm()) == pytest.approx(min(value, 6.0), rel=1e-5)


def test_a_strategy_moves_with_its_gradients() -> None:
    strategy = strategies.MedianMAD(window=8, warmup=2)
    on_host = torch.nn.Parameter(torch.zeros(4))
    on_host.grad = torch.ones(4)
    strategy.clip_grad_norm_([on_host])
    on_device = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    on_device.grad = torch.ones(4, device="cuda")
    strategy.clip_grad_norm_([on_device])
    assert strategy.state_dict()["window"].device.type == "cuda"
    assert int(strategy.state_dict()["window"].isnan().logical_not().sum()) == 2
