"""Where records go, and what is left of them when a process is killed and goes on."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import monitor_cases as cases
import pytest
from programs import start_python, wait_for

import fastclip
from fastclip.monitor import read, writers

TRAINING = """
import sys, time, monitor_cases as cases, fastclip
made = cases.Norms()
with fastclip.Monitor(made.optimizer, sys.argv[1], every=10) as monitor:
    for step in range(1, 1000):
        made.step(float(step))
        monitor.step(2.0 * step)
        print(step, flush=True)
        if step == 37:
            time.sleep(60)
"""


def train(
    run: Path, norms: list[float], state: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Take a step for each norm; return the state after them."""
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, run, model=made.model, **options) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        for norm in norms:
            made.step(norm)
            monitor.step(2 * norm)
        return monitor.state_dict()


def test_json_lines_hold_what_is_not_finite(tmp_path: Path) -> None:
    train(tmp_path / "new" / "run", [0.5, math.nan, math.inf])
    steps = cases.lines(tmp_path / "new" / "run", "step")
    assert [record["norm"] for record in steps] == [0.5, "nan", "inf"]
    assert [record["skipped"] for record in steps] == [False, True, True]
    assert [record["loss"] for record in steps] == [1.0, "nan", "inf"]


def test_a_block_is_written_when_its_last_step_has_its_loss(tmp_path: Path) -> None:
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, tmp_path, every=2) as monitor:
        for written in (0, 2, 2, 4):
            made.step(0.5)
            monitor.step(1.0)
            assert len(read(tmp_path)) == written


def test_csv(tmp_path: Path) -> None:
    state = train(tmp_path, [0.5, 2.0], to=["csv"])
    train(tmp_path, [math.nan], state, to=["csv"])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "monitor.csv").read_text())))
    assert [(row["step"], row["norm"], row["skipped"], row["clipped_share"]) for row in rows] == [
        ("1", "0.5", "False", "0.0"),
        ("2", "2.0", "False", "0.5"),
        ("3", "nan", "True", str(1 / 3)),
    ]
    assert rows[0]["update_ratio"] == ""


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs fastclip[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = train(tmp_path, [0.5, 2.0, 3.0], to=["tensorboard"])
    train(tmp_path, [4.0, math.nan], {**state, "step": 2}, to=["tensorboard"])
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("fastclip/norm")][:3] == [(1, 0.5), (2, 2.0), (3, 4.0)]
    assert [e.value for e in seen.Scalars("fastclip/loss")][:3] == [1.0, 4.0, 8.0]
    (event,) = seen.Tensors("fastclip/events/text_summary")
    assert event.step == 4
    assert b"h.a.weight of h.a (Linear): 1 nan, 0 inf" in event.tensor_proto.string_val[0]


def test_tensorboard_that_is_missing_says_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"expected the extra `tensorboard`\. pip install 'fastclip\[tens"):
        train(tmp_path, [], to=["tensorboard"])


def test_a_writer_that_fails_costs_its_block_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[int] = []

    def upload(records: list[dict[str, Any]]) -> None:
        steps = [record["step"] for record in records if record["kind"] == "step"]
        if 3 in steps:
            raise ConnectionError("no network")
        got.extend(steps)

    train(tmp_path, [0.5] * 6, to=[upload, "jsonl"], every=2)
    assert got == [1, 2, 5, 6]
    assert len(read(tmp_path)) == 6
    assert "Monitor: upload failed and lost the records of steps 3 to 4." in caplog.text
    assert "ConnectionError: no network" in caplog.text


class FullDisk(io.BytesIO):
    """Takes ten bytes of a write and no more while it is full."""

    is_full = False

    def write(self, data: Any) -> int:
        if not self.is_full:
            return super().write(data)
        if len(data) < 500:
            raise OSError(28, "No space left on device")
        return super().write(data[:10])


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    writer = writers.JsonLines(tmp_path / "monitor.jsonl")
    writer.close()
    disk = writer._file = FullDisk()
    writer([{"kind": "run"}])
    disk.is_full = True
    with pytest.raises(OSError, match="No space left"):
        writer([{"kind": "step", "text": "x" * 600}])
    disk.is_full = False
    writer([{"kind": "step"}])
    assert [json.loads(line)["kind"] for line in disk.getvalue().splitlines()] == ["run", "step"]


def test_a_killed_process_loses_at_most_the_last_block_and_goes_on(tmp_path: Path) -> None:
    process = start_python(tmp_path, TRAINING, tmp_path)
    wait_for(tmp_path / "stdout", "37\n")
    process.kill()
    process.join()
    assert [record["step"] for record in cases.lines(tmp_path, "step")] == list(range(1, 31))
    with open(tmp_path / "monitor.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 31, "no')
    assert len(read(tmp_path)) == 30
    train(tmp_path, [31.0, 32.0])
    run = read(tmp_path)
    assert run["step"].tolist() == list(range(1, 33))
    assert run["norm"].tolist() == list(range(1, 33))
    assert [record["after"] for record in cases.lines(tmp_path, "run")] == [0, 30]


def test_a_run_that_goes_on_from_a_checkpoint_supersedes_what_came_after_it(tmp_path: Path) -> None:
    before = train(tmp_path, [0.5, 2.0, 2.0, 0.5], per_parameter=True, every=2, window=4)
    train(tmp_path, [7.0, math.nan, 7.0], before, per_parameter=True, every=2, window=4)
    after = train(tmp_path, [0.5, 0.5], before, per_parameter=True, every=2, window=4)
    assert (before["step"], after["step"]) == (4, 6)
    run = read(tmp_path)
    assert run["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run["norm"].tolist() == [0.5, 2.0, 2.0, 0.5, 0.5, 0.5]
    assert run["clipped_share"].tolist() == [0, 1 / 2, 2 / 3, 1 / 2, 1 / 2, 1 / 4]
    assert run.events == []
    assert run.norm_steps.tolist() == [1, 3, 5]
    assert run.parameter_norms[:, 0] == pytest.approx([1.25, 1.25, 0.5])


def test_state_is_plain_and_belongs_to_the_beginning(tmp_path: Path) -> None:
    state = train(tmp_path, [0.5, 2.0])
    assert json.loads(json.dumps(state)) == state
    made = cases.Norms()
    with fastclip.Monitor(made.optimizer, to=[]) as monitor:
        made.step(1.0)
        with pytest.raises(RuntimeError, match="steps were recorded already"):
            monitor.load_state_dict(state)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", ""), ("torn", ""), ("a\n", "a\n"), ("a\nb\ntorn", "a\nb\n"), ("a\n" + "x" * 200_000, "a\n")],
    ids=["empty", "nothing whole", "whole", "torn", "torn and long"],
)
def test_a_torn_line_is_cut_off(text: str, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    writers.cut_torn_line(path)
    assert path.read_text() == kept


def test_the_last_step_is_found_behind_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "monitor.jsonl"
    records = [{"kind": "step", "step": 9}, {"kind": "parameters", "step": 9, "norms": [1.0] * 50_000}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert writers.last_step(path) == 9
    assert writers.last_step(tmp_path / "none") == 0
