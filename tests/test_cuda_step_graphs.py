"""The C interface of a step over the emulated device: graphs, rates on the device, tables, errors."""

from __future__ import annotations

import ctypes
import math

import cuda_library
import pytest
import torch
from cuda_library import DTYPES, POISON, AdamRule, CudaError, Library, StepOptions, StepTarget

pytestmark = pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16")

LAUNCHES = 3


library = pytest.fixture(cuda_library.on_a_new_stream)


class Problem:
    """Parameters of 5 elements with gradients and the state of an Adam."""

    def __init__(self, num_tensors: int = 3, lr: torch.Tensor | float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (num_tensors, 5)
        self.params, self.grads = (torch.randn(shape, generator=generator) for _ in range(2))
        self.exp_avg, self.exp_avg_sq = torch.zeros(shape), torch.zeros(shape)
        self.steps = torch.zeros(num_tensors)
        self.total_norm, self.clip_coef = torch.zeros(()), torch.zeros(())
        self.skipped = torch.zeros((), dtype=torch.bool)
        self.counts = torch.zeros(5, dtype=torch.float64)
        self.lr = lr

    def targets(self) -> list[StepTarget]:
        rows = zip(self.params, self.exp_avg, self.exp_avg_sq, self.steps, strict=True)
        return [
            StepTarget(
                param.data_ptr(), (first.data_ptr(), second.data_ptr(), None), step.data_ptr(), 0, 0, 0
            )
            for param, first, second, step in rows
        ]

    def rule(self) -> AdamRule:
        on_device = isinstance(self.lr, torch.Tensor)
        return AdamRule(
            self.lr.data_ptr() if on_device else None,
            math.nan if on_device else self.lr,
            *(0.9, 0.999, 1e-8, 0.01),
            DTYPES[self.lr.dtype] if on_device else 0,
            1,
            0,
        )

    def step(self, library: Library) -> None:
        said = (self.total_norm, self.clip_coef, self.skipped, self.counts)
        where = (tensor.data_ptr() for tensor in said)
        options = StepOptions(2.0, 1.0, None, None, 0, math.inf, None, None, 1, 0, 0, *where)
        library.adam_step(list(self.grads), self.targets(), [self.rule()], options)

    def values(self) -> list[torch.Tensor]:
        return [self.params, self.exp_avg, self.exp_avg_sq, self.steps, self.total_norm, self.clip_coef]


@pytest.mark.parametrize("num_tensors", [3, 2500])
def test_a_captured_step_counts_and_follows_gradients_and_rate(library: Library, num_tensors: int) -> None:
    ours, theirs = (Problem(num_tensors, torch.tensor(0.1, dtype=torch.float64)) for _ in range(2))
    library.begin_capture()
    ours.step(library)
    workspace = library.workspace
    assert library.end_capture() == LAUNCHES
    assert ours.steps.max() == 0

    for _ in range(6):  # what happens to the stream's tables meanwhile must not matter to the graph
        Problem(num_tensors + 1).step(library)
    for number, grad in enumerate((3.0, 1e-3, math.nan, 0.5)):
        for problem in (ours, theirs):
            problem.grads.fill_(grad)
            problem.lr.fill_(0.1 / (1 + number))
        workspace.fill_(POISON)
        library.replay()
        theirs.step(library)
        torch.testing.assert_close(ours.values(), theirs.values(), rtol=0, atol=0, equal_nan=True)
        assert bool(ours.skipped) == (number == 2)
        assert ours.steps[-1] == (1, 2, 2, 3)[number]
        clipped_skipped_steps_in_a_row = ours.counts[:4].tolist()
        assert clipped_skipped_steps_in_a_row == [(1, 1, 1, 2)[number], number >= 2, number + 1, number == 2]
        largest = 3.0 * math.sqrt(5 * num_tensors)
        assert ours.counts[4].item() == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_rate_on_the_device_is_that_rate(library: Library, dtype: torch.dtype) -> None:
    ours, theirs = Problem(lr=torch.tensor(0.25, dtype=dtype)), Problem(lr=0.25)
    for problem in (ours, theirs):
        problem.step(library)
    torch.testing.assert_close(ours.values(), theirs.values(), rtol=0, atol=0)


def test_targets_are_uploaded_when_they_change_only(library: Library) -> None:
    problem = Problem()
    launches = []
    for change in (None, None, "state", None):
        if change:
            problem.exp_avg = problem.exp_avg.clone()
        before = library.num_launches
        problem.step(library)
        launches.append(library.num_launches - before - LAUNCHES)
    assert launches == [1, 0, 1, 0]
    library.stream += 1  # which has tables of its own
    before = library.num_launches
    problem.step(library)
    assert library.num_launches - before == LAUNCHES + 1


def test_captures_of_the_same_step_share_their_table(library: Library) -> None:
    problem = Problem()
    problem.step(library)
    allocations = []
    for _ in range(3):
        library.begin_capture()
        problem.step(library)
        assert library.end_capture() == LAUNCHES
        allocations.append(library.num_allocations)
    assert len(set(allocations)) == 1


def test_a_failed_allocation_is_reported_and_forgotten(library: Library) -> None:
    library.total_norm([torch.ones(3)])  # the stream's ticket
    problem = Problem()
    before = [value.clone() for value in problem.values()]
    library.c.emulation_set_allocations_until_failure(0)
    with pytest.raises(CudaError, match="out of memory"):
        problem.step(library)
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)
    library.c.emulation_set_allocations_until_failure(-1)
    problem.step(library)
    assert problem.steps.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step_dtype", 2, "dtype is not float16"),
        ("state_dtype", 9, "dtype is not float16"),
        ("step", 3, "multiple of its element size"),
        ("state", (2, None, None), "multiple of its element size"),
    ],
)
def test_bad_targets_are_refused_untouched(library: Library, field: str, value: object, message: str) -> None:
    problem = Problem(1)
    target = problem.targets()[0]
    setattr(target, field, (ctypes.c_void_p * 3)(*value) if isinstance(value, tuple) else value)
    where = (tensor.data_ptr() for tensor in (problem.total_norm, problem.clip_coef, problem.skipped))
    before = [tensor.clone() for tensor in problem.values()]
    with pytest.raises(CudaError, match=message):
        library.adam_step(
            list(problem.grads),
            [target],
            [problem.rule()],
            StepOptions(2.0, 1.0, None, None, 0, math.inf, None, None, 1, 0, 0, *where),
        )
    torch.testing.assert_close(problem.values(), before, rtol=0, atol=0)
