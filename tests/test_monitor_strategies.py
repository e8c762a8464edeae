"""Strategies under a monitor: what is recorded, and that what is suggested can be written."""

from __future__ import annotations

from pathlib import Path

import monitor_cases as cases
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastclip
from fastclip import monitor, strategies
from fastclip.cli import cli

NORMS = np.random.default_rng(0).lognormal(0.0, 0.3, 300)


def train(run: Path, max_norm: object) -> monitor.Run:
    made = cases.Norms(max_norm)
    with fastclip.Monitor(made.optimizer, run, model=made.model, per_parameter=True):
        for norm in NORMS:
            made.step(float(norm))
    return monitor.read(run)


def test_the_threshold_of_a_strategy_is_recorded(tmp_path: Path) -> None:
    run = train(tmp_path, strategies.MedianMAD(k=1.0, window=128, warmup=20))
    for step in (150, 299):
        seen = NORMS[step - 128 : step]
        median = np.median(seen)
        expected = median + 1.4826 * np.median(np.abs(seen - median))
        assert run["threshold"][step] == pytest.approx(expected, rel=0.02)
    assert run.settings["max_norm"].startswith("MedianMAD(k=1.0")
    assert 0 < run.clipped.mean() < 0.5
    found = monitor.suggest(run)
    for proposal in found.proposals:
        if not proposal.code.startswith("max_norm="):
            assert isinstance(eval(proposal.code, {"strategies": strategies}), strategies.Strategy)


def test_a_tensor_is_read_in_each_step(tmp_path: Path) -> None:
    threshold = torch.tensor(0.5)
    made = cases.Norms(threshold)
    with fastclip.Monitor(made.optimizer, tmp_path):
        made.step(2.0)
        threshold.fill_(4.0)
        made.step(2.0)
    assert monitor.read(tmp_path)["threshold"].tolist() == [0.5, 4.0]


def test_several_thresholds_are_none_and_can_be_shown(tmp_path: Path) -> None:
    run = train(tmp_path, strategies.PerTensor(1.0))
    assert np.isnan(run["threshold"]).all()
    assert run.clipped.any()
    for command in ("show", "report", "suggest"):
        result = CliRunner().invoke(cli, ["monitor", command, str(tmp_path)])
        assert result.exit_code == 0, result.output
