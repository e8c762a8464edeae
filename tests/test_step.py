"""The CPU's step: the same bits for all threads and instruction sets, and what is its own."""

from __future__ import annotations

import gc
import sys

import optim_cases as cases
import pytest
import torch
from cases import DTYPES, dtype_id
from optim_oracle import Oracle

import fastclip
from fastclip import ClippedOptimizer
from fastclip.backends import cpu

NUM_STEPS = 20

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built")


INSTRUCTION_SETS = cpu._C.supported_instruction_sets() if cpu._C else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_the_bound_of_the_formula_is_one_that_torch_keeps(option: str, dtype: torch.dtype) -> None:
    """Twice; of 16-bit gradients torch's own norm is off by more than its step."""
    params = cases.parameters(dtype)
    plain = cases.make(option, params)
    oracle = Oracle(plain, cases.MAX_NORM)
    for grads in cases.gradients(NUM_STEPS):
        cases.give(params, grads)
        oracle.step([p.grad for p in params])
        torch.nn.utils.clip_grad_norm_(params, cases.MAX_NORM)
        plain.step()
    oracle.assert_near(plain, times=2.0)


@pytest.mark.parametrize("option", ["adamw", "adam_amsgrad_maximize", "sgd_nesterov"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
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
                optimizer = cases.folded(cases.make(option, [param]), max_norm=1.0)
                for _ in range(3):
                    param.grad = grad.clone()
                    optimizer.step()
                results.append(param.detach())
    finally:
        cpu._C.select_instruction_set(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_what_the_kernels_decline_is_clipped_and_stepped_plainly() -> None:
    param = torch.nn.Parameter(torch.randn(4, 6))
    param.grad = torch.randn(6, 4).t()
    optimizer = ClippedOptimizer(torch.optim.AdamW([param]), 1.0)
    optimizer.step()
    assert optimizer.route == "plain"


def test_declines_groups_of_a_device() -> None:
    param = ones(4)
    optimizer = torch.optim.AdamW([param])
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(fastclip.BackendUnavailableError, match="cpu: group 0 is capturable"):
        cases.folded(optimizer).step()
    assert not optimizer.state
    assert torch.equal(param, torch.ones(4))


def test_parameters_that_share_one_step_counter_count_as_in_torchs_loop() -> None:
    ours, theirs = cases.parameters(), cases.parameters()
    clipped = cases.folded(torch.optim.AdamW(ours), max_norm=float("inf"))
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


def test_a_step_inside_the_call_of_another() -> None:
    """Python runs in the middle of a call wherever that allocates what the garbage collector looks after."""
    params = [ones(16) for _ in range(50)]
    steps = cases.folded(torch.optim.AdamW(params))
    # None has been read yet, and each holds more tensors than all before: nothing stays where it was.
    waiting = [cases.folded(torch.optim.AdamW([ones(1) for _ in range(400 * 2**i)])) for i in range(4)]
    taken = []

    def step_inside(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and waiting and sys._getframe(1).f_code.co_name == "clip_and_step":
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


@pytest.mark.parametrize("numel", [1, 4])
def test_gradients_that_become_lazily_negated_views_are_seen_in_every_step(numel: int) -> None:
    """Where a tensor was found to be none, another may follow: of one element also from torch itself."""
    ours, theirs = (torch.nn.Parameter(torch.ones(numel)) for _ in range(2))
    clipped, plain = ClippedOptimizer(torch.optim.SGD([ours], 0.1), 1.0), torch.optim.SGD([theirs], 0.1)
    for step in range(12):
        negated = step % 3 == 2
        weight = torch.full((numel,), 3.0 + 1j * (step + 1))
        ours.grad = None
        if numel == 1:
            torch.complex(torch.zeros(numel), ours).backward(weight.conj() if negated else weight)
        else:
            ours.grad = torch._neg_view(weight.imag.clone()) if negated else weight.imag.clone()
        assert ours.grad is not None
        assert ours.grad.is_neg() == negated
        theirs.grad = ours.grad.resolve_neg().clone()
        clipped.step()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        plain.step()
        torch.testing.assert_close(ours, theirs)


def test_what_another_step_found_meanwhile_is_not_taken_for_this_ones() -> None:
    """Another thread's, where this one gives away the GIL: here in the middle of a step, on purpose."""
    other = ClippedOptimizer(torch.optim.SGD([ones(4)], 0.0), 1.0)
    param = torch.zeros(4)

    class Part:
        grad = torch._neg_view(torch.ones(4))

        @property
        def _local_tensor(self) -> torch.Tensor:
            other.step()
            return param

    groups = torch.optim.SGD([ones(4)], 0.1).param_groups
    groups[0]["params"] = [Part()]
    options = (1.0, 2.0, 1.0, True, False, 1, [], float("inf"), (0.0, 0.0, []), Part, {})
    assert "lazily negated view" in cpu._C.sgd_step(groups, {}, set(), *options)
