"""The kernels of the folded step, through the native route."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from typing import Any

import optim_cases as cases
import pytest
import torch
from optim_oracle import Oracle

import fastclip
from fastclip import ClippedOptimizer, reference
from fastclip.backends import cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUM_STEPS = 50

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built")


INSTRUCTION_SETS = cpu._C.supported_instruction_sets() if cpu._C else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu._C.instruction_set()
    cpu._C.select_instruction_set(request.param)
    yield request.param
    cpu._C.select_instruction_set(before)


def native(optimizer: torch.optim.Optimizer, **settings: Any) -> ClippedOptimizer:
    return ClippedOptimizer(optimizer, **{"max_norm": cases.MAX_NORM, "fused": True, **settings})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_is_within_the_bound_of_the_formula_and_so_is_torch(option: str, dtype: torch.dtype) -> None:
    ours, theirs = cases.parameters(dtype), cases.parameters(dtype)
    clipped = native(cases.make(option, ours))
    # Of 16-bit types, torch's fused step alone computes in float32.
    fused = {"fused": True} if dtype.itemsize == 2 else {}
    plain = cases.make(option, theirs, **fused)
    oracle = Oracle(plain, cases.MAX_NORM)
    for grads in cases.gradients(NUM_STEPS):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        oracle.step([p.grad for p in ours])
        clipped.step()
        torch.nn.utils.clip_grad_norm_(theirs, cases.MAX_NORM)
        plain.step()
        assert clipped.route == "native"
    oracle.assert_near(clipped.optimizer)
    assert clipped.stats().clipped == NUM_STEPS // 2
    if dtype.itemsize > 2:  # torch's own norm of 16-bit gradients is off by more than its step
        oracle.assert_near(plain, times=2.0)
    for param in ours:
        if "step" in clipped.state[param]:
            assert clipped.state[param]["step"] == NUM_STEPS


@pytest.mark.parametrize("option", ["adamw", "adam_amsgrad_maximize", "sgd_nesterov"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_same_bits_for_every_instruction_set_and_number_of_threads(
    option: str, dtype: torch.dtype
) -> None:
    shape = (3, 70_001)  # several chunks, and more than one thread's worth
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    before, threads = cpu._C.instruction_set(), torch.get_num_threads()
    results = []
    try:
        for name in INSTRUCTION_SETS:
            for num_threads in (1, 2, 3):
                cpu._C.select_instruction_set(name)
                torch.set_num_threads(num_threads)
                param = torch.nn.Parameter(start.clone())
                optimizer = native(cases.make(option, [param]), max_norm=1.0)
                for _ in range(3):
                    param.grad = grad.clone()
                    optimizer.step()
                results.append(param.detach())
    finally:
        cpu._C.select_instruction_set(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("numel", [0, 1, 7, 15, 16, 17, 63, 65, 16_384, 16_385, 100_003])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_takes_every_length_and_start(numel: int, offset: int, instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(numel)
    memory = torch.randn(2, numel + offset + 8, generator=generator)
    guard = memory.clone()
    param = torch.nn.Parameter(memory[0, offset : offset + numel])
    param.grad = memory[1, offset : offset + numel]
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer = native(torch.optim.SGD([param, other], lr=0.5), max_norm=1.0)
    coef = reference.clip_coefficient(reference.total_norm([param.grad, other.grad]), 1.0)
    optimizer.step()
    want = guard[0].clone()
    want[offset : offset + numel] -= 0.5 * (guard[1, offset : offset + numel] * torch.tensor(coef).float())
    assert optimizer.route == "native"
    assert torch.equal(memory[1], guard[1])
    torch.testing.assert_close(memory[0], want, rtol=1e-6, atol=1e-6)
    assert torch.equal(memory[0, :offset], guard[0, :offset])
    assert torch.equal(memory[0, offset + numel :], guard[0, offset + numel :])


def test_takes_permuted_layouts_that_agree() -> None:
    weight = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    clipped, plain = native(torch.optim.AdamW([ours])), torch.optim.AdamW([theirs])
    for _ in range(3):
        ours.grad = torch.randn_like(weight)
        theirs.grad = ours.grad.clone()
        clipped.step()
        plain.step()
    assert clipped.route == "native"
    assert clipped.state[ours]["exp_avg"].stride() == plain.state[theirs]["exp_avg"].stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_declines_layouts_that_differ() -> None:
    param = torch.nn.Parameter(torch.randn(4, 6))
    param.grad = torch.randn(6, 4).t()
    optimizer = ClippedOptimizer(torch.optim.AdamW([param]), 1.0)
    optimizer.step()
    assert optimizer.route == "plain"
    with pytest.raises(fastclip.BackendUnavailableError, match="parameter 0 of group 0: its gradient has"):
        native(torch.optim.AdamW([param])).step()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("capturable", True, "cpu: group 0 is capturable"),
        ("lr", torch.tensor(0.1, device="meta"), "cpu: the lr of group 0 is on meta"),
    ],
)
def test_declines_groups_of_a_device(name: str, value: bool | torch.Tensor, reason: str) -> None:
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = torch.optim.AdamW([param])
    optimizer.param_groups[0][name] = value
    with pytest.raises(fastclip.BackendUnavailableError, match=reason):
        native(optimizer).step()
    assert not optimizer.state
    assert torch.equal(param, torch.ones(4))


def test_declines_memory_that_is_shared_or_negated() -> None:
    memory = torch.randn(10)
    pair = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[4:])]
    for param in pair:
        param.grad = torch.ones_like(param)
    with pytest.raises(fastclip.BackendUnavailableError, match="two parameters share memory"):
        native(torch.optim.SGD(pair, lr=0.1)).step()
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch._neg_view(torch.ones(4))
    with pytest.raises(fastclip.BackendUnavailableError, match="lazily negated"):
        native(torch.optim.SGD([param], lr=0.1)).step()


def test_two_parameters_with_one_gradient() -> None:
    grad = torch.full((4,), 3.0)
    pair = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for param in pair:
        param.grad = grad
    clipped = native(torch.optim.SGD(pair, lr=1.0), max_norm=1.0)
    clipped.step()
    assert clipped.route == "native"
    torch.testing.assert_close(torch.cat(pair).norm(), torch.tensor(1.0))
    with pytest.raises(fastclip.BackendUnavailableError, match="two gradients share memory"):
        native(torch.optim.SGD(pair, lr=1.0), write_grads=True).step()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
def test_clips_by_every_norm(norm_type: float) -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    norm = reference.total_norm([p.grad for p in params], norm_type)
    before = [p.detach().clone() for p in params]
    optimizer = native(torch.optim.SGD(params, lr=1.0), max_norm=norm / 4, norm_type=norm_type)
    optimizer.step()
    torch.testing.assert_close(float(optimizer.last.total_norm), norm, rtol=1e-6, atol=0)
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), start - param.grad / 4, rtol=1e-5, atol=1e-6)


def test_parameters_that_share_one_step_counter_count_as_in_torchs_loop() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    clipped = native(torch.optim.AdamW(ours), max_norm=float("inf"))
    plain = torch.optim.AdamW(theirs, foreach=False)
    for grads in cases.gradients(3):
        cases.give(ours, grads)
        cases.give(theirs, grads)
        clipped.step()
        plain.step()
        for optimizer in (clipped, plain):
            shared = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
            for state in optimizer.state.values():
                state["step"] = shared
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)
    assert [s["step"] for s in clipped.state.values()] == [s["step"] for s in plain.state.values()]


def test_write_grads_leaves_what_torch_leaves() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    grads = next(cases.gradients(1))
    cases.give(ours, grads)
    cases.give(theirs, grads)
    clipped = native(torch.optim.AdamW(ours), max_norm=1.0, write_grads=True)
    version = ours[0].grad._version
    clipped.step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert clipped.route == "native"
    assert ours[0].grad._version > version
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=1e-6, atol=1e-9)


def test_leaves_gradients_alone_and_tells_autograd_of_parameters() -> None:
    params = cases.parameters()
    cases.give(params, next(cases.gradients(1)))
    grads, versions = copy.deepcopy([p.grad for p in params]), [p._version for p in params]
    native(torch.optim.AdamW(params), max_norm=1.0).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


def test_a_step_inside_the_call_of_another() -> None:
    """Python runs in the middle of a call wherever that allocates what the garbage collector looks after."""
    params = [ones(16) for _ in range(50)]
    steps = native(torch.optim.AdamW(params))
    # None has been read yet, and each holds more tensors than all before: nothing stays where it was.
    waiting = [native(torch.optim.AdamW([ones(1) for _ in range(400 * 2**i)])) for i in range(4)]
    taken = []

    def step_inside(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and waiting and sys._getframe(1).f_code.co_name == "_call":
            taken.append(waiting.pop(0))
            taken[-1].step()

    threshold = gc.get_threshold()
    gc.callbacks.append(step_inside)
    try:
        for _ in range(4):
            gc.set_threshold(1)
            steps.step()
            gc.set_threshold(*threshold)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(step_inside)
    assert taken
    for other in (steps, *taken):
        group = other.param_groups[0]["params"]
        for param in group:
            torch.testing.assert_close(param, group[0], rtol=0, atol=0)
            assert other.state[param]["step"] == other.stats().steps


def ones(size: int) -> torch.nn.Parameter:
    """Return a parameter with a gradient, all ones."""
    param = torch.nn.Parameter(torch.ones(size))
    param.grad = torch.ones(size)
    return param
