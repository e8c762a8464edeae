"""The demo: a network that explodes unclipped and learns clipped, and an exit code that notices."""

from __future__ import annotations

import importlib
import io
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from programs import run_python
from rich.console import Console

import fastclip
from fastclip.bench import WORKLOADS, devices, runner
from fastclip.bench.bandwidth import Memory
from fastclip.bench.runner import torch_threads
from fastclip.bench.timing import interleave
from fastclip.demo import run
from fastclip.demo.history import History
from fastclip.demo.plot import plot_histories, running_median
from fastclip.demo.report import runs_table
from fastclip.demo.rescue import rescue
from fastclip.demo.runs import Run, runs_for
from fastclip.demo.tasks import ACCURACY, Marks, Measure, make_task
from fastclip.demo.training import train
from fastclip.optim import Stats

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEN_CLASSES = {"measure": ACCURACY, "guessing_loss": math.log(10)}


def digits_at(learning_rate, **options):
    task = make_task("digits", **options)
    return replace(task, recipe=replace(task.recipe, learning_rate=learning_rate))


def select(task, *names, **changes):
    """Some of a task's runs, changed."""
    return [replace(run, **changes) for run in runs_for(task) if run.name in names]


def train_digits(name="fastclip 0.25", *, epochs=1, seed=0, **options):
    task = make_task("digits", epochs=epochs, seed=seed)
    return train(task, *select(task, name), **options)


def without_clipping(optimizer, max_norm):
    """Stand in for an optimizer that says it clips and does not."""
    return fastclip.ClippedOptimizer(optimizer, math.inf)


@pytest.fixture(autouse=True)
def _one_thread():
    """Several threads gain nothing on a network this small and crawl on a busy machine."""
    with torch_threads(1):
        yield


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """What a log gets, also where the environment asks for colour."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def log_console():
    return Console(file=io.StringIO(), width=120)


def test_demo_shows_backends_speed_and_rescue(tmp_path, capsys, monkeypatch):
    # The table of a quick look: what training shows is the same.
    monkeypatch.setattr(runner, "Memory", partial(Memory, numel=1 << 12))
    monkeypatch.setattr(devices, "interleave", lambda *args, **options: interleave(*args, budget_s=0.01))
    monkeypatch.setitem(runner.WORKLOADS, "resnet50", replace(WORKLOADS["resnet50"], shapes=((64, 64),)))
    output = tmp_path / "made" / "here"
    assert run(output, search=False) == 0
    assert (output / "digits.png").read_bytes().startswith(PNG_SIGNATURE)
    pages = sorted(path.parent.name for path in (output / "monitor").glob("*/report.html"))
    assert pages == ["fastclip0.25", "fastclip0.25+NaN"]
    log = capsys.readouterr().out
    for backend in fastclip.backend_info():
        assert backend in log
    assert "ResNet-50" in log
    assert "clipped, it learns. A batch of NaN costs one step with fastclip, the run with torch." in log
    for name in (
        "unclipped",
        "fastclip 0.25",
        "torch 0.25",
        "fastclip 0.25 + NaN",
        "torch 0.25 + NaN",
    ):
        assert re.search(
            rf"Trained {re.escape(name)}: train accuracy \S+%, test accuracy \S+%, train loss \S+, test loss",
            log,
        )
    assert "\x1b" not in log


@pytest.mark.parametrize(("is_rescued", "code"), [(True, 0), (False, 1)])
def test_exit_code_is_that_of_the_rescue(tmp_path, monkeypatch, is_rescued, code):
    monkeypatch.setattr("fastclip.bench.run", lambda *args, **kwargs: None)
    monkeypatch.setattr("fastclip.bench.table.render", lambda results: "")
    # The name in the package is the function.
    monkeypatch.setattr(importlib.import_module("fastclip.demo.run"), "rescue", lambda *args: is_rescued)
    assert run(tmp_path, search=False) == code


def rescued(tmp_path, task, runs):
    console = log_console()
    return rescue(console, tmp_path, task, runs), console.file.getvalue()


def test_rescue_fails_when_nothing_is_clipped(tmp_path):
    task = make_task("digits", epochs=3)
    is_rescued, log = rescued(tmp_path, task, select(task, "fastclip 0.25", make=without_clipping))
    assert not is_rescued
    assert "fastclip 0.25 reached 10." in log


def test_rescue_fails_when_nothing_explodes(tmp_path):
    task = digits_at(0.02, epochs=3)
    is_rescued, log = rescued(tmp_path, task, select(task, "unclipped"))
    assert not is_rescued
    assert "unclipped reached" in log


def test_rescue_fails_when_the_nan_batch_is_not_skipped(tmp_path):
    task = make_task("digits", epochs=1)
    propagating = partial(fastclip.ClippedOptimizer, nonfinite="propagate")
    runs = select(task, "unclipped") + select(task, "fastclip 0.25 + NaN", make=propagating)
    is_rescued, log = rescued(tmp_path, task, runs)
    assert not is_rescued
    assert "fastclip 0.25 + NaN skipped 0 steps, expected 1" in log


def test_a_nan_batch_costs_fastclip_one_step_and_torch_the_run():
    ours = train_digits("fastclip 0.25 + NaN", nan_step=20)
    theirs = train_digits("torch 0.25 + NaN", nan_step=20)
    assert ours.skipped == [20]
    assert theirs.skipped == []
    assert ours.stats.skipped == 1
    assert [step for step, loss in enumerate(ours.losses) if math.isnan(loss)] == [20]
    assert [math.isnan(loss) for loss in theirs.losses] == [step >= 20 for step in range(45)]
    assert ours.losses[:20] == train_digits().losses[:20]


def test_same_seed_same_run_other_seed_other_run():
    first, again, other = train_digits(), train_digits(), train_digits(seed=1)
    assert first.losses == again.losses
    assert first.norms == again.norms
    assert first.score == again.score
    assert first.losses != other.losses


def test_fastclip_and_torch_start_alike():
    ours, theirs = train_digits(), train_digits("torch 0.25")
    assert ours.norms[:10] == pytest.approx(theirs.norms[:10], rel=1e-4)
    assert ours.losses[:10] == pytest.approx(theirs.losses[:10], rel=1e-4)


@pytest.mark.parametrize("name", ["fastclip 0.25", "torch 0.25"])
def test_both_count_what_the_norms_say(name):
    history = train_digits(name, epochs=2)
    stats = history.stats
    assert (stats.steps, stats.skipped) == (len(history.norms), 0)
    assert stats.clipped == sum(norm > 0.25 for norm in history.norms)
    assert 0 < stats.clip_fraction < 1
    assert stats.largest_norm == max(history.norms)


def test_training_records_every_step_and_leaves_the_random_state_alone():
    torch.manual_seed(99)
    state = torch.get_rng_state()
    epochs = []
    task = make_task("digits", epochs=2)
    history = train(task, *select(task, "unclipped"), on_epoch=lambda: epochs.append(None))
    num_steps = 2 * math.ceil(len(task.data.train_labels) / 32)
    assert len(history.losses) == len(history.norms) == len(history.step_seconds) == num_steps
    assert min(history.step_seconds) > 0
    assert len(epochs) == 2
    assert history.stats.clip_fraction == 0
    assert history.seconds > sum(history.step_seconds)
    assert torch.equal(torch.get_rng_state(), state)


def exploded_run(**options):
    values = [2.0, 1.0] * 10 + [0.0, 1e-30, 1e27, math.inf, math.nan]
    return History(
        Run("unclipped", without_clipping, math.inf, learns=False, has_nan="nan_step" in options),
        losses=values,
        norms=values,
        step_seconds=[1e-4] * len(values),
        stats=Stats(steps=25, clipped=0, skipped=2, consecutive_skips=0, largest_norm=1e27),
        train=Marks(loss=math.nan, value=0.11),
        test=Marks(loss=2.345, value=0.1),
        outcome="exploded at 22",
        **options,
    )


def test_table_of_an_explosion():
    console = log_console()
    console.print(runs_table([exploded_run()], "title", ACCURACY))
    end, steps = (line for line in console.file.getvalue().splitlines() if "unclipped" in line)
    assert end.split() == ["unclipped", "11.0%", "10.0%", "nan", "2.35", "exploded", "at", "22"]
    assert steps.split() == ["unclipped", "0%", "2", "1e+27", "2", "ms", "100", "us"]


def test_table_of_a_measure_that_is_a_loss_shows_it_once():
    console = log_console()
    bits = Measure("held-out text", "training text", "{:.1f} bits", is_loss=True)
    console.print(runs_table([exploded_run()], "title", bits))
    end = next(line for line in console.file.getvalue().splitlines() if "unclipped" in line)
    assert end.split() == ["unclipped", "0.1", "bits", "0.1", "bits", "exploded", "at", "22"]


def test_table_fits_a_terminal():
    console = Console(file=io.StringIO(), width=80)
    runs = runs_for(make_task("digits"))
    console.print(runs_table([replace(exploded_run(), run=run) for run in runs], "title", ACCURACY))
    table = console.file.getvalue()
    assert "…" not in table
    assert all(run.name in table for run in runs)


def test_plot_writes_a_png_and_no_global_setting(tmp_path):
    settings = dict(matplotlib.rcParams)
    path = tmp_path / "figure.png"
    plot_histories([exploded_run()], path, title="title", subtitle="setting", **TEN_CLASSES)
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert dict(matplotlib.rcParams) == settings


def plotted(monkeypatch, histories):
    """The grid of axes that would have been written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    plot_histories(histories, Path("figure.png"), title="", subtitle="", **TEN_CLASSES)
    return figures[0].axes


def test_plot_keeps_its_scale_and_marks_what_leaves_it(monkeypatch):
    loss_axes, norm_axes = plotted(monkeypatch, [exploded_run()])
    for axes in (loss_axes, norm_axes):
        bottom, top = axes.get_ylim()
        assert 1e-4 < bottom < top < 1e4
        (beyond,) = (line for line in axes.lines if line.get_label() == "beyond the axis or not finite")
        assert list(beyond.get_xdata()) == [22, 23, 24]
    assert "unclipped: learns nothing from step 22 on" in texts(loss_axes)


def test_running_median_falls_with_the_loss_also_when_steps_are_few():
    falling = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert running_median(falling).tolist() == falling.tolist()
    assert running_median(np.array([5.0, 9.0, 3.0, 2.0, 2.0])).tolist() == [5.0, 5.0, 3.0, 2.0, 2.0]
    steps = 100.0 - np.arange(60)
    assert running_median(steps).tolist() == steps.tolist()
    assert np.isnan(running_median(np.array([1.0, np.nan, np.nan, 2.0]))).tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_plot_marks_the_nan_batch_and_the_skipped_step_in_a_column_of_their_own(monkeypatch):
    spoiled = exploded_run(nan_step=12, skipped=[12])
    left_loss, right_loss, left_norm, right_norm = plotted(monkeypatch, [exploded_run(), spoiled])
    for axes, is_marked in ((left_loss, False), (left_norm, False), (right_loss, True), (right_norm, True)):
        assert any(list(line.get_xdata()) == [12, 12] for line in axes.lines) is is_marked
    assert "unclipped + NaN: skips step 12" in texts(right_norm)
    assert not any("skips" in text for text in texts(left_norm))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_demo_needs_no_pyplot():
    done = run_python("import sys, fastclip.demo; sys.exit('matplotlib.pyplot' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["PIL", "matplotlib", "optuna", "rich", "sklearn"])
def test_missing_extra_says_its_name(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["fastclip", "demo"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastclip\[demo\]'"):
        importlib.import_module("fastclip.demo")
