"""The step on a CUDA device, all of it from Python to the kernels, over an emulated one."""

from __future__ import annotations

import copy
import math
from typing import Any

import cuda_library
import optim_cases as cases
import pytest
import tolerance
import torch
from cuda_library import Library
from optim_oracle import Oracle
from torch.optim import SGD, AdamW

import fastclip
from fastclip import ClippedOptimizer, reference
from fastclip.backends import Declined, cpu
from fastclip.optim.native import cuda
from fastclip.optim.outcome import Outcome, Tally
from fastclip.optim.settings import Amp, Settings

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUM_STEPS = 50
LAUNCHES = 3
SETTINGS = Settings(cases.MAX_NORM)

pytestmark = [
    pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16"),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return cuda_library.take_steps_of_the_cpu(monkeypatch)


def native(optimizer: torch.optim.Optimizer, **settings: Any) -> ClippedOptimizer:
    return ClippedOptimizer(optimizer, **{"max_norm": cases.MAX_NORM, "fused": True, **settings})


def taken(outcome: Outcome | Declined) -> Outcome:
    assert isinstance(outcome, Outcome), outcome
    return outcome


@every_dtype
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_is_within_the_bound_of_the_formula(option: str, dtype: torch.dtype, library: Library) -> None:
    params = cases.parameters(dtype)
    clipped = native(cases.make(option, params))
    oracle = Oracle(clipped.optimizer, cases.MAX_NORM)
    for number, grads in enumerate(cases.gradients(NUM_STEPS)):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        before = library.num_launches
        clipped.step()
        # The table of the first step is there already if an earlier test's tensors lay at the same addresses.
        uploads = (0, 1) if number == 0 else (0,)
        assert library.num_launches - before - LAUNCHES in uploads
    assert clipped.route == "native"
    oracle.assert_near(clipped.optimizer)
    assert clipped.stats().clipped == NUM_STEPS // 2
    for param in params:
        if "step" in clipped.state[param]:
            assert clipped.state[param]["step"] == NUM_STEPS


@pytest.mark.parametrize("option", ["adamw_amsgrad", "adam_coupled_decay", "sgd_nesterov"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_takes_float32_state_of_16_bit_parameters(option: str, dtype: torch.dtype) -> None:
    params = cases.parameters(dtype)
    clipped = native(cases.make(option, params))
    oracle = Oracle(clipped.optimizer, cases.MAX_NORM)
    for grads in cases.gradients(8):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        clipped.step()
        for state in clipped.state.values():
            state.update({name: value.float() for name, value in state.items()})
    assert clipped.route == "native"
    oracle.assert_near(clipped.optimizer)


@pytest.mark.parametrize("option", ["adamw", "sgd_dampening"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_step_changes_nothing_and_the_first_makes_no_state(option: str, bad: float) -> None:
    params = cases.parameters()
    clipped = native(cases.make(option, params))
    skipped = []
    for number, grads in enumerate(cases.gradients(4)):
        if number in (0, 2):
            grads[2][3, 1] = bad
        cases.give(params, grads)
        before = cases.snapshot(params, clipped.optimizer)
        clipped.step()
        skipped.append(bool(clipped.last.skipped))
        assert clipped.route == "native"
        if skipped[-1]:
            cases.assert_same(before, cases.snapshot(params, clipped.optimizer))
    assert skipped == [True, False, True, False]
    assert clipped.stats().consecutive_skips == 0
    if option == "adamw":
        assert {float(state["step"]) for state in clipped.state.values()} == {2.0}


def test_propagating_does_what_torch_does() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    grads = next(cases.gradients(1))
    grads[0][0, 0] = math.nan
    clipped, plain = native(AdamW(ours), nonfinite="propagate"), AdamW(theirs)
    cases.give(ours, grads)
    cases.give(theirs, grads)
    clipped.step()
    torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
    plain.step()
    assert not clipped.last.skipped
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert all(p.isnan().all() for p in ours)


@pytest.mark.parametrize("option", ["adamw", "sgd_momentum"])
def test_unscales_on_the_way(option: str) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    scaled, unscaled = cases.make(option, ours), cases.make(option, theirs)
    amp = Amp(torch.tensor(2.0**10), torch.tensor(0.0))
    for grads in cases.gradients(4):
        cases.give(ours, [g * 2**10 for g in grads])
        cases.give(theirs, grads)
        got = taken(cuda.step(scaled, SETTINGS, amp, Tally(), None))
        wanted = taken(cuda.step(unscaled, SETTINGS, Amp(), Tally(), None))
        assert got.numbers() == wanted.numbers()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_scalers_verdict_skips_on_the_device() -> None:
    params = cases.parameters()
    optimizer = AdamW(params)
    cases.give(params, next(cases.gradients(1)))
    found = Amp(torch.tensor(4.0), torch.tensor(1.0))
    before = cases.snapshot(params, optimizer)
    for settings in (SETTINGS, Settings(1.0, nonfinite="propagate")):
        assert taken(cuda.step(optimizer, settings, found, Tally(), None)).skipped
        cases.assert_same(before, cases.snapshot(params, optimizer))
    assert not taken(cuda.step(optimizer, SETTINGS, Amp(), Tally(), None)).skipped


@every_dtype
@pytest.mark.parametrize("max_norm", [1.0, 1e9])
@pytest.mark.parametrize("option", ["adamw_maximize", "sgd_momentum"])
def test_write_grads_leaves_what_torch_leaves(option: str, max_norm: float, dtype: torch.dtype) -> None:
    params = cases.parameters(dtype)
    grads = next(cases.gradients(1))
    cases.give(params, grads)
    before = [p.grad.clone() for p in params]
    wanted = reference.clipped(before, max_norm)
    version = params[0].grad._version
    clipped = native(cases.make(option, params), max_norm=max_norm, write_grads=True)
    oracle = Oracle(clipped.optimizer, max_norm)
    oracle.step(before)
    clipped.step()
    assert params[0].grad._version > version
    relative = tolerance.scaled(dtype, tolerance.norm(dtype, sum(p.numel() for p in params), 2.0, "cuda"))
    for param, start, want in zip(params, before, wanted, strict=True):
        tolerance.assert_scaled(param.grad, start, want, relative)
    oracle.assert_near(clipped.optimizer)


@every_dtype
@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize(("offset", "grad_offset"), [(0, 0), (1, 1), (3, 3), (0, 1), (1, 0)])
def test_takes_every_length_and_start(
    offset: int, grad_offset: int, write_grads: bool, dtype: torch.dtype
) -> None:
    tile = 16 * 1024 // dtype.itemsize
    for numel in (0, 1, 7, 8, 9, 255, 256, 257, tile - 1, tile, 3 * tile + 5):
        generator = torch.Generator().manual_seed(numel)
        memory = torch.randn(2, numel + 16, generator=generator).to(dtype)
        guard = memory.clone()
        param = torch.nn.Parameter(memory[0, offset : offset + numel])
        param.grad = memory[1, grad_offset : grad_offset + numel]
        other = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        other.grad = torch.ones(3, dtype=dtype)
        optimizer = native(SGD([param, other], lr=0.5, momentum=0.9), max_norm=1.0, write_grads=write_grads)
        coef = reference.clip_coefficient(reference.total_norm([param.grad, other.grad]), 1.0)
        start, grad = guard[0, offset : offset + numel], guard[1, grad_offset : grad_offset + numel]
        want = guard.double()
        want[0, offset : offset + numel] -= 0.5 * coef * grad.double()
        if write_grads:
            want[1, grad_offset : grad_offset + numel] *= coef
        optimizer.step()
        assert optimizer.route == "native"
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(memory.double(), want, rtol=eps, atol=2 * eps)
        for row, at in ((0, offset), (1, grad_offset)):
            assert torch.equal(memory[row, :at], guard[row, :at])
            assert torch.equal(memory[row, at + numel :], guard[row, at + numel :])
        assert start.shape == param.shape


def test_takes_mixed_dtypes_as_it_takes_each(library: Library) -> None:
    grads = next(cases.gradients(1))
    mixed = [p for dtype in DTYPES for p in cases.parameters(dtype)]
    together = native(AdamW(mixed), max_norm=math.inf)
    cases.give(mixed, grads * len(DTYPES))
    together.step()
    assert together.last.total_norm.dtype == torch.float64
    for number, dtype in enumerate(DTYPES):
        alone = cases.parameters(dtype)
        cases.give(alone, grads)
        native(AdamW(alone), max_norm=math.inf).step()
        here = mixed[number * len(alone) : (number + 1) * len(alone)]
        torch.testing.assert_close(here, alone, rtol=0, atol=0)


def test_two_thousand_tiny_tensors_take_three_launches(library: Library) -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2000)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = native(AdamW(params, lr=0.5), max_norm=1.0)
    optimizer.step()  # state and tables
    before = library.num_launches
    optimizer.step()
    assert library.num_launches - before == LAUNCHES
    torch.testing.assert_close(params[0].detach(), params[-1].detach(), rtol=0, atol=0)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("num_groups", [3, 33, 512, 1100])
def test_every_group_has_its_own_options(num_groups: int, library: Library) -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2)) for _ in range(1 + number % 2)], "lr": 1.0 + number}
        for number in range(num_groups)
    ]
    for group in groups:
        for param in group["params"]:
            param.grad = torch.ones(2)
    optimizer = native(SGD(groups, lr=0.1), max_norm=math.inf)
    optimizer.step()
    before = library.num_launches
    optimizer.step()
    assert library.num_launches - before == LAUNCHES + (num_groups - 1) // 512
    for number, group in enumerate(groups):
        for param in group["params"]:
            assert param.tolist() == [-2.0 * (1 + number)] * 2


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_clips_by_every_norm(norm_type: float) -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    norm = reference.total_norm([p.grad for p in params], norm_type)
    before = [p.detach().clone() for p in params]
    optimizer = native(SGD(params, lr=1.0), max_norm=norm / 4, norm_type=norm_type)
    optimizer.step()
    torch.testing.assert_close(float(optimizer.last.total_norm), norm, rtol=1e-6, atol=0)
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), start - param.grad / 4, rtol=1e-5, atol=1e-6)


def test_a_norm_beyond_float32_clips_and_is_no_reason_to_skip() -> None:
    param = torch.nn.Parameter(torch.zeros(1000))
    param.grad = torch.full((1000,), 3e38)
    optimizer = native(SGD([param], lr=1.0), max_norm=1.0)
    optimizer.step()
    assert (float(optimizer.last.total_norm), bool(optimizer.last.skipped)) == (math.inf, False)
    assert param.detach().double().norm().item() == pytest.approx(1.0, rel=1e-5)


def test_takes_permuted_layouts_and_counters_of_either_type() -> None:
    weight = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    clipped, plain = native(AdamW([ours]), max_norm=math.inf), AdamW([theirs])
    for _ in range(3):
        ours.grad = torch.randn_like(weight)
        theirs.grad = ours.grad.clone()
        clipped.step()
        plain.step()
        clipped.state[ours]["step"] = clipped.state[ours]["step"].double()
    assert clipped.route == "native"
    assert float(clipped.state[ours]["step"]) == 3.0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_tells_autograd_and_leaves_gradients_alone() -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    grads, versions = copy.deepcopy([p.grad for p in params]), [p._version for p in params]
    native(AdamW(params), max_norm=1.0).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


def test_a_step_without_gradients_is_none() -> None:
    params = cases.parameters()
    optimizer = native(AdamW(params))
    optimizer.step()
    assert optimizer.route == "native"
    assert not optimizer.state
    assert optimizer.stats().clipped == 0


def test_declines_with_the_reason() -> None:
    memory = torch.randn(10)
    pair = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[4:])]
    for param in pair:
        param.grad = torch.ones_like(param)
    with pytest.raises(fastclip.BackendUnavailableError, match="cuda: two parameters share memory"):
        native(SGD(pair, lr=0.1)).step()

    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    optimizer = native(AdamW(params))
    optimizer.step()
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    with pytest.raises(fastclip.BackendUnavailableError, match="two parameters share a step counter"):
        optimizer.step()

    optimizer = native(AdamW([{"params": params, "betas": (torch.zeros((), device="meta"), 0.9)}]))
    with pytest.raises(fastclip.BackendUnavailableError, match="the betas of group 0 is on meta"):
        optimizer.step()

    params[0].grad = params[0].grad.t().contiguous().t()
    before = cases.snapshot(params, optimizer.optimizer)
    with pytest.raises(fastclip.BackendUnavailableError, match="parameter 0 of group 0: its gradient has"):
        native(AdamW(params)).step()
    cases.assert_same(before, cases.snapshot(params, optimizer.optimizer))


def test_what_a_schedule_keeps_in_a_group_may_be_on_any_device() -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    optimizer = native(SGD(params, lr=0.1))
    optimizer.param_groups[0]["initial_lr"] = torch.tensor(0.1, device="meta")
    optimizer.step()
    assert optimizer.route == "native"


def test_an_empty_gradient_has_no_inf_norm() -> None:
    param = torch.nn.Parameter(torch.zeros(0))
    param.grad = torch.zeros(0)
    with pytest.raises(fastclip.BackendUnavailableError, match="empty, which has no inf-norm"):
        native(SGD([param], lr=0.1), norm_type=math.inf).step()
