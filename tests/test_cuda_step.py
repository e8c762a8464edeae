"""How the step on an emulated CUDA device is launched, for any number of tensors and groups."""

from __future__ import annotations

import math

import cuda_library
import optim_cases as cases
import pytest
import torch
from cuda_library import Library
from torch.optim import SGD, AdamW

from fastclip.backends import cpu

LAUNCHES = 3

pytestmark = [
    pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built"),
    pytest.mark.skipif(cuda_library.compiler() is None, reason="needs g++ with _Float16"),
]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return cuda_library.take_steps_of_the_cpu(monkeypatch)


@pytest.mark.parametrize("option", ["adamw_amsgrad", "sgd_nesterov"])
def test_three_launches_and_one_for_the_table_of_a_first_step(option: str, library: Library) -> None:
    params = cases.parameters()
    clipped = cases.folded(cases.make(option, params))
    for number, grads in enumerate(cases.gradients(4)):
        cases.give(params, grads)
        before = library.num_launches
        clipped.step()
        # The table of the first step is there already if an earlier test's tensors lay at the same addresses.
        uploads = (0, 1) if number == 0 else (0,)
        assert library.num_launches - before - LAUNCHES in uploads


def test_two_thousand_tiny_tensors_take_three_launches(library: Library) -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2000)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = cases.folded(AdamW(params, lr=0.5), max_norm=1.0)
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
    optimizer = cases.folded(SGD(groups, lr=0.1), max_norm=math.inf)
    optimizer.step()
    before = library.num_launches
    optimizer.step()
    assert library.num_launches - before == LAUNCHES + (num_groups - 1) // 512
    for number, group in enumerate(groups):
        for param in group["params"]:
            assert param.tolist() == [-2.0 * (1 + number)] * 2
