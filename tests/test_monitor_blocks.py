"""The block on a device: what it launches, when it is taken, and that no step waits for it."""

from __future__ import annotations

import math
from pathlib import Path

import monitor_cases as cases
import pytest
import torch

import fastclip
from fastclip.monitor import read
from fastclip.monitor.blocks import NO_GRADIENT, DeviceBlock
from fastclip.optim import Outcome


class Copy:
    """An event that has passed when a test says so."""

    def __init__(self) -> None:
        self.has_passed, self.num_waits = False, 0

    def record(self, stream: object) -> None:
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        self.num_waits += 1
        self.has_passed = True


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch) -> Copy:
    """How far the copy of a block is, whose device only passes for one."""
    made = Copy()
    init = DeviceBlock.__init__

    def with_event(self: DeviceBlock, every: int, width: int, device: torch.device) -> None:
        init(self, every, width, device)
        self._arrived = made  # type: ignore[assignment]

    monkeypatch.setattr(DeviceBlock, "__init__", with_event)
    monkeypatch.setattr(Outcome, "numbers", lambda self: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


def test_a_block_is_written_when_it_has_arrived(copy: Copy, tmp_path: Path) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, tmp_path, every=4) as monitor:
        for _ in range(6):
            made.step(2.0)
            monitor.step(1.0)
        assert len(read(tmp_path)) == 0
        copy.has_passed = True
        made.step(2.0)
        assert len(read(tmp_path)) == 4
        assert copy.num_waits == 1  # by the `take` that the event let through
        made.step(2.0)
        monitor.step(1.0)
        for _ in range(3):
            made.step(2.0)
        assert copy.num_waits == 1
    assert len(read(tmp_path)) == 11


def test_a_block_that_a_whole_block_did_not_bring_is_waited_for(copy: Copy, tmp_path: Path) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, tmp_path, every=4):
        for _ in range(9):
            made.step(2.0)
        assert len(read(tmp_path)) == 4
        assert copy.num_waits == 1


def test_steps_without_gradients_mix_with_those_on_a_device(tmp_path: Path) -> None:
    """Their outcome is on the host, wherever the others are."""
    block = DeviceBlock(3, 2, torch.device("cpu"))
    device = [torch.tensor(value) for value in (2.0, 0.5, False)]
    block.put(Outcome(*device), 1.0, torch.tensor([1.0, 2.0]), None)
    block.put(Outcome.of_numbers(0.0, 1.0, False, torch.float32), 1.0, torch.tensor([-1.0, -1.0]), None)
    block.set_loss(torch.tensor([3.0]))
    block.put(Outcome(*device), torch.tensor(0.25), torch.tensor([1.0, 2.0]), torch.tensor(0.125))
    assert block.is_full
    block.send(5)
    rows = block.take(wait=False)
    assert rows is not None
    assert (rows.first, rows.has_loss) == (5, [False, True, False])
    nan = math.nan
    expected = [[2, 0.5, 0, 1, nan, nan], [0, 1, 0, 1, nan, 3], [2, 0.5, 0, 0.25, 0.125, nan]]
    assert rows.values == pytest.approx(torch.tensor(expected).numpy(), nan_ok=True)
    assert block.take(wait=True) is None
    for _ in range(3):
        block.put(Outcome(*device), 1.0, None, None)
    block.send(8)
    rows = block.take(wait=False)
    assert rows is not None
    assert rows.values == pytest.approx(torch.tensor([[2, 0.5, 0, 1, nan, nan]] * 3).numpy(), nan_ok=True)
    assert (rows.norms == NO_GRADIENT).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("per_parameter", [False, True])
def test_no_step_waits_for_a_gpu(per_parameter: bool, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = fastclip.ClippedOptimizer(torch.optim.AdamW([parameter], lr=1e-3), max_norm=1.0)
    with fastclip.Monitor(optimizer, tmp_path, every=5, per_parameter=per_parameter) as monitor:
        for step in range(40):
            parameter.grad = torch.full_like(parameter, math.nan if step == 30 else 1.0)
            mode = "error" if step > 12 else "default"  # state and blocks have been made by then
            torch.cuda.set_sync_debug_mode(mode)
            try:
                optimizer.step()
                monitor.step(parameter.detach().sum())
            finally:
                torch.cuda.set_sync_debug_mode("default")
    run = read(tmp_path)
    assert len(run) == 40
    assert run["skipped"].nonzero()[0].tolist() == [30]
    assert run["norm"][:30] == pytest.approx(math.sqrt(1000))
