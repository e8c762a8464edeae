"""On a GPU: every backend for it, dtype and case beside the oracle; streams, graphs, synchronization."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import tolerance
import torch
from cases import BY_NAME, DTYPES, NORM_TYPES, Case, dtype_id, parameters_of, present, select

import fastclip
from fastclip import reference
from fastclip.bench.launches import forbidden_waits

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = [name for name in fastclip.backend_info() if name not in ("cpu", "eager")]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    info = fastclip.backend_info()[request.param]
    if not info.available:
        pytest.skip(f"needs the {request.param} backend: {info.reason}")
    with fastclip.use_backend(request.param):
        yield request.param


def bound(tensors: list[torch.Tensor], norm_type: float) -> float:
    numel = sum(t.numel() for t in tensors)
    return max((tolerance.norm(t.dtype, numel, norm_type, "cuda") for t in tensors), default=0.0)


@every_dtype
@pytest.mark.parametrize("case", select(dense=True), ids=lambda case: case.name)
def test_norms_and_clipping(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = case.tensors("cuda", dtype)
    for norm_type in NORM_TYPES:
        if norm_type == math.inf and case.has_empty:
            continue
        want = case.oracle_norm(dtype, norm_type)
        norm = fastclip.get_total_norm(tensors, norm_type)
        tolerance.assert_norm(norm, want, bound(tensors, norm_type), f"p={norm_type:g}")
        parameters = case.parameters("cuda", dtype)
        if case.aliased and backend == "triton":
            with pytest.raises(fastclip.BackendUnavailableError, match="two gradients share memory"):
                fastclip.clip_grad_norm_(parameters, 0.7, norm_type)
            continue
        returned = fastclip.clip_grad_norm_(parameters, 0.7, norm_type)
        torch.testing.assert_close(returned, norm, rtol=0, atol=0, equal_nan=True)
        if case.aliased:
            continue
        coefficient = reference.clip_coefficient(want, 0.7)
        relative = bound(tensors, norm_type)
        for parameter, before in zip(present(p.grad for p in parameters), tensors, strict=True):
            scaled = before.to("cpu", torch.float64) * coefficient
            tolerance.assert_scaled(parameter, before, scaled, tolerance.scaled(parameter.dtype, relative))


@every_dtype
@pytest.mark.parametrize("case", select(dense=True), ids=lambda case: case.name)
def test_measuring_each_gradient(case: Case, dtype: torch.dtype) -> None:
    parameters, tensors = case.parameters("cuda", dtype), case.tensors("cpu", dtype)
    for norm, tensor in zip(fastclip.grad_norms(parameters), tensors, strict=True):
        tolerance.assert_norm(norm, reference.total_norm([tensor]), bound([tensor], 2.0))
    named = [(str(i), p) for i, p in enumerate(parameters) if p.grad is not None]
    wanted = {name: (int(p.grad.isnan().sum()), int(p.grad.isinf().sum())) for name, p in named}
    assert fastclip.find_nonfinite(named) == {name: counts for name, counts in wanted.items() if any(counts)}


@every_dtype
@pytest.mark.parametrize("case", select(dense=True, aliased=False), ids=lambda case: case.name)
def test_clamping(case: Case, dtype: torch.dtype) -> None:
    parameters, expected = case.parameters("cuda", dtype), case.parameters("cuda", dtype)
    if not case.tensors("cpu", dtype):
        return
    fastclip.clip_grad_value_(parameters, 0.3)
    torch.nn.utils.clip_grad_value_(expected, 0.3)
    for actual, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=0, atol=0, equal_nan=True)


def test_results_are_the_same_on_every_run() -> None:
    for name in ("many_chunks", "1200_tiny", "mixed_dtypes", "misaligned"):
        tensors = BY_NAME[name].tensors("cuda", torch.float32)
        assert len({fastclip.get_total_norm(tensors).item() for _ in range(20)}) == 1, name


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


def test_a_nonfinite_norm_raises_and_changes_nothing() -> None:
    grad = torch.tensor([1.0, math.nan, 2.0], device="cuda")
    with pytest.raises(RuntimeError, match="non-finite"):
        fastclip.clip_grad_norm_(parameters_of([grad]), 0.1, error_if_nonfinite=True)
    assert str(grad.tolist()) == "[1.0, nan, 2.0]"
