"""`fastclip bench --strategies`: what is trained, what is timed, and what the tables say of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastclip import cli
from fastclip.bench import strategies as costs
from fastclip.demo import comparison

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import readme_tables

NAMES = ("unclipped", "torch's clip, 0.25", "MedianMAD()", "AGC()")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer contenders and trials, of one epoch, and a tiny list to time."""
    compare, run_costs = comparison.compare, costs.run_costs

    def smaller(**options: Any) -> comparison.ComparisonResults:
        options |= {"contenders": NAMES, "epochs": 3}
        return compare(trials=comparison.TRIALS[1:2] + comparison.TRIALS[3:4], **options)

    monkeypatch.setattr(comparison, "compare", smaller)
    monkeypatch.setattr(comparison, "run_costs", lambda **options: run_costs(model="tiny", **options))


@pytest.mark.usefixtures("small")
def test_command_file_and_tables(tmp_path: Path) -> None:
    file = tmp_path / "strategies.json"
    run = CliRunner().invoke(
        cli.cli, ["bench", "--strategies", "--quick", "--time-budget", "0.1", "--json", str(file)]
    )
    assert run.exit_code == 0, run.output
    content = json.loads(file.read_text(encoding="utf-8"))
    found = {(s["contender"], s["condition"]): s for s in content["scores"]}
    assert {name for name, _ in found} == set(NAMES)
    # One NaN batch ends what does not look at it, and skips one step of what does.
    for name in NAMES[:2]:
        assert found[name, "NaN batch"]["scores"][0] < 0.2
    for name in NAMES[2:]:
        assert found[name, "NaN batch"]["scores"][0] > 0.4
        assert found[name, "NaN batch"]["skipped"] == 1
    assert found["MedianMAD()", "outliers"]["scores"][0] > found["unclipped", "outliers"]["scores"][0]
    assert content["costs"][0]["cost"] == 0.0
    assert {row["strategy"] for row in content["costs"]} == set(costs.TIMED)
    scores = readme_tables.strategies_table(tmp_path)
    accuracy = found["MedianMAD()", "NaN batch"]["scores"][0]
    assert f"| `MedianMAD()` | {accuracy:.3f} ({accuracy:.3f}, {accuracy:.3f}) |" in scores
    assert "| `AGC` |" in readme_tables.strategy_costs_table(tmp_path)
    assert "MedianMAD()" in run.output
    content["costs"] = []
    file.write_text(json.dumps(content), encoding="utf-8")
    run = CliRunner().invoke(
        cli.cli, ["bench", "--strategies", "--costs", "--time-budget", "0.1", "--json", str(file)]
    )
    assert run.exit_code == 0, run.output
    again = json.loads(file.read_text(encoding="utf-8"))
    assert {row["strategy"] for row in again["costs"]} == set(costs.TIMED)
    assert again["scores"] == content["scores"]


def test_costs_alone_want_a_file_with_scores(tmp_path: Path) -> None:
    for arguments in (["--strategies"], ["--strategies", "--json", str(tmp_path / "new.json")]):
        run = CliRunner().invoke(cli.cli, ["bench", "--costs", *arguments])
        assert run.exit_code == 2
        assert "that is there" in run.output


def test_what_does_not_go_together_is_refused() -> None:
    result = CliRunner().invoke(cli.cli, ["bench", "--strategies", "--distributed"])
    assert result.exit_code == 2
    assert "a run is of one kind" in result.output


def test_picture(tmp_path: Path) -> None:
    comparison.picture(tmp_path / "strategies.png")
    assert (tmp_path / "strategies.png").read_bytes().startswith(b"\x89PNG")
