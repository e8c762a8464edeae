"""The Triton kernels of the folded step under the interpreter, through ClippedOptimizer."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import optim_cases as cases
import pytest
import torch
from cases import dtype_id
from optim_oracle import Oracle
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from triton_interpreter import interpreted, needs_triton, noted_launches

import fastclip
from fastclip import ClippedOptimizer
from fastclip.optim.native import triton as native
from fastclip.optim.outcome import Outcome, Tally
from fastclip.optim.settings import Amp, Settings

__all__ = ["interpreted"]

pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("interpreted"),
    # numpy, which stands in for the device, warns where the kernels overflow and divide on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

NUM_STEPS = 3


def folded(optimizer: Optimizer, **settings: Any) -> ClippedOptimizer:
    return ClippedOptimizer(optimizer, **{"max_norm": cases.MAX_NORM, "fused": True, **settings})


def plain(optimizer: Optimizer, **settings: Any) -> ClippedOptimizer:
    """fastclip's clip, then torch's step."""
    return ClippedOptimizer(optimizer, **{"max_norm": cases.MAX_NORM, "fused": False, **settings})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    return noted_launches(monkeypatch)


@every_dtype
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_is_within_the_bound_of_the_formula(option: str, dtype: torch.dtype) -> None:
    params = cases.parameters(dtype)
    optimizer = folded(cases.make(option, params))
    oracle = Oracle(optimizer.optimizer, cases.MAX_NORM)
    for grads in cases.gradients(NUM_STEPS):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        optimizer.step()
        assert optimizer.route == "native"
    oracle.assert_near(optimizer.optimizer)
    assert all(s["step"] == NUM_STEPS for s in optimizer.state.values() if "step" in s)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_three_launches_for_any_number_of_tensors_groups_and_dtypes(
    kind: type[Optimizer], launches: list[str]
) -> None:
    params = [torch.nn.Parameter(torch.ones(3 + i % 5, dtype=DTYPES[i % 4])) for i in range(70)]
    optimizer = folded(kind([{"params": [p], "lr": 0.1 + i / 100} for i, p in enumerate(params)]), max_norm=1)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        launches.clear()
        optimizer.step()
        name = "sgd" if kind is SGD else "adam"
        assert launches == ["total_norm_kernel", f"{name}_coefficients_kernel", f"{name}_kernel"]
    norm = math.sqrt(sum(p.numel() for p in params))
    assert optimizer.last.total_norm.dtype == torch.float64
    assert float(optimizer.last.total_norm) == pytest.approx(norm, rel=1e-7)
    if kind is SGD:
        for i, param in enumerate(params):
            want = 1.0 - 2 * (0.1 + i / 100) / norm
            rtol = 2 * torch.finfo(param.dtype).eps + 1e-6
            torch.testing.assert_close(param.detach(), torch.full_like(param, want), rtol=rtol, atol=0)


def test_groups_have_their_own_options_and_one_norm() -> None:
    ours, theirs = cases.parameters(), cases.parameters()

    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[:1], "lr": 0.1, "amsgrad": True, "maximize": True},
            {"params": params[1:2], "betas": (0.5, 0.7), "eps": 1e-3, "lr": torch.tensor(0.02)},
            {"params": params[2:], "weight_decay": 0.5},
        ]

    optimizer, want = folded(AdamW(groups(ours), foreach=False)), plain(AdamW(groups(theirs), foreach=False))
    for grads in cases.gradients(NUM_STEPS):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        optimizer.step()
        want.step()
        optimizer.param_groups[1]["lr"] *= 0.5
        want.param_groups[1]["lr"] *= 0.5
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


@every_dtype
def test_16_bit_values_are_rounded_as_the_cpu_kernels_round_them(dtype: torch.dtype) -> None:
    """Bit by bit where no quotient is formed; numpy, like those kernels, contracts nothing."""
    results = []
    for backend in ("triton", "cpu"):
        if reason := fastclip.backend_info()[backend].available is False:
            pytest.skip(f"needs the {backend} backend: {reason}")
        params = cases.parameters(dtype)
        with fastclip.use_backend(backend):
            optimizer = folded(cases.make("sgd_nesterov", params), max_norm=math.inf)
            for grads in cases.gradients(NUM_STEPS):
                cases.give(params, grads)
                optimizer.step()
        results.append(
            [*(p.detach() for p in params), *(optimizer.state[p]["momentum_buffer"] for p in params)]
        )
    assert all(torch.equal(here, there) for here, there in zip(*results, strict=True))


@pytest.mark.parametrize("apart", [False, True], ids=["alike", "apart"])
@every_dtype
def test_lengths_around_tile_and_chunk_at_every_misalignment(dtype: torch.dtype, apart: bool) -> None:
    """Neighbouring memory is nan: neither read nor written."""
    vector = 16 // dtype.itemsize
    lengths = (0, 1, vector, 32 * vector + 1, 64 * vector + 3)
    memories, params = [], []
    for start, numel in itertools.product((0, 1, vector - 1), lengths):
        here = [torch.full((start + numel + 2 * vector,), math.nan, dtype=dtype) for _ in range(2)]
        starts = (start, start + 1 if apart else start)
        for memory, first in zip(here, starts, strict=True):
            memory[first : first + numel] = 1.0
        value, grad = (m[first : first + numel] for m, first in zip(here, starts, strict=True))
        params.append(torch.nn.Parameter(value))
        params[-1].grad = grad
        memories += here
    numel = sum(p.numel() for p in params)
    # Steps by powers of 2 are exact in every type.
    folded(SGD(params, lr=0.5), max_norm=0.25 * math.sqrt(numel) + 0.25e-6, write_grads=True).step()
    for param in params:
        assert torch.equal(param.grad, torch.full_like(param, 0.25))
        assert torch.equal(param, torch.full_like(param, 0.875))
    assert sum(int(m.isfinite().sum()) for m in memories) == 2 * numel


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("option", ["adam_amsgrad_maximize", "sgd_dampening"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(option: str, bad: float) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, want = folded(cases.make(option, ours)), plain(cases.make(option, theirs))
    for number, grads in enumerate(cases.gradients(4)):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        if number in (0, 2):
            ours[2].grad[3, 1] = theirs[2].grad[3, 1] = bad
        before = cases.snapshot(ours, optimizer.optimizer)
        optimizer.step()
        want.step()
        assert bool(optimizer.last.skipped) is (number in (0, 2))
        if number in (0, 2):
            cases.assert_same(before, cases.snapshot(ours, optimizer.optimizer))
    torch.testing.assert_close(
        cases.snapshot(ours, optimizer.optimizer),
        cases.snapshot(theirs, want.optimizer),
        rtol=1e-5,
        atol=1e-6,
    )
    assert optimizer.stats() == want.stats()
    assert (optimizer.stats().skipped, optimizer.stats().clipped) == (2, 1)


def test_propagate_does_what_torch_does() -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    params[1].grad.fill_(math.nan)
    optimizer = folded(AdamW(params, amsgrad=True), nonfinite="propagate")
    optimizer.step()
    assert not bool(optimizer.last.skipped)
    assert all(bool(t.isnan().all()) for p in params for t in (p, optimizer.state[p]["max_exp_avg_sq"]))
    assert optimizer.state[params[0]]["step"] == 1


def test_raise_names_the_parameter() -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    params[2].grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="parameter 2 of group 0"):
        folded(AdamW(params), nonfinite="raise").step()


def test_a_norm_beyond_float32_is_no_reason_to_skip() -> None:
    param = torch.nn.Parameter(torch.zeros(16))
    param.grad = torch.full((16,), 2e38)
    optimizer = folded(SGD([param], lr=1.0), max_norm=1.0)
    optimizer.step()
    assert math.isinf(float(optimizer.last.total_norm))
    assert not bool(optimizer.last.skipped)
    torch.testing.assert_close(param.detach(), torch.full((16,), -0.25))
    assert optimizer.stats().largest_norm == 0.0


def test_an_infinite_parameter_is_not_decayed_by_a_decay_of_zero() -> None:
    for kind in (Adam, SGD):
        param = torch.nn.Parameter(torch.tensor([math.inf, 1.0]))
        param.grad = torch.ones(2)
        folded(kind([param], lr=0.5)).step()
        torch.testing.assert_close(param.detach(), torch.tensor([math.inf, 0.5]))


@every_dtype
@pytest.mark.parametrize("option", ["adamw_maximize", "sgd_maximize"])
def test_write_grads_leaves_what_the_update_used(option: str, dtype: torch.dtype) -> None:
    params = cases.parameters(dtype)
    steps = list(cases.gradients(2))
    optimizer = folded(cases.make(option, params), write_grads=True)
    for grads in steps:  # the first is not clipped, the second is
        cases.give(params, grads)
        before, version = [p.grad.clone() for p in params], params[0].grad._version
        optimizer.step()
        coef = optimizer.last.clip_coef
        for param, grad in zip(params, before, strict=True):
            assert torch.equal(
                param.grad, (grad * coef.to(dtype if dtype == torch.float64 else torch.float32)).to(dtype)
            )
        assert params[0].grad._version > version
    assert coef < 1
    without = cases.parameters(dtype)
    again = folded(cases.make(option, without))
    for grads in steps:
        cases.give(without, grads)
        again.step()
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        [p.detach() for p in params], [p.detach() for p in without], rtol=rtol, atol=rtol
    )


def test_gradients_are_left_alone_and_autograd_is_told_of_parameters() -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    grads, versions = copy.deepcopy([p.grad for p in params]), [p._version for p in params]
    folded(AdamW(params), max_norm=1.0).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


def step_with(optimizer: Optimizer, amp: Amp, **settings: Any) -> tuple[Outcome, Tally]:
    """A step whose scaler keeps scale and verdict on the device, which the wrapper reads itself on a CPU."""
    checked = Settings(**{"max_norm": cases.MAX_NORM, **settings})
    tally = Tally()
    outcome = native.step(optimizer, checked, amp, tally, None)
    assert isinstance(outcome, Outcome)
    assert tally.last is outcome
    return outcome, tally


@pytest.mark.parametrize("option", ["adamw", "sgd_nesterov"])
def test_scale_and_verdict_are_read_on_the_device(option: str) -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, want = cases.make(option, ours), plain(cases.make(option, theirs))
    for number, grads in enumerate(cases.gradients(4)):
        cases.give(ours, [g * 1024 for g in grads])
        cases.give(theirs, grads)
        scale, found_inf = torch.tensor(1024.0), torch.tensor(float(number == 1))
        before = cases.snapshot(ours, optimizer)
        outcome, tally = step_with(optimizer, Amp(scale, found_inf), nonfinite="propagate")
        if number == 1:
            assert bool(outcome.skipped)
            cases.assert_same(before, cases.snapshot(ours, optimizer))
            continue
        want.step()
        torch.testing.assert_close(outcome.total_norm, want.last.total_norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(outcome.clip_coef, want.last.clip_coef, rtol=1e-6, atol=0)
        assert tally.stats().clipped == int(want.last.clip_coef < 1)
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


def test_a_skipped_first_step_leaves_no_state() -> None:
    params = cases.parameters()
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    cases.give(params, next(cases.gradients(1)))
    step_with(optimizer, Amp(found_inf=torch.tensor(1.0)))
    assert not optimizer.state
    outcome, _ = step_with(optimizer, Amp(found_inf=torch.tensor(0.0)))
    assert not bool(outcome.skipped)
    # Without dampening in its first step, as torch has it.
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)


def test_a_grad_scaler_finds_its_scale() -> None:
    params = cases.parameters()
    optimizer = folded(AdamW(params, lr=1e-2), fused=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    steps = list(cases.gradients(3))
    steps[1][2][3, 1] = math.inf
    skipped, routes = [], []
    for grads in steps:
        optimizer.zero_grad()
        scaler.scale(sum((p * g.float()).sum() for p, g in zip(params, grads, strict=True))).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(bool(optimizer.last.skipped))
        routes.append(optimizer.route)
    assert skipped == [False, True, False]
    assert (routes[0], routes[2]) == ("native", "native")
    assert scaler.get_scale() == 2.0**9


def test_counters_keep_their_dtype() -> None:
    params = cases.parameters()
    optimizer = folded(AdamW(params))
    cases.give(params, next(cases.gradients(1)))
    optimizer.step()
    optimizer.state[params[1]]["step"] = optimizer.state[params[1]]["step"].double()
    optimizer.step()
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    steps = [optimizer.state[p]["step"] for p in params]
    assert [s.dtype for s in steps] == [torch.float32, torch.float64, torch.float32]
    assert [s.item() for s in steps] == [2.0, 2.0, 2.0]


def test_parameters_that_get_gradients_later() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, want = folded(AdamW(ours, amsgrad=True)), plain(AdamW(theirs, amsgrad=True))
    for number, grads in enumerate(cases.gradients(4)):
        for params in (ours, theirs):
            cases.give(params, grads)
            for index, param in enumerate(params):
                if (index + number) % 3 == 0:
                    param.grad = None
        optimizer.step()
        want.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)
    assert [optimizer.state[p]["step"] for p in ours] == [want.state[p]["step"] for p in theirs]
    for param in ours:
        param.grad = None
    optimizer.step()
    assert (optimizer.stats().steps, float(optimizer.last.total_norm)) == (5, 0.0)


def test_a_checkpoint_goes_on_with_torch() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    optimizer, want = folded(cases.make("adam_coupled_decay", ours)), cases.make("adam_coupled_decay", theirs)
    steps = list(cases.gradients(4))
    for number, grads in enumerate(steps):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        if number == 2:
            resumed = cases.make("adam_coupled_decay", ours)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = plain(resumed)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
        want.step()
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 3.5, math.inf])
def test_clips_by_every_norm(norm_type: float) -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    norm = fastclip.reference.total_norm([p.grad for p in params], norm_type)
    before = [p.detach().clone() for p in params]
    optimizer = folded(SGD(params, lr=1.0), max_norm=norm / 4, norm_type=norm_type)
    optimizer.step()
    torch.testing.assert_close(float(optimizer.last.total_norm), norm, rtol=1e-6, atol=0)
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), start - param.grad / 4, rtol=1e-5, atol=1e-6)


def test_only_what_changes_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    params = cases.parameters()
    lr = torch.tensor(0.1)
    optimizer = folded(SGD([{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": 0.1}]))
    cases.give(params, next(cases.gradients(1)))
    rules: list[Tensor] = []
    keep = native._rules.get
    monkeypatch.setattr(native._rules, "get", lambda *args: rules.append(keep(*args)) or rules[-1])
    before = len(native._tables)
    start = [p.detach().clone() for p in params]
    for rate in (0.1, 0.2):  # read by the kernel, so that a graph sees it
        lr.fill_(rate)
        optimizer.step()
    assert len(native._tables) == before + 1
    assert rules[0] is rules[1]
    coef = optimizer.last.clip_coef
    torch.testing.assert_close(params[0].detach(), start[0] - 0.3 * coef * params[0].grad)
    torch.testing.assert_close(params[2].detach(), start[2] - 0.2 * coef * params[2].grad)
    optimizer.param_groups[1]["lr"] = 0.4
    optimizer.step()
    assert rules[2] is not rules[1]
    assert len(native._tables) == before + 1
