"""`fastclip bench --steps`: it checks before it times, and its rows add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastclip import ClippedOptimizer, cli
from fastclip.backends import cpu
from fastclip.bench import CheckError, isolation, steps
from fastclip.bench.bandwidth import Memory
from fastclip.bench.models import Workload
from fastclip.bench.results import load

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ extension is not built")

SMALL = Workload("small", "small", ((300, 40), (40,)), "float32")


@pytest.mark.parametrize("kind", steps.STEP_KINDS.values(), ids=steps.STEP_KINDS)
def test_a_right_step_passes_the_check(kind: steps.StepKind) -> None:
    assert 0 < steps.check_first_step(SMALL, kind) < 1


@pytest.mark.parametrize("kind", steps.STEP_KINDS.values(), ids=steps.STEP_KINDS)
def test_a_wrong_step_does_not(kind: steps.StepKind, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ClippedOptimizer.step

    def wrong(self: ClippedOptimizer) -> None:
        right(self)
        with torch.no_grad():
            self.param_groups[0]["params"][1][7] *= 1.001

    monkeypatch.setattr(ClippedOptimizer, "step", wrong)
    with pytest.raises(CheckError, match=r"parameter 1 is .* times as far off"):
        steps.check_first_step(SMALL, kind)


def test_the_command_writes_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "Memory", lambda: Memory(1 << 16))
    monkeypatch.setattr(isolation, "apart", isolation.here)
    file = tmp_path / "steps.json"
    arguments = ["bench", "--steps", "--models", "tiny", "--time-budget", "0.01", "--json", str(file)]
    result = CliRunner().invoke(cli.cli, arguments)
    assert result.exit_code == 0, result.output
    rows = load(file).rows
    assert [row.mode for row in rows] == [
        "adamw inactive",
        "adamw active",
        "sgd-momentum inactive",
        "sgd-momentum active",
    ]
    adamw = rows[0]
    assert adamw.traffic.nbytes == 8 * 4 * 16_000  # the norm reads N; the update reads 4 N and writes 3 N
    assert list(adamw.measurements) == [steps.SUBJECT, steps.FUSED, steps.DEFAULT]
    assert "1000 tensors of 16" in result.output


def test_there_is_no_picture() -> None:
    result = CliRunner().invoke(cli.cli, ["bench", "--steps", "--plot", "steps.png"])
    assert result.exit_code == 2
    assert "no picture of --steps" in result.output
