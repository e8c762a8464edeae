"""`fastclip bench --distributed`: its table and its file say what was timed."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from programs import run_python

from fastclip import cli


def test_rows_and_file(tmp_path: Path) -> None:
    """In a process of its own, which a process group is made in."""
    file = tmp_path / "distributed.json"
    arguments = ("bench", "--distributed", "--time-budget", "0.01", "--json", str(file))
    run = run_python("from fastclip.cli import main; main()", *arguments)
    assert run.returncode == 0, run.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["num_tensors"], row["what"]) for row in content["rows"]] == [
        (300, "clip"),
        (1000, "clip"),
        (300, "clip + AdamW"),
    ]
    for row in content["rows"]:
        ours = row["measurements"]["fastclip"]["quantiles_ms"]["50"]
        for peer, ratio in row["derived"]["ratios"].items():
            assert ratio == row["measurements"][peer]["quantiles_ms"]["50"] / ours
            # Far below what is reached, so that a busy machine cannot fail it.
            assert ratio > 2
    assert content["first_call_ms"] < 500
    assert "1000" in run.stdout


def test_what_does_not_go_together_is_refused() -> None:
    result = CliRunner().invoke(cli.cli, ["bench", "--distributed", "--steps"])
    assert result.exit_code == 2
    assert "a run is of one kind" in result.output
