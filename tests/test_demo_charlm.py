"""The demo's character language model: how its text is read, and that only clipping lets it learn."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from fastclip.bench.runner import torch_threads
from fastclip.demo.data import load_text
from fastclip.demo.models import CharRNN
from fastclip.demo.rescue import rescue
from fastclip.demo.runs import runs_for
from fastclip.demo.tasks import make_task


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def log_console():
    return Console(file=io.StringIO(), width=200)


def test_charlm_explodes_unclipped_and_learns_clipped(tmp_path):
    console = log_console()
    task = replace(make_task("charlm"), data=load_text(200_000))
    runs = [run for run in runs_for(task) if run.clipper != "torch"]
    assert rescue(console, tmp_path, task, runs), console.file.getvalue()
    assert (tmp_path / "charlm.png").stat().st_size > 0
    assert "bits/char" in console.file.getvalue()


def test_charlm_fails_when_nothing_is_clipped(tmp_path):
    console = log_console()
    task = replace(make_task("charlm"), data=load_text(40_000))
    unclipped, clipped = runs_for(task)[:2]
    assert not rescue(
        console, tmp_path, task, [replace(clipped, make=lambda sgd, _: unclipped.make(sgd, math.inf))]
    )
    assert "fastclip 0.25 reached" in console.file.getvalue()


def test_bits_of_a_network_that_guesses():
    task = make_task("charlm")
    model = task.make_model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    marks = task.judge(model, "test")
    assert marks.value == pytest.approx(task.guessing_loss / math.log(2), rel=1e-5)
    assert marks.loss == pytest.approx(task.guessing_loss, rel=1e-5)
    assert task.judge(model, "train").value == pytest.approx(marks.value)
    assert task.is_guess(marks)
    assert task.guessing_loss == pytest.approx(math.log(len(task.data.alphabet)))


def test_text_is_read_in_columns_without_a_gap():
    task = make_task("charlm")
    seen = []

    class Spy(CharRNN):
        def read_on(self, characters, state):
            seen.append((characters, state is None))
            return super().read_on(characters, state)

    losses = task.losses(Spy(len(task.data.alphabet)), torch.Generator())
    for _ in range(3):
        next(losses)
    stretches, is_first = zip(*seen, strict=True)
    assert is_first == (True, False, False)
    columns = torch.cat(stretches, dim=1)
    assert columns.shape == (20, 3 * 35)
    length = len(task.data.train) // 20
    assert torch.equal(columns[0], task.data.train[:105])
    assert torch.equal(columns[7], task.data.train[7 * length : 7 * length + 105])


def test_the_loss_of_a_stretch_is_that_of_its_next_characters():
    task = make_task("charlm")
    torch.manual_seed(0)
    model = task.make_model()
    columns = task.data.train[: len(task.data.train) // 20 * 20].view(20, -1)
    expected = F.cross_entropy(model(columns[:, :35]).flatten(0, 1), columns[:, 1:36].flatten())
    torch.testing.assert_close(next(task.losses(model, torch.Generator())), expected)
