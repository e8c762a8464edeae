"""What is clipped within each gradient: the same by the update on the way and in `.grad`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import cuda_library
import pytest
import torch
from strategy_cases import gradients
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from triton_interpreter import interpreted, needs_triton, noted_launches

import fastclip
from fastclip import ClippedOptimizer, strategies
from fastclip.backends import cpu
from fastclip.kernels import unit_table
from fastclip.strategies import Strategy
from fastclip.strategies.within import Units

__all__ = ["interpreted"]

needs_kernels = pytest.mark.skipif(cpu._C is None, reason="needs the extension")
pytestmark = needs_kernels

CHUNK = 16 * 1024
"""Elements of float32 that the CPU's kernels walk at a time."""


def shapes_around(chunk: int) -> dict[str, tuple[int, ...]]:
    return {
        "units in a chunk": (64, chunk // 160),
        "units over the ends of chunks": (50, chunk // 16),
        "units longer than chunks": (5, 2 * chunk + 7),
        "one unit of several chunks": (3 * chunk + 1,),
        "one unit of two dimensions": (1, chunk + 1),
        "units of one element": (70, 1),
        "convolution": (8, 3, 5, 5),
        "bias": (17,),
        "scalar": (),
        "empty": (0, 4),
        "empty units": (4, 0),
    }


SHAPES = shapes_around(CHUNK)


def weights(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    with torch.no_grad():
        made[0][:1] = 0.0  # a unit that only eps lets move
    return made


def clip_by_hand(strategy: Strategy, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """In float64, by the formulas of the docstrings."""
    for param, grad in zip(params, grads, strict=True):
        unscaled = grad.double()
        if isinstance(strategy, strategies.Value):
            param.grad = unscaled.clamp(-strategy.clip_value, strategy.clip_value).to(grad.dtype)
            continue
        assert isinstance(strategy, strategies.AGC)
        units = unscaled.flatten(1) if grad.dim() > 1 else unscaled.reshape(1, -1)
        of = param.detach().double().reshape(units.shape)
        limit = strategy.clipping * of.norm(dim=1, keepdim=True).clamp(min=strategy.eps)
        factor = (limit / units.norm(dim=1, keepdim=True)).clamp(max=1.0)
        param.grad = (units * factor).reshape(grad.shape).to(grad.dtype)


def check(
    strategy: Strategy,
    shapes: Sequence[tuple[int, ...]],
    kind: type[Optimizer] = AdamW,
    dtype: torch.dtype = torch.float32,
    steps: range = range(6),
    **settings: Any,
) -> None:
    ours, theirs = weights(shapes, dtype), weights(shapes, dtype)
    optimizer = ClippedOptimizer(kind(ours, lr=1e-2), strategy, **settings)  # type: ignore[call-arg]
    reference = kind(theirs, lr=1e-2)  # type: ignore[call-arg]
    rtol, atol = (2e-2, 2e-3) if dtype == torch.bfloat16 else (1e-5, 1e-6)
    for step in steps:
        grads = gradients(theirs, step)
        for param, grad in zip(ours, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert optimizer.route == "native"
        clip_by_hand(strategy, theirs, grads)
        reference.step()
        if settings.get("write_grads"):
            for param, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(param.grad, expected.grad, rtol=rtol, atol=atol)
        else:
            for param, grad in zip(ours, grads, strict=True):
                assert torch.equal(param.grad, grad), "the update alone sees what is clipped"  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("what", SHAPES)
def test_units_of_every_shape(what: str, kind: type[Optimizer], write_grads: bool) -> None:
    check(strategies.AGC(0.02), [SHAPES["units in a chunk"], SHAPES[what]], kind, write_grads=write_grads)


@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("strategy", [strategies.AGC(0.02), strategies.Value(0.05)], ids=["agc", "value"])
def test_every_dtype(strategy: Strategy, dtype: torch.dtype, write_grads: bool) -> None:
    shapes = [(50, 1000), (8, 3, 5, 5), (17,)]
    check(copy.deepcopy(strategy), shapes, dtype=dtype, steps=range(3), write_grads=write_grads)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("strategy", [strategies.AGC(0.02), strategies.Value(0.05)], ids=["agc", "value"])
def test_the_step_measures_on_the_way(
    strategy: Strategy, norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def total_norm(*args: Any) -> None:
        raise AssertionError("the gradients were read once more than the step reads them")

    params = weights([(50, 1000), (3 * CHUNK + 1,), (70, 1)])
    optimizer = ClippedOptimizer(AdamW(params, lr=1e-2), copy.deepcopy(strategy), norm_type=norm_type)
    grads = gradients(params, 0)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    monkeypatch.setattr(cpu, "total_norm", total_norm)
    optimizer.step()
    assert optimizer.last is not None
    expected = torch.cat([grad.double().flatten() for grad in grads]).norm(norm_type)
    assert float(optimizer.last.total_norm) == pytest.approx(float(expected), rel=1e-6)
    check(copy.deepcopy(strategy), [(50, 1000), (17,)], steps=range(2), norm_type=norm_type)


@pytest.mark.parametrize("how", ["fused=False", "hook", "closure", "attach", "scaler"])
@pytest.mark.parametrize("strategy", [strategies.AGC(0.02), strategies.Value(0.05)], ids=["agc", "value"])
def test_other_routes_clip_alike(strategy: Strategy, how: str) -> None:
    ours, theirs = weights([(50, 1000), (17,)]), weights([(50, 1000), (17,)])
    wrapped = AdamW(ours, lr=1e-2)
    if how == "attach":
        fastclip.attach(wrapped, copy.deepcopy(strategy))
        optimizer: Optimizer = wrapped
    else:
        fused = False if how in ("fused=False", "scaler") else None
        optimizer = ClippedOptimizer(wrapped, copy.deepcopy(strategy), fused=fused)
    if how == "hook":
        wrapped.register_step_pre_hook(lambda *_: None)
    reference = ClippedOptimizer(AdamW(theirs, lr=1e-2), copy.deepcopy(strategy))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        grads = gradients(theirs, step)

        def fill(grads: list[Tensor] = grads) -> float:
            scale = 8 if how == "scaler" else 1
            for mine, its, grad in zip(ours, theirs, grads, strict=True):
                mine.grad, its.grad = grad * scale, grad.clone()
            return 0.0

        fill()
        if how == "scaler":
            scaler.step(optimizer)
            scaler.update(8.0)
        elif how == "closure":
            optimizer.step(fill)
        else:
            optimizer.step()
        reference.step()
        assert reference.route == "native"
        assert how in ("attach", "closure") or optimizer.route == "plain"  # type: ignore[attr-defined]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_triton_clamps_on_the_way(kind: type[Optimizer], write_grads: bool) -> None:
    with fastclip.use_backend("triton"):
        check(strategies.Value(0.05), [(8, 5), (7,)], kind, steps=range(2), write_grads=write_grads)


def clipped_by_triton(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of AGC(0.02) by the kernel, in one launch, and by hand; scaled as they came."""
    ours, theirs = weights(shapes, dtype), weights(shapes, dtype)
    grads = gradients(theirs, 0)
    for param, grad in zip(ours, grads, strict=True):
        param.grad = grad * (scale or 1)
    clip_by_hand(strategies.AGC(0.02), theirs, grads)
    launches = noted_launches(monkeypatch)
    with fastclip.use_backend("triton"):
        rule = Units(0.02, 1e-3, [True] * len(ours))
        rule.clip_(ours, None if scale is None else torch.tensor(scale))
    assert launches == ["clip_units_kernel"]
    expected = [None if param.grad is None else param.grad * (scale or 1) for param in theirs]
    return [param.grad for param in ours], expected


@needs_triton
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
class TestUnitsByTriton:
    @pytest.mark.parametrize("what", SHAPES)
    def test_every_shape(self, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Around runs of eight tiles of the interpreter, into which short units are gathered and cut."""
        monkeypatch.setattr(unit_table, "RUN_NUMEL", 1024)
        around = shapes_around(1024)
        shapes = [around["units in a chunk"], around[what]]
        found, expected = clipped_by_triton(shapes, torch.float32, None, monkeypatch)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("scale", [None, 4.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_every_dtype(
        self, dtype: torch.dtype, scale: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, expected = clipped_by_triton([(9, 33), (4, 3, 5, 5), (17,)], dtype, scale, monkeypatch)
        # One rounding of the product against that of the expected gradient.
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)

    def test_what_is_not_finite_stays_in_its_unit(self) -> None:
        param = nn.Parameter(torch.ones(4, 8))
        grad = torch.ones(4, 8)
        grad[0, 0], grad[1, 2], grad[2] = float("nan"), float("inf"), 0.0
        param.grad = grad.clone()
        with fastclip.use_backend("triton"):
            Units(0.5, 1e-3, [True]).clip_([param])
        assert param.grad[0].isnan().all()
        assert param.grad[1, 2].isnan()  # inf * 0
        assert param.grad[1].nan_to_num().abs().sum() == 0
        assert (param.grad[2] == 0).all()
        torch.testing.assert_close(param.grad[3], torch.full((8,), 0.5))

    @pytest.mark.parametrize("how", ["transposed", "sparse", "shared"])
    def test_what_it_does_not_take_goes_to_torch(self, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))]
        params[0].grad = params[1].grad = torch.ones(6, 4)
        if how == "transposed":
            params = [nn.Parameter(torch.randn(4, 6).t())]
            params[0].grad = torch.ones(4, 6).t()
        if how == "sparse":
            params[0].grad = torch.ones(6, 4).to_sparse()
        launches = noted_launches(monkeypatch)
        rule = Units(0.02, 1e-3, [True] * len(params))
        with fastclip.use_backend("triton"):
            if how == "sparse":
                with pytest.raises(ValueError, match="AGC: a gradient is sparse"):
                    rule.clip_(params)
                return
            rule.clip_(params)
        assert launches == []
        assert params[0].grad is not None
        limit = 0.02 * params[0].detach().norm(dim=1)
        assert (params[0].grad.norm(dim=1) <= limit * (1 + 1e-6)).all()

    def test_what_is_left_out_keeps_its_gradient_and_version(self) -> None:
        params = weights([(6, 4), (6, 4)])
        for param in params:
            param.grad = torch.ones(6, 4)
        versions = [param.grad._version for param in params if param.grad is not None]
        with fastclip.use_backend("triton"):
            Units(0.02, 1e-3, [False, True]).clip_(params)
        assert params[0].grad is not None
        assert params[1].grad is not None
        assert (params[0].grad == 1).all()
        assert params[0].grad._version == versions[0]
        assert params[1].grad._version > versions[1]


@pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16")
@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_cuda_clamps_on_the_way(
    kind: type[Optimizer], dtype: torch.dtype, write_grads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_library.take_steps_of_the_cpu(monkeypatch)
    check(strategies.Value(0.05), [(8, 5), (700,)], kind, dtype, write_grads=write_grads)


def test_threads_agree_on_every_bit() -> None:
    """A unit over the end of a chunk is measured before another thread has changed half of its weights."""
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            params = weights([(300, 1000), (7, 3 * CHUNK)])
            optimizer = ClippedOptimizer(AdamW(params, lr=0.5), strategies.AGC(0.02))
            for step in range(4):
                for param, grad in zip(params, gradients(params, step), strict=True):
                    param.grad = grad
                optimizer.step()
            found.append(params)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("strategy", [strategies.AGC(0.02), strategies.Value(0.05)], ids=["agc", "value"])
def test_a_scale_is_taken_off_before(strategy: Strategy) -> None:
    ours, theirs = weights([(50, 1000), (17,)]), weights([(50, 1000), (17,)])
    optimizer = ClippedOptimizer(AdamW(ours, lr=1e-2, fused=True), copy.deepcopy(strategy))
    reference = ClippedOptimizer(AdamW(theirs, lr=1e-2, fused=True), copy.deepcopy(strategy))
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale(torch.zeros(()))
    for step in range(4):
        for ours_p, theirs_p, grad in zip(ours, theirs, gradients(theirs, step), strict=True):
            ours_p.grad, theirs_p.grad = grad * 512, grad
        scaler.step(optimizer)  # type: ignore[arg-type]
        scaler.update(512.0)
        reference.step()
        assert optimizer.route == reference.route == "native"
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("make", [strategies.AGC, strategies.Value])
@pytest.mark.parametrize("write_grads", [False, True])
def test_autograd_is_told_of_what_is_written(make: Any, write_grads: bool) -> None:
    params = weights([(50, 1000)])
    optimizer = ClippedOptimizer(AdamW(params, lr=1e-2), make(0.01), write_grads=write_grads)
    params[0].grad = torch.ones(50, 1000)
    before = params[0].grad._version
    optimizer.step()
    assert (params[0].grad._version > before) == write_grads


@pytest.mark.parametrize("make", [strategies.AGC, strategies.Value])
def test_a_step_left_out_leaves_everything(make: Any) -> None:
    params = weights([(50, 1000)])
    optimizer = ClippedOptimizer(AdamW(params, lr=1e-2), make(), write_grads=True)
    before = params[0].detach().clone()
    grad = torch.ones(50, 1000)
    grad[7, 3] = float("nan")
    params[0].grad = grad.clone()
    optimizer.step()
    assert optimizer.stats().skipped == 1
    assert torch.equal(params[0], before)
    torch.testing.assert_close(params[0].grad, grad, rtol=0, atol=0, equal_nan=True)


def test_units_that_do_not_lie_one_behind_the_other() -> None:
    """A transposed weight has its units in stripes; channels_last has them as any other weight does."""
    start = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    images = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    for value, other in (
        (start, start.t().contiguous().t()),
        (images, images.to(memory_format=torch.channels_last)),
    ):
        found = []
        for laid_out in (value, other):
            param = nn.Parameter(laid_out.clone(memory_format=torch.preserve_format))
            optimizer = ClippedOptimizer(AdamW([param], lr=1e-2), strategies.AGC(0.02))
            for step in range(3):
                param.grad = torch.empty_like(param).copy_(gradients([nn.Parameter(value)], step)[0])
                optimizer.step()
            found.append(param)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_names_to_leave_alone() -> None:
    params = weights([(20, 30), (20, 30)])
    named = [("body.weight", params[0]), ("head.weight", params[1])]
    optimizer = ClippedOptimizer(SGD(named, lr=1.0), strategies.AGC(0.01, exclude=["head.*"]))
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.route == "native"
    torch.testing.assert_close(before[1] - params[1], torch.ones(20, 30))
    moved = (before[0] - params[0]).norm(dim=1)
    torch.testing.assert_close(moved, 0.01 * before[0].norm(dim=1).clamp(min=1e-3), rtol=1e-4, atol=1e-6)


def test_each_group_has_its_own() -> None:
    params, theirs = weights([(20, 30), (9, 4)]), weights([(20, 30), (9, 4)])
    groups = [
        {"params": [params[0]], "max_norm": strategies.AGC(0.02)},
        {"params": [params[1]], "max_norm": strategies.Value(0.05)},
    ]
    optimizer = ClippedOptimizer(SGD(groups, lr=0.1), 1.0)
    reference = SGD(theirs, lr=0.1)
    for step in range(3):
        grads = gradients(theirs, step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        for rule, i in ((strategies.AGC(0.02), 0), (strategies.Value(0.05), 1)):
            clip_by_hand(rule, [theirs[i]], [grads[i]])
        reference.step()
        torch.testing.assert_close(params, theirs, rtol=1e-5, atol=1e-6)
