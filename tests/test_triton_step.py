"""How the step by interpreted Triton kernels is launched, and what of it is uploaded."""

from __future__ import annotations

import math

import optim_cases as cases
import pytest
import torch
from cases import DTYPES
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from triton_interpreter import interpreted, needs_triton, noted_launches

from fastclip.backends import triton

__all__ = ["interpreted"]

pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("interpreted"),
    # numpy, which stands in for the device, warns where the kernels overflow and divide on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched."""
    return noted_launches(monkeypatch)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_three_launches_for_any_number_of_tensors_groups_and_dtypes(
    kind: type[Optimizer], launches: list[str]
) -> None:
    params = [torch.nn.Parameter(torch.ones(3 + i % 5, dtype=DTYPES[i % 4])) for i in range(40)]
    optimizer = cases.folded(
        kind([{"params": [p], "lr": 0.1 + i / 100} for i, p in enumerate(params)]), max_norm=1
    )
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


def test_only_what_changes_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    params = cases.parameters()
    lr = torch.tensor(0.1)
    optimizer = cases.folded(SGD([{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": 0.1}]))
    cases.give(params, next(cases.gradients(1)))
    rules: list[Tensor] = []
    keep = triton._rules.get
    monkeypatch.setattr(triton._rules, "get", lambda *args: rules.append(keep(*args)) or rules[-1])
    before = len(triton._step_tables)
    start = [p.detach().clone() for p in params]
    for rate in (0.1, 0.2):  # read by the kernel, so that a graph sees it
        lr.fill_(rate)
        optimizer.step()
    assert len(triton._step_tables) == before + 1
    assert rules[0] is rules[1]
    coef = optimizer.last.clip_coef
    torch.testing.assert_close(params[0].detach(), start[0] - 0.3 * coef * params[0].grad)
    torch.testing.assert_close(params[2].detach(), start[2] - 0.2 * coef * params[2].grad)
    optimizer.param_groups[1]["lr"] = 0.4
    optimizer.step()
    assert rules[2] is not rules[1]
    assert len(triton._step_tables) == before + 1
