"""The folded step: every target beside the float64 formula, and beside clipping before stepping."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import optim_cases as cases
import pytest
import tolerance
import torch
from cases import DTYPES
from optim_oracle import Oracle
from targets import CPU_TARGETS, GPU_TARGETS, STEPPING, Target, dtypes, on
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

import fastclip
from fastclip import ClippedOptimizer, reference
from fastclip.optim.settings import Amp

INF, NAN = math.inf, math.nan
HALF_TYPES = (torch.bfloat16, torch.float16)


def made(target: Target, option: str, params: list[Parameter]) -> Optimizer:
    """The optimizer of an option, with a learning rate that is a tensor beside the parameters."""
    optimizer = cases.make(option, params)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(target.device)
    return optimizer


def pair(target: Target) -> tuple[list[Parameter], list[Parameter]]:
    return target.parameters(cases.parameters()), target.parameters(cases.parameters())


def assert_near(ours: list[Parameter], theirs: list[Parameter]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def step_plainly(optimizer: ClippedOptimizer) -> None:
    """Clip by torch's operations, then take torch's step."""
    with fastclip.use_backend("eager"):
        optimizer.step()


def each_option_and_type(*options: str) -> Any:
    """Sizes: each option in every type; where steps take long, in one of the types in turn."""

    def sizes(target: Target) -> Iterator[tuple[str, torch.dtype]]:
        for number, option in enumerate(options):
            for dtype in (DTYPES[number % 4],) if target.is_interpreted else DTYPES:
                yield option, dtype

    return sizes


@on("option dtype", each_option_and_type(*cases.OPTIONS), STEPPING)
def test_is_within_the_bound_of_the_formula(target: Target, option: str, dtype: torch.dtype) -> None:
    on_host = cases.parameters(dtype)
    params = target.parameters(on_host)
    oracle = Oracle(cases.make(option, on_host), cases.MAX_NORM)
    clipped = cases.folded(made(target, option, params))
    for grads in cases.gradients(target.num_steps):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        clipped.step()
        assert clipped.route == "native"
    oracle.assert_near(clipped.optimizer)
    assert clipped.stats().clipped == sum(number % 4 in (1, 2) for number in range(target.num_steps))
    for param in params:
        if "step" in clipped.state[param]:
            assert clipped.state[param]["step"] == target.num_steps
            assert clipped.state[param]["step"].device == param.device or not target.is_real


@on(
    "option dtype",
    lambda _: itertools.product(("adamw_amsgrad", "adam_coupled_decay", "sgd_nesterov"), HALF_TYPES),
    [t for t in STEPPING if t.takes_wide_state],
)
def test_takes_float32_state_of_16_bit_parameters(target: Target, option: str, dtype: torch.dtype) -> None:
    on_host = cases.parameters(dtype)
    params = target.parameters(on_host)
    oracle = Oracle(cases.make(option, on_host), cases.MAX_NORM)
    clipped = cases.folded(made(target, option, params))
    for grads in cases.gradients(8):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        clipped.step()
        for state in clipped.state.values():
            state.update({name: value.float() for name, value in state.items()})
    assert clipped.route == "native"
    oracle.assert_near(clipped.optimizer)


@on("dtype", dtypes, [target for target in GPU_TARGETS if not target.contracts])
def test_values_are_rounded_as_the_cpus_kernels_round_them(target: Target, dtype: torch.dtype) -> None:
    """Bit by bit where no quotient is formed: what stands in for a device contracts nothing."""
    results = []
    for backend in (target.backend, "cpu"):
        params = cases.parameters(dtype)
        with fastclip.use_backend(backend):
            optimizer = cases.folded(cases.make("sgd_nesterov", params), max_norm=INF)
            for grads in cases.gradients(2):
                cases.give(params, grads)
                optimizer.step()
        results.append(
            [*(p.detach() for p in params), *(optimizer.state[p]["momentum_buffer"] for p in params)]
        )
    assert all(torch.equal(here, there) for here, there in zip(*results, strict=True))


@on("dtype", dtypes, [target for target in STEPPING if not target.is_interpreted])
def test_large_unaligned_and_many_tensors(target: Target, dtype: torch.dtype) -> None:
    numel = 3_000_001 if target.is_real else 3_001
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(numel, generator=generator).to(target.device, dtype)
    cuts = [0, numel * 2 // 3, numel * 29 // 30]
    params = [Parameter(piece.clone()) for piece in memory[cuts[2] :][:4000].split(2)]
    params += [
        Parameter(memory[: cuts[1]].clone()),
        Parameter(memory[cuts[1] + 1 : cuts[2]]),
    ]  # at an odd place
    on_host = [Parameter(p.detach().to("cpu", copy=True)) for p in params]
    # A norm of 1000 and this eps keep the squares within float16, where the bound says something.
    options, max_norm = {"lr": 1e-2, "eps": 1e-3}, 1000.0 * (numel / 3_000_001) ** 0.5
    clipped = cases.folded(AdamW(params, **options), max_norm=max_norm)
    oracle = Oracle(AdamW(on_host, **options), max_norm)
    for _ in range(3):
        for param in params:
            param.grad = param.detach().clone()
        oracle.step([p.grad for p in params])
        clipped.step()
    # In float64 the oracle has roundings of its own, as many as the step.
    oracle.assert_near(clipped.optimizer, times=2.0 if dtype == torch.float64 else 1.0)


def each_option_and_value(target: Target) -> Iterator[tuple[str, float]]:
    if target.is_interpreted:
        yield from (("adam_amsgrad_maximize", NAN), ("sgd_dampening", -INF))
    else:
        yield from itertools.product(("adam_amsgrad_maximize", "sgd_dampening"), (NAN, INF, -INF))


@on("option bad", each_option_and_value, STEPPING)
def test_a_nonfinite_step_changes_nothing_and_the_first_makes_no_state(
    target: Target, option: str, bad: float
) -> None:
    ours, theirs = pair(target)
    optimizer, want = cases.folded(made(target, option, ours)), cases.plain(made(target, option, theirs))
    for number, grads in enumerate(cases.gradients(4)):
        if number in (0, 2):
            grads[2][3, 1] = bad
        cases.give(ours, grads)
        cases.give(theirs, grads)
        before = cases.snapshot(ours, optimizer.optimizer)
        optimizer.step()
        step_plainly(want)
        assert optimizer.route == "native"
        assert bool(optimizer.last.skipped) is (number in (0, 2))
        if number in (0, 2):
            cases.assert_same(before, cases.snapshot(ours, optimizer.optimizer))
    assert_near(ours, theirs)
    got, wanted = optimizer.stats(), want.stats()
    assert (got.steps, got.skipped, got.clipped, got.consecutive_skips) == (4, 2, 1, 0)
    assert (wanted.steps, wanted.skipped, wanted.clipped, wanted.consecutive_skips) == (4, 2, 1, 0)
    assert {float(state["step"]) for state in optimizer.state.values() if "step" in state} <= {2.0}


@on("", targets=STEPPING)
def test_propagating_does_what_torch_does(target: Target) -> None:
    params = target.parameters(cases.parameters())
    cases.give(params, next(cases.gradients(1)))
    params[1].grad.fill_(NAN)
    optimizer = cases.folded(AdamW(params, amsgrad=True), nonfinite="propagate")
    optimizer.step()
    assert not bool(optimizer.last.skipped)
    assert all(bool(t.isnan().all()) for p in params for t in (p, optimizer.state[p]["max_exp_avg_sq"]))
    assert optimizer.state[params[0]]["step"] == 1


@on("", targets=STEPPING)
def test_raising_names_the_parameter(target: Target) -> None:
    params = target.parameters(cases.parameters())
    cases.give(params, next(cases.gradients(1)))
    params[2].grad[0, 0] = INF
    with pytest.raises(RuntimeError, match="parameter 2 of group 0"):
        cases.folded(AdamW(params), nonfinite="raise").step()


@on("option", lambda _: (("adamw",), ("sgd_nesterov",)), STEPPING)
def test_unscales_on_the_way(target: Target, option: str) -> None:
    ours, theirs = pair(target)
    scaled, unscaled = made(target, option, ours), made(target, option, theirs)
    amp = Amp(torch.tensor(2.0**10, device=target.device), torch.tensor(0.0, device=target.device))
    for grads in cases.gradients(2):
        cases.give(ours, [g * 2**10 for g in grads])
        cases.give(theirs, grads)
        got, wanted = cases.scaled_step(scaled, amp), cases.scaled_step(unscaled, Amp())
        assert got.numbers() == wanted.numbers()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@on("nonfinite", lambda _: (("skip",), ("propagate",)), GPU_TARGETS)
def test_a_scalers_verdict_skips_on_the_device(target: Target, nonfinite: str) -> None:
    params = target.parameters(cases.parameters())
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    cases.give(params, next(cases.gradients(1)))
    scale, found, none = (torch.tensor(value, device=target.device) for value in (4.0, 1.0, 0.0))
    before = cases.snapshot(params, optimizer)
    assert cases.scaled_step(optimizer, Amp(scale, found), nonfinite=nonfinite).skipped
    cases.assert_same(before, cases.snapshot(params, optimizer))
    assert not optimizer.state
    assert not cases.scaled_step(optimizer, Amp(found_inf=none), nonfinite=nonfinite).skipped
    # Without dampening in its first step, as torch has it.
    torch.testing.assert_close(optimizer.state[params[0]]["momentum_buffer"], params[0].grad, rtol=0, atol=0)


@on("unscale_first", lambda t: [(False,)] if t.is_interpreted else [(False,), (True,)], STEPPING)
def test_a_grad_scaler_finds_its_scale(target: Target, unscale_first: bool) -> None:
    ours, theirs = pair(target)
    clipped, unscaled = cases.folded(Adam(ours, lr=1e-2)), cases.plain(Adam(theirs, lr=1e-2))
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**10, growth_interval=100)
    for number, grads in enumerate(cases.gradients(4)):
        if number == 2:
            grads[1].fill_(INF)
        clipped.zero_grad()
        beside = [grad.to(target.device) for grad in grads]
        scaler.scale(cases.loss_of(ours, beside).to(target.device)).backward()
        if unscale_first:
            scaler.unscale_(clipped)
        scaler.step(clipped)
        scaler.update()
        cases.give(theirs, grads)
        step_plainly(unscaled)
        assert number == 2 or clipped.route == "native"
    assert clipped.stats().skipped == unscaled.stats().skipped == 1
    assert scaler.get_scale() == 2.0**9
    assert_near(ours, theirs)


@pytest.mark.parametrize("max_norm", [1.0, 1e9])
@on("option dtype", each_option_and_type("sgd_momentum", "adamw_maximize", "sgd_maximize"), STEPPING)
def test_write_grads_leaves_what_torch_leaves(
    target: Target, option: str, dtype: torch.dtype, max_norm: float
) -> None:
    on_host = cases.parameters(dtype)
    params = target.parameters(on_host)
    cases.give(params, next(cases.gradients(1)))
    before = [p.grad.clone() for p in params]
    version = params[0].grad._version
    clipped = cases.folded(made(target, option, params), max_norm=max_norm, write_grads=True)
    oracle = Oracle(cases.make(option, on_host), max_norm)
    oracle.step(before)
    clipped.step()
    assert clipped.route == "native"
    assert params[0].grad._version > version or (target.knows_what_it_wrote and max_norm > 1)
    relative = tolerance.scaled(dtype, target.bound(before, 2.0))
    for param, start, want in zip(params, before, reference.clipped(before, max_norm), strict=True):
        tolerance.assert_scaled(param.grad, start, want, relative)
        assert max_norm == 1.0 or torch.equal(param.grad, start)
    oracle.assert_near(clipped.optimizer)


STARTS = ((0, 0), (1, 1), (3, 3), (0, 1), (1, 0))


@on("dtype", dtypes, [*CPU_TARGETS, *GPU_TARGETS])
def test_takes_every_length_and_start(target: Target, dtype: torch.dtype) -> None:
    """Of parameters and of gradients; neighbouring memory is nan: neither read nor written."""
    starts = STARTS[2:4] if target.is_interpreted else STARTS
    for write_grads in (True,) if target.is_interpreted else (False, True):
        memories, params = [], []
        for (start, grad_start), numel in itertools.product(starts, target.lengths(dtype)):
            here = [torch.full((numel + 40,), NAN, dtype=dtype, device=target.device) for _ in range(2)]
            value, grad = (m[at : at + numel] for m, at in zip(here, (start, grad_start), strict=True))
            value.fill_(1.0)
            grad.fill_(1.0)
            params.append(Parameter(value))
            params[-1].grad = grad
            memories += here
        numel = sum(p.numel() for p in params)
        # Steps by powers of 2 are exact in every type.
        optimizer = SGD(params, lr=0.5, momentum=0.9)
        max_norm = 0.25 * math.sqrt(numel) + 0.25e-6
        cases.folded(optimizer, max_norm=max_norm, write_grads=write_grads).step()
        for param in params:
            assert torch.equal(param.grad, torch.full_like(param, 0.25 if write_grads else 1.0))
            assert torch.equal(param, torch.full_like(param, 0.875))
        assert sum(int(m.isfinite().sum()) for m in memories) == 2 * numel


@on("", targets=STEPPING)
def test_takes_mixed_dtypes_as_it_takes_each(target: Target) -> None:
    grads = next(cases.gradients(1))
    mixed = [p for dtype in DTYPES for p in target.parameters(cases.parameters(dtype))]
    together = cases.folded(AdamW(mixed), max_norm=INF)
    cases.give(mixed, grads * len(DTYPES))
    together.step()
    assert together.last.total_norm.dtype == torch.float64
    for number, dtype in enumerate(DTYPES):
        alone = target.parameters(cases.parameters(dtype))
        cases.give(alone, grads)
        cases.folded(AdamW(alone), max_norm=INF).step()
        here = mixed[number * len(alone) : (number + 1) * len(alone)]
        torch.testing.assert_close(here, alone, rtol=0, atol=0)


@on("", targets=STEPPING)
def test_groups_have_their_own_options_and_one_norm(target: Target) -> None:
    ours, theirs = pair(target)

    def groups(params: list[Parameter]) -> list[dict[str, Any]]:
        rate = torch.tensor(0.02, device=target.device)
        return [
            {"params": params[:1], "lr": 0.1, "amsgrad": True, "maximize": True},
            {"params": params[1:2], "betas": (0.5, 0.7), "eps": 1e-3, "lr": rate},
            {"params": params[2:], "weight_decay": 0.5},
        ]

    both = [AdamW(groups(params), foreach=False) for params in (ours, theirs)]
    optimizer, want = cases.folded(both[0]), cases.plain(both[1])
    for grads in cases.gradients(3):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        optimizer.step()
        step_plainly(want)
        for one in (optimizer, want):
            one.param_groups[1]["lr"] *= 0.5
    assert optimizer.route == "native"
    assert_near(ours, theirs)


@on("norm_type", lambda _: ((p,) for p in (1.0, 2.0, 3.5, INF)), STEPPING)
def test_clips_by_every_norm(target: Target, norm_type: float) -> None:
    params = target.parameters(cases.parameters())
    cases.give(params, next(cases.gradients(1)))
    norm = reference.total_norm([p.grad for p in params], norm_type)
    before = [p.detach().clone() for p in params]
    optimizer = cases.folded(SGD(params, lr=1.0), max_norm=norm / 4, norm_type=norm_type)
    optimizer.step()
    torch.testing.assert_close(float(optimizer.last.total_norm), norm, rtol=1e-6, atol=0)
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), start - param.grad / 4, rtol=1e-5, atol=1e-6)


@on("", targets=STEPPING)
def test_a_norm_beyond_float32_clips_and_is_no_reason_to_skip(target: Target) -> None:
    param = Parameter(torch.zeros(1000, device=target.device))
    param.grad = torch.full_like(param, 3e38)
    optimizer = cases.folded(SGD([param], lr=1.0), max_norm=1.0)
    optimizer.step()
    assert (float(optimizer.last.total_norm), bool(optimizer.last.skipped)) == (INF, False)
    assert param.detach().double().norm().item() == pytest.approx(1.0, rel=1e-5)
    assert optimizer.stats().largest_norm == 0.0


@on("", targets=STEPPING)
def test_an_infinite_parameter_is_not_decayed_by_a_decay_of_zero(target: Target) -> None:
    for kind in (Adam, SGD):
        (param,) = cases.with_ones(torch.tensor([INF, 1.0], device=target.device))
        cases.folded(kind([param], lr=0.5)).step()
        assert param.tolist() == [INF, pytest.approx(0.5)]


@on("", targets=STEPPING)
def test_takes_permuted_layouts_that_agree_and_counters_of_either_type(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    (ours,), (theirs,) = target.parameters([weight]), target.parameters([weight])
    clipped, want = cases.folded(AdamW([ours])), cases.plain(AdamW([theirs]))
    for _ in range(3):
        for param in (ours, theirs):
            param.grad = weight.flip(0).to(target.device, memory_format=torch.channels_last)
        clipped.step()
        step_plainly(want)
        clipped.state[ours]["step"] = clipped.state[ours]["step"].double()
    assert clipped.route == "native"
    assert clipped.state[ours]["exp_avg"].stride() == want.state[theirs]["exp_avg"].stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    clipped.step()
    ours.grad[0, 0] = NAN
    clipped.step()
    assert (clipped.state[ours]["step"].dtype, clipped.state[ours]["step"].item()) == (torch.float64, 4.0)


@on("", targets=STEPPING)
def test_tells_autograd_and_leaves_gradients_alone(target: Target) -> None:
    params = target.parameters(cases.parameters())
    cases.give(params, next(cases.gradients(1)))
    grads, versions = copy.deepcopy([p.grad for p in params]), [p._version for p in params]
    cases.folded(AdamW(params), max_norm=1.0).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


@on("", targets=STEPPING)
def test_parameters_that_get_gradients_later_or_never(target: Target) -> None:
    ours, theirs = pair(target)
    optimizer, want = cases.folded(AdamW(ours, amsgrad=True)), cases.plain(AdamW(theirs, amsgrad=True))
    optimizer.step()
    assert (optimizer.route, len(optimizer.state), optimizer.stats().clipped) == ("native", 0, 0)
    for number, grads in enumerate(cases.gradients(4)):
        for params in (ours, theirs):
            cases.give(params, grads)
            for index, param in enumerate(params):
                if (index + number) % 3 == 0:
                    param.grad = None
        optimizer.step()
        step_plainly(want)
    assert_near(ours, theirs)
    assert [optimizer.state[p]["step"] for p in ours] == [want.state[p]["step"] for p in theirs]
    for param in ours:
        param.grad = None
    optimizer.step()
    assert (optimizer.stats().steps, float(optimizer.last.total_norm)) == (6, 0.0)


@on(
    "option", lambda t: (("adam_coupled_decay",), ("sgd_momentum",))[: 1 if t.is_interpreted else 2], STEPPING
)
def test_checkpoints_go_in_and_out_of_plain_torch(target: Target, option: str) -> None:
    ours, theirs = pair(target)
    clipped, want = cases.folded(made(target, option, ours), max_norm=INF), made(target, option, theirs)
    for number, grads in enumerate(cases.gradients(3)):
        if number == 1:
            saved = copy.deepcopy(want.state_dict())
            for index, entry in clipped.state_dict()["state"].items():
                assert entry.keys() == saved["state"][index].keys()
                if "step" in entry:
                    assert entry["step"].device == saved["state"][index]["step"].device
            want.load_state_dict(clipped.state_dict())
            clipped.load_state_dict(saved)
        cases.give(ours, grads)
        cases.give(theirs, grads)
        clipped.step()
        want.step()
    assert_near(ours, theirs)
    assert {float(s["step"]) for s in clipped.state.values() if "step" in s} <= {3.0}


@on("", targets=STEPPING)
def test_what_a_schedule_keeps_in_a_group_may_be_on_any_device(target: Target) -> None:
    params = cases.with_ones(torch.ones(3, device=target.device))
    optimizer = cases.folded(SGD(params, lr=0.1))
    optimizer.param_groups[0]["initial_lr"] = torch.tensor(0.1, device="meta")
    optimizer.step()
    assert optimizer.route == "native"


@on("", targets=STEPPING)
def test_two_parameters_with_one_gradient_that_is_only_read(target: Target) -> None:
    first, second = cases.with_ones(*(torch.zeros(4, device=target.device) for _ in range(2)))
    second.grad = first.grad
    clipped = cases.folded(SGD([first, second], lr=1.0), max_norm=1.0)
    clipped.step()
    assert clipped.route == "native"
    assert torch.cat([first, second]).norm().item() == pytest.approx(1.0)
