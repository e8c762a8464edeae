"""`patch_torch` under timm's choice of a clip, which its training script and its scaler call."""

from __future__ import annotations

from types import ModuleType

import client_cases as client
import pytest
import torch
from torch import nn
from torch.optim import SGD

import fastclip


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    try:
        return client.needs("timm.utils")
    except RuntimeError as error:  # of torchvision, whose operators are for another build of torch
        pytest.skip(f"needs the package timm with a torchvision that imports: {error}")


def test_patch_torch_reaches_the_dispatch(utils: ModuleType) -> None:
    def step(net: nn.Module) -> None:
        (client.loss_of(net, client.batches(1)[0]) * client.HUGE).backward()
        utils.dispatch_clip_grad(net.parameters(), client.MAX_NORM, mode="norm")
        SGD(net.parameters(), lr=1.0).step()

    assert not client.reaches(step)
    with fastclip.patch_torch():
        assert client.reaches(step)


def test_values_are_clamped_by_fastclip(utils: ModuleType) -> None:
    """Which writes only where a value is outside; torch's clamp writes always."""
    param = nn.Parameter(torch.zeros(2))
    for grad, written in (([0.3, -0.25], 0), ([3.0, -0.25], 1)):
        param.grad = torch.tensor(grad)
        with fastclip.patch_torch():
            utils.dispatch_clip_grad([param], 0.5, mode="value")
        assert param.grad.tolist() == pytest.approx([min(grad[0], 0.5), -0.25])
        assert param.grad._version == written


def test_page(utils: ModuleType) -> None:
    try:
        client.run_section("timm")
        assert torch.nn.utils.clip_grad_norm_ is fastclip.clip_grad_norm_
    finally:
        fastclip.patch_torch().unpatch()
