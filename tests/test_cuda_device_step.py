"""The folded step on a GPU, by each backend for it: streams, graphs, synchronization."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import optim_cases as cases
import pytest
import torch
from cases import DTYPES, dtype_id
from targets import REAL, Target
from torch.optim import SGD, AdamW

import fastclip
from fastclip.bench.launches import forbidden_waits

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.fixture(params=REAL, ids=str, autouse=True)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.in_force():
        yield request.param


def on_device(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


@pytest.mark.parametrize("option", ["adamw", "sgd_momentum"])
def test_only_a_step_that_makes_state_waits(option: str) -> None:
    params = on_device(cases.parameters())
    clipped = cases.folded(cases.make(option, params))
    steps = list(cases.gradients(4))
    cases.give(params, steps[0])
    clipped.step()
    for number, grads in enumerate(steps[1:]):
        if number == 1:
            grads[0][0, 0] = math.nan
        cases.give(params, grads)
        with forbidden_waits():
            clipped.step()
    assert clipped.stats().skipped == 1


@pytest.mark.parametrize("num_tensors", [3, 2500])
def test_a_graph_of_the_whole_step_replays(num_tensors: int) -> None:
    start = torch.randn(num_tensors, 4, device="cuda")
    lists = [[torch.nn.Parameter(row.clone()) for row in start] for _ in range(2)]
    rates = [torch.tensor(0.1, device="cuda") for _ in lists]
    optimizers = [cases.folded(AdamW(p, lr=lr), max_norm=1.0) for p, lr in zip(lists, rates, strict=True)]
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
    cases.give(params, next(cases.gradients(1)))
    clipped = cases.folded(AdamW(params))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # so that the graph is not empty, of which torch warns
        with pytest.raises(RuntimeError, match="Take one step before it"):
            clipped.step()
    assert not clipped.state


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("option", ["adamw_amsgrad", "sgd_nesterov"])
def test_a_replay_has_the_bits_of_a_step(option: str, dtype: torch.dtype) -> None:
    optimizers = []
    for _ in range(2):
        params = on_device(cases.parameters(dtype))
        cases.give(params, [torch.ones_like(p) for p in params])
        optimizers.append(cases.folded(cases.make(option, params)))
        optimizers[-1].step()  # makes the state
    replayed, stepped = optimizers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for number, grads in enumerate(cases.gradients(4)):
        if number == 2:
            grads[0].fill_(math.inf)
        for optimizer in optimizers:
            for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                param.grad.copy_(grad)
        graph.replay()
        stepped.step()
        states = [[[p.detach(), *state.values()] for p, state in o.state.items()] for o in optimizers]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        assert replayed.stats() == stepped.stats()


def test_checkpoints_of_a_fused_optimizer_go_in_and_out_of_plain_torch() -> None:
    ours, theirs = on_device(cases.parameters()), on_device(cases.parameters())
    clipped, plain = cases.folded(AdamW(ours, fused=True), max_norm=math.inf), AdamW(theirs, fused=True)
    for number, grads in enumerate(cases.gradients(4)):
        if number == 2:
            saved = copy.deepcopy(plain.state_dict())
            plain.load_state_dict(clipped.state_dict())
            clipped.load_state_dict(saved)
            assert all(state["step"].is_cuda for o in (clipped, plain) for state in o.state.values())
        cases.give(ours, grads)
        cases.give(theirs, grads)
        clipped.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {float(state["step"]) for state in clipped.state.values()} == {4.0}


def test_a_side_stream_is_followed() -> None:
    param = torch.nn.Parameter(torch.zeros(2**20, device="cuda"))
    param.grad = torch.zeros_like(param)
    clipped = cases.folded(SGD([param], lr=1.0), max_norm=math.inf)
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
        cases.folded(SGD(params, lr=0.1)).step()
