"""The demo: a network that explodes unclipped and learns clipped, and an exit code that notices."""

from __future__ import annotations

import importlib
import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import fastclip
from fastclip.bench.runner import torch_threads
from fastclip.demo import run
from fastclip.demo.plot import plot_histories
from fastclip.demo.report import runs_table
from fastclip.demo.rescue import rescue
from fastclip.demo.tasks import ACCURACY, make_task
from fastclip.demo.training import History, train

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEN_CLASSES = {"measure": ACCURACY, "guessing_loss": math.log(10)}


def measure_only(parameters, max_norm):
    """Stand in for a clipping function that clips nothing."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def digits_at(learning_rate, **options):
    task = make_task("digits", **options)
    return replace(task, recipe=replace(task.recipe, learning_rate=learning_rate))


def train_digits(*, clip=fastclip.clip_grad_norm_, max_norm=0.25, epochs=1, seed=0):
    return train(make_task("digits", epochs=epochs, seed=seed), clip=clip, max_norm=max_norm)


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


def test_demo_shows_backends_speed_and_rescue(tmp_path, capsys):
    output = tmp_path / "made" / "here"
    assert run(output, search=False) == 0
    assert (output / "digits.png").read_bytes().startswith(PNG_SIGNATURE)
    log = capsys.readouterr().out
    for backend in fastclip.backend_info():
        assert backend in log
    assert "ResNet-50" in log
    assert "clipped, it learns" in log
    for name in ("unclipped", "fastclip 0.25", "torch 0.25"):
        assert f"Trained {name}: test accuracy" in log
    assert "\x1b" not in log


def test_exit_code_is_that_of_the_rescue(tmp_path, monkeypatch):
    monkeypatch.setattr("fastclip.bench.run", lambda *args, **kwargs: None)
    monkeypatch.setattr("fastclip.bench.table.render", lambda results: "")
    assert run(tmp_path, epochs=1, search=False, clips={"idle": measure_only}) == 1


def test_rescue_fails_when_nothing_is_clipped(tmp_path):
    console = log_console()
    assert not rescue(console, tmp_path, make_task("digits", epochs=3), {"idle": measure_only})
    assert "idle 0.25 reached" in console.file.getvalue()


def test_rescue_fails_when_nothing_explodes(tmp_path):
    console = log_console()
    assert not rescue(console, tmp_path, digits_at(0.02, epochs=3), {"fastclip": measure_only})
    assert "unclipped reached" in console.file.getvalue()


def test_same_seed_same_run_other_seed_other_run():
    first, again, other = train_digits(), train_digits(), train_digits(seed=1)
    assert first.losses == again.losses
    assert first.norms == again.norms
    assert first.score == again.score
    assert first.losses != other.losses


def test_fastclip_and_torch_start_alike():
    ours, theirs = train_digits(), train_digits(clip=torch.nn.utils.clip_grad_norm_)
    assert ours.norms[:10] == pytest.approx(theirs.norms[:10], rel=1e-4)
    assert ours.losses[:10] == pytest.approx(theirs.losses[:10], rel=1e-4)


def test_training_records_every_step_and_leaves_the_random_state_alone():
    torch.manual_seed(99)
    state = torch.get_rng_state()
    epochs = []
    task = make_task("digits", epochs=2)
    history = train(
        task,
        clip=fastclip.clip_grad_norm_,
        max_norm=math.inf,
        on_epoch=lambda: epochs.append(None),
    )
    num_steps = 2 * math.ceil(len(task.data.train_labels) / 32)
    assert len(history.losses) == len(history.norms) == len(history.clip_seconds) == num_steps
    assert min(history.clip_seconds) > 0
    assert len(epochs) == 2
    assert history.clipped_share == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_history_of_an_explosion():
    history = History(
        max_norm=0.25,
        losses=[2.0, 1e27, math.inf, math.nan],
        norms=[0.2, 3.0, math.inf, math.nan],
        clip_seconds=[1e-4] * 4,
        score=0.1,
    )
    assert history.clipped_share == 0.5
    assert history.largest_norm == math.inf
    assert history.first_nonfinite_step == 2
    console = log_console()
    console.print(runs_table({"exploded": history}, "title", ACCURACY))
    assert "inf, not finite from step 2" in console.file.getvalue()


def exploded_run():
    values = [2.0, 1.0] * 10 + [0.0, 1e-30, 1e27, math.inf, math.nan]
    return History(
        max_norm=math.inf, losses=values, norms=values, clip_seconds=[1e-4] * len(values), score=0.1
    )


def test_plot_writes_a_png_and_no_global_setting(tmp_path):
    settings = dict(matplotlib.rcParams)
    path = tmp_path / "figure.png"
    plot_histories({"exploded": exploded_run()}, path, title="title", subtitle="setting", **TEN_CLASSES)
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert dict(matplotlib.rcParams) == settings


def test_plot_keeps_its_scale_and_marks_what_leaves_it(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    plot_histories(
        {"exploded": exploded_run()}, tmp_path / "figure.png", title="", subtitle="", **TEN_CLASSES
    )
    for axes in figures[0].axes:
        bottom, top = axes.get_ylim()
        assert 1e-4 < bottom < top < 1e4
        (beyond,) = (line for line in axes.lines if line.get_label() == "beyond the axis or not finite")
        assert list(beyond.get_xdata()) == [22, 23, 24]
    assert "exploded: learns nothing from step 22 on" in [
        text.get_text() for text in figures[0].axes[0].texts
    ]


def test_demo_needs_no_pyplot():
    code = "import sys, fastclip.demo; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(fastclip.__file__).parent.parent)


@pytest.mark.parametrize("package", ["PIL", "matplotlib", "optuna", "rich", "sklearn"])
def test_missing_extra_says_its_name(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["fastclip", "demo"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastclip\[demo\]'"):
        importlib.import_module("fastclip.demo")
