"""Reading a run: in Python, in the terminal, as a report, and for a threshold."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import monitor_cases as cases
import numpy as np
import pytest
from click.testing import CliRunner, Result
from report_pages import Page
from rich.console import Console

import fastclip
from fastclip import monitor
from fastclip.cli import cli
from fastclip.monitor import report, terminal
from fastclip.monitor.bins import bins
from fastclip.monitor.reading import Reader

NAMES = [picture.name for picture in report.PICTURES]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["monitor", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 240 steps that are clipped from 120 on, with one of nan and a warning."""
    folder = tmp_path_factory.mktemp("monitor") / "first"
    made = cases.Norms()
    with fastclip.Monitor(
        made.optimizer, folder, model=made.model, per_parameter=True, update_ratio=True, window=60
    ) as watch:
        for step in range(1, 241):
            norm = float("nan") if step == 77 else 0.3 if step < 120 else 0.02 * step
            made.step(norm, 0.1)
            watch.step(10 / step)
    return folder


def write(folder: Path, norms: Any, threshold: float = 1.0) -> Path:
    """Write a run of these norms as a monitor would."""
    records: list[dict[str, Any]] = [
        {"kind": "run", "after": 0, "optimizer": "SGD", "max_norm": threshold, "norm_type": 2.0}
    ]
    for step, norm in enumerate(norms, 1):
        coef = min(1.0, threshold / (norm + 1e-6))
        records.append(
            {"kind": "step", "step": step, "time": step, "norm": norm, "threshold": threshold, "coef": coef,
             "skipped": False, "clipped_share": 0.0}
        )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "monitor.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_is_read_as_it_was_written(run: Path) -> None:
    seen = monitor.read(run)
    assert len(seen) == 240
    assert seen["step"].tolist() == list(range(1, 241))
    assert seen["loss"] == pytest.approx(10 / seen["step"])
    assert seen.clipped.sum() == 121
    assert np.flatnonzero(seen.skipped).tolist() == [76]
    assert seen.parameters == ["h.a.weight", "h.b.weight"]
    assert seen.norm_steps.tolist() == [1, 51, 78, 128, 178, 228]
    assert seen.parameter_norms[0] == pytest.approx([0.3, 0.1])
    assert [event["kind"] for event in seen.events] == ["nonfinite", "warning"]
    assert monitor.read(run / "monitor.jsonl")["norm"] == pytest.approx(seen["norm"], nan_ok=True)


def test_a_reader_takes_whole_lines_alone_and_starts_again_where_the_file_was_cut(tmp_path: Path) -> None:
    folder = write(tmp_path, [0.5, 0.5])
    reader = Reader(folder)
    assert reader.update()
    assert not reader.update()
    path = folder / "monitor.jsonl"
    with open(path, "a") as file:
        file.write('{"kind": "step", "st')
        file.flush()
        assert not reader.update()
        file.write('ep": 3}\n')
    assert reader.update()
    assert len(reader.run()) == 3
    write(folder, [2.0])
    assert reader.update()
    assert reader.run()["norm"].tolist() == [2.0]


@pytest.mark.parametrize("line", ["nothing", '{"step": 3}', '{"kind": "step", "step": "x"}', "[]"])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    folder = write(tmp_path, [0.5])
    with open(folder / "monitor.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"monitor\.jsonl, line 3: .* is no record of a monitor"):
        monitor.read(folder)


def test_bins_keep_peaks() -> None:
    norms = np.array([1.0, 5.0, np.nan, np.nan, 0.5, 0.25, 3.0])
    columns = {name: np.zeros(7) for name in monitor.reading.COLUMNS}
    columns |= {"step": np.arange(1.0, 8), "norm": norms, "threshold": np.arange(7.0), "coef": np.ones(7)}
    columns["coef"][[1, 6]] = 0.5
    columns["skipped"][2:4] = 1
    found = bins(monitor.Run(Path(), columns, [], {}, [], np.zeros(0, int), np.zeros((0, 0))), 4)
    assert found.steps.tolist() == [1, 3, 5, 7]
    np.testing.assert_array_equal(found.high, [5, np.nan, 0.5, 3])
    np.testing.assert_array_equal(found.low, [1, np.nan, 0.25, 3])
    assert found.threshold.tolist() == [0.5, 2.5, 4.5, 6]
    assert found.clipped.tolist() == [0.5, 0, 0, 1]
    assert found.skipped.tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize("arguments", [(), ("show",)], ids=["run", "show run"])
def test_show(arguments: tuple[str, ...], run: Path) -> None:
    result = command(*arguments, run)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.replace("│", " ").split())
    for part in ("skipped", "×", "clipped, last 60", "100%", "50%", "240"):
        assert part in words
    assert (
        "step 77 is not finite and was skipped (norm nan): h.a.weight of h.a (Linear): 1 nan, 0 inf" in words
    )
    assert (
        "step 177: the share of clipped steps went from 0 % to 97 % in 120 steps; the norms of `h.a`" in words
    )
    assert "5.03 ┤" in result.output  # a little above the largest norm
    assert {"█", "─"} <= set(result.output)


def test_follow_shows_what_comes(tmp_path: Path) -> None:
    folder = write(tmp_path, [0.5] * 3)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)

    def wait(seconds: float) -> None:
        if len(monitor.read(folder)) == 8:
            raise KeyboardInterrupt
        write(folder, [0.5] * 3 + [2.0] * 5)

    terminal.follow(console, Reader(folder), wait=wait)
    text = console.file.getvalue()
    assert re.search(r"\n.*\b3\b +0\.5", text)
    assert re.search(r"\n.*\b8\b +2 ", text)


def test_a_run_without_steps_can_be_shown_and_reported(tmp_path: Path) -> None:
    folder = write(tmp_path, [])
    assert "No step has been written yet." in command(folder).output
    assert command("report", folder).exit_code == 0
    assert "No step has been written" in Page(folder / "report.html").text


@pytest.mark.parametrize("arguments", [(), ("show",), ("report",), ("suggest",)], ids=str)
def test_a_run_that_is_not_there(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = command(*arguments, tmp_path)
    assert result.exit_code == 2
    assert "holds no run of a monitor; expected a directory with monitor.jsonl" in result.output


def test_help_shows_an_example() -> None:
    assert "fastclip monitor runs/first --follow" in command("--help").output


def test_the_report_is_one_file_with_every_picture(run: Path, tmp_path: Path) -> None:
    result = command("report", run, "-o", tmp_path / "new.html", "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "new.html")
    assert set(page.pictures) == set(NAMES)
    assert all(source.startswith("data:") for source in page.sources)
    assert "240 steps: 50% clipped, 1 skipped" in page.text
    assert "step 77 is not finite and was skipped" in page.text
    assert "strategies.MedianMAD(k=4, window=128)" in page.text
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == sorted(NAMES)


def test_pictures_show_the_run(run: Path, tmp_path: Path) -> None:
    seen = monitor.read(run)
    drawn = {picture.name: picture.draw(seen).axes for picture in report.PICTURES}
    norms, share = drawn["norms"]
    labels = [text.get_text() for text in norms.get_legend().get_texts()]
    assert labels == ["norm before clipping", "threshold", "clipped", "skipped"]
    clipped, skipped = norms.collections[1:3]
    assert clipped.get_offsets()[:, 0].tolist() == list(range(120, 241))
    assert skipped.get_offsets()[:, 0].tolist() == [77]
    assert share.lines[0].get_ydata()[-1] == 1.0
    (mesh,) = drawn["layers"][0].collections
    assert [label.get_text() for label in drawn["layers"][0].get_yticklabels()] == ["h.a", "h.b"]
    assert mesh.get_array().shape == (2, 6)
    assert len(drawn["histogram"][0].lines) == 4
    small = monitor.read(write(tmp_path, [0.5] * 5))
    assert "5 steps with a finite norm" in report.PICTURES[2].draw(small).axes[0].get_title()


def test_many_layers_are_put_together(run: Path) -> None:
    seen = monitor.read(run)
    names = [f"h.{i}.{part}.weight" for i in range(20) for part in ("attn", "mlp", "ln")]
    steps = np.array([1, 51])
    many = monitor.Run(seen.path, seen.columns, [], {}, names, steps, np.full((2, 60), 3.0))
    axes = report.PICTURES[1].draw(many).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"h.{i}" for i in range(20)]
    assert axes.collections[0].get_array().data == pytest.approx(np.full((20, 2), 3 * np.sqrt(3)))


def test_suggest_marks_the_border_of_outliers(tmp_path: Path) -> None:
    """Nine of ten norms are 0.9 or 1.1: the median is 1.1 or less, the deviation 0.2 or less."""
    norms = [50.0 if i % 10 == 9 else 0.9 if i % 2 else 1.1 for i in range(300)]
    found = monitor.suggest(write(tmp_path, norms))
    border = 1.1 + 4 * 1.4826 * np.median(np.abs(np.array(norms) - 1.1))
    assert found.best.code == f"max_norm={border:.3g}"
    assert (found.best.share, found.drift, found.num_steps) == (0.1, 1.0, 300)
    fixed = [proposal.threshold for proposal in found.proposals if proposal.code.startswith("max_norm=")]
    assert fixed == sorted(fixed)
    assert {proposal.code for proposal in found.proposals} >= {"max_norm=1.1", "max_norm=50"}
    result = command("suggest", tmp_path)
    assert f"Begin with {found.best.code}" in result.output
    assert "10.0%" in result.output


def test_suggest_follows_norms_that_drift(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(0.9, 1.1, 600)
    found = monitor.suggest(write(tmp_path, noise * np.linspace(1, 10, 600)))
    assert found.best.code == "strategies.MedianMAD(k=4, window=128)"
    assert found.drift == pytest.approx(8.5 / 2.5, rel=0.05)
    assert found.best.share < 0.01
    assert found.best.threshold > 10


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([1.0] * 39, "has 39 steps with a finite norm; expected at least 40"),
        ([0.0] * 30 + [1.0] * 20, "are 0; expected a run that learns"),
    ],
)
def test_suggest_needs_norms(norms: list[float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        monitor.suggest(write(tmp_path, norms))
