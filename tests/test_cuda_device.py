"""Clipping on a GPU, by each backend for it: streams, graphs, synchronization."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from cases import BY_NAME, parameters_of
from targets import REAL, Target

import fastclip
from fastclip.bench.launches import forbidden_waits

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda


@pytest.fixture(params=REAL, ids=str, autouse=True)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.in_force():
        yield request.param


def test_a_side_stream_is_followed() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grad = torch.zeros(2**24, device="cuda")
        torch.cuda._sleep(50_000_000)
        grad += 1
        norm = fastclip.clip_grad_norm_(parameters_of([grad]), 1.0)
    stream.synchronize()
    assert norm.item() == 4096.0
    assert grad[-1].item() == pytest.approx(1 / 4096, rel=1e-6)


@pytest.mark.parametrize("num_tensors", [3, 3000])
def test_a_graph_replays_with_new_gradients(num_tensors: int) -> None:
    grads = list(torch.ones(num_tensors * 8, device="cuda").split(8))
    parameters = parameters_of(grads)
    clip = functools.partial(fastclip.clip_grad_norm_, parameters, 1.0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        clip()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip()
    for value in (2.0, 0.5, 8.0):
        torch._foreach_zero_(grads)
        torch._foreach_add_(grads, value)
        graph.replay()
        expected = value * (num_tensors * 8) ** 0.5
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        assert grads[-1][-1].item() == pytest.approx(value / max(expected, 1.0), rel=1e-5)


def test_clipping_does_not_synchronize() -> None:
    parameters = BY_NAME["1200_tiny"].parameters("cuda", torch.bfloat16)
    fastclip.clip_grad_norm_(parameters, 1.0)
    with forbidden_waits():
        fastclip.clip_grad_norm_(parameters, 1e-3)
