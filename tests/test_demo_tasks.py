"""The demo's tasks: what they train on, how they are judged, and that clipping decides how they end."""

from __future__ import annotations

import importlib
import io
import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from test_demo_cifar10 import CIFAR_NAMES
from test_demo_data import idx
from torch.nn import functional as F

from fastclip.bench.runner import torch_threads
from fastclip.demo import run
from fastclip.demo.data import DataError
from fastclip.demo.models import (
    IMAGE_NETWORKS,
    TEXT_NETWORKS,
    BatchNormCNN,
    FourConvCNN,
    Recurrent,
    SimpleNet,
)
from fastclip.demo.rescue import rescue
from fastclip.demo.runs import runs_for
from fastclip.demo.search import search, search_folder
from fastclip.demo.tasks import FROM_FOLDER, TASKS, Choices, Measure, make_task

NETWORKS = {"cifar10": FourConvCNN, "imagefolder": BatchNormCNN, "mnist": SimpleNet, "text": Recurrent}


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def log_console():
    return Console(file=io.StringIO(), width=200)


def digit_images(count, size):
    """The first of scikit-learn's digits, enlarged, as bytes."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels[:count].reshape(-1, 1, 8, 8)) * 15
    return F.interpolate(images, size=(size, size), mode="bilinear").byte().numpy(), labels[:count]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of small files in the format of each task."""
    made = {name: tmp_path_factory.mktemp(name) for name in FROM_FOLDER}
    images, labels = digit_images(180, 32)
    records = np.column_stack([labels.astype(np.uint8), images.repeat(3, axis=1).reshape(180, -1)])
    for name, part in zip(CIFAR_NAMES, np.split(records, 6), strict=True):
        part.tofile(made["cifar10"] / name)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (made["imagefolder"] / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(made["imagefolder"] / str(label) / f"{number}.png")
    images, labels = digit_images(180, 28)
    for name, rows in (("train", slice(150)), ("t10k", slice(150, None))):
        (made["mnist"] / f"{name}-images-idx3-ubyte").write_bytes(idx(images[rows, 0]))
        (made["mnist"] / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[rows]))
    for label in range(10):
        lines = [f"{'so ' * (number % 7)} word{label}" for number in range(18)]
        (made["text"] / f"{label}.txt").write_text("\n".join(lines))
    return made


@pytest.mark.parametrize("name", FROM_FOLDER)
def test_data_from_a_folder_is_trained_on_and_judged_by_guessing(name, folders, tmp_path):
    task = make_task(name, folders[name], epochs=1)
    assert isinstance(task.make_model(), NETWORKS[name])
    console = log_console()
    assert rescue(console, tmp_path, task, runs_for(task))
    assert (tmp_path / f"{name}.png").stat().st_size > 0
    log = console.file.getvalue()
    assert "Test accuracy: unclipped " in log
    assert re.search(r"fastclip 0\.25 [\d.]+% \((learned|guesses|exploded( at \d+)?)\)", log)
    assert re.search(r"Guessing reaches 1\d\.\d%, the share of the largest class\.", log)
    assert re.search(
        r"^(Rescued|Better clipped|Nothing to rescue|Not rescued|Clipped too low): .*the network .*\.$",
        log,
        re.MULTILINE,
    )


def test_every_image_is_seen_once_in_an_epoch():
    task = make_task("digits")
    sizes, is_training = [], []

    class Spy(torch.nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            is_training.append(self.training)
            return torch.zeros(len(images), 10)

    model = Spy().eval()
    losses = list(task.losses(model, torch.Generator()))
    assert sum(sizes) == len(task.data.train_labels)
    assert set(sizes[:-1]) == {32}
    assert losses[0] == pytest.approx(task.guessing_loss)
    assert all(is_training)
    marks = task.judge(model, "test")
    assert marks.value == pytest.approx(0.1, abs=0.02)
    assert marks.loss == pytest.approx(task.guessing_loss)
    assert marks.recall == pytest.approx(0.1)
    assert task.is_guess(marks)
    assert not is_training[-1]


def test_a_measure_never_takes_nan_for_good():
    accuracy, bits = (
        Measure("accuracy", "train accuracy", "{:.0%}"),
        Measure("bits", "train bits", "{:.1f} bits", is_loss=True),
    )
    assert accuracy.is_at_least(0.9, 0.9)
    assert not accuracy.is_at_least(0.8, 0.9)
    assert bits.is_at_least(2.0, 2.5)
    assert not bits.is_at_least(3.0, 2.5)
    assert not accuracy.is_at_least(math.nan, 0.9)
    assert not bits.is_at_least(math.nan, 2.5)
    assert (accuracy.show(0.5), bits.show(2.25)) == ("50%", "2.2 bits")


def test_unknown_task_lists_the_tasks():
    with pytest.raises(ValueError, match=", ".join(TASKS)):
        make_task("imagenet")


def test_epochs_replace_those_of_the_recipe():
    assert make_task("digits").recipe.epochs == 10
    assert make_task("digits", epochs=3).recipe.epochs == 3


def test_search_finds_parameters_tests_them_and_can_be_repeated(tmp_path):
    task = make_task("digits")
    folder = search_folder(tmp_path, task)
    folder.mkdir()
    (folder / "trials.csv").write_text("of an earlier run")
    console = log_console()
    assert not search(console, tmp_path, task, n_trials=2, max_epochs=1, n_jobs=1)
    log = console.file.getvalue()
    assert "Searching: 2 trials of 3 folds of 1 epochs, at most about 1 min" in log
    assert "Best of 2 trials" in log
    assert re.search(
        r"train accuracy \S+%, test accuracy \S+%, train loss \S+, test loss \S+, expected at least 93%", log
    )
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert len((folder / "trials.csv").read_text().splitlines()) == 3


def test_search_on_own_images_is_judged_by_guessing(folders, tmp_path):
    task = make_task("imagefolder", folders["imagefolder"], choices=Choices(model="simple", size=8))
    console = log_console()
    assert search(console, tmp_path, task, n_trials=2, max_epochs=1, n_jobs=1)
    log = console.file.getvalue()
    assert re.search(
        r"test loss \S+; (no )?better than guessing, 1\d\.\d%, the share of the largest class\.", log
    )
    assert "</html>" in (tmp_path / "imagefolder-search" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("is_found", "code"), [(True, 0), (False, 1)])
def test_exit_code_is_that_of_the_search_too(monkeypatch, tmp_path, is_found, code):
    monkeypatch.setattr("fastclip.bench.run", lambda *args, **kwargs: None)
    monkeypatch.setattr("fastclip.bench.table.render", lambda results: "")
    module = importlib.import_module("fastclip.demo.run")  # the name in the package is the function
    monkeypatch.setattr(module, "rescue", lambda *args: True)
    monkeypatch.setattr(module, "search_task", lambda *args, **kwargs: is_found)
    assert run(tmp_path) == code
    assert run(tmp_path, search=False) == 0
    assert run(tmp_path, task="charlm") == 0


@pytest.mark.parametrize(
    ("name", "network"),
    [
        *itertools.product(["digits", "cifar10", "imagefolder", "mnist"], IMAGE_NETWORKS),
        *itertools.product(["text"], TEXT_NETWORKS),
    ],
)
def test_every_network_is_shown_with_all_data_of_its_kind(name, network, folders):
    task = make_task(name, folders.get(name), epochs=1, choices=Choices(model=network))
    model = task.make_model()
    assert isinstance(model, {**IMAGE_NETWORKS, **TEXT_NETWORKS}[network].make)
    loss = next(task.losses(model, torch.Generator().manual_seed(0)))
    assert loss.item() == pytest.approx(math.log(10), rel=0.5)
    assert (task.expectation is not None) is (name == "digits" and network == "three-conv")


def test_a_network_that_does_not_fit_is_said_in_one_sentence(folders):
    with pytest.raises(DataError, match=r"vanish in 3 poolings; expected at least 8 x 8\. .* by --size\."):
        make_task("imagefolder", folders["imagefolder"], choices=Choices(size=4))
    with pytest.raises(DataError, match=r"'recurrent' is unknown; expected one of three-conv, four-conv, "):
        make_task("digits", choices=Choices(model="recurrent"))
    with pytest.raises(
        DataError, match=r"four-conv is given to text; expected one of embedding-bag, recurrent\."
    ):
        make_task("text", folders["text"], choices=Choices(model="four-conv"))
    with pytest.raises(DataError, match=r"'resnet' is unknown; expected one of three-conv, four-conv, "):
        make_task("digits", choices=Choices(model="resnet"))


def test_texts_are_filled_up_and_searched_by_class_names(folders, tmp_path):
    task = make_task("text", folders["text"], choices=Choices(model="embedding-bag"))
    rows = torch.arange(len(task.labels("train")))
    tokens = task.inputs("train", rows)
    assert tokens.shape == (144, 7)
    lengths = [len(text) for text, _ in (task.data.train[row] for row in range(144))]
    assert (tokens != 0).sum(dim=1).tolist() == lengths
    assert [str(label) for label in task.labels("train").tolist()] == task.data.train.targets
    console = log_console()
    assert search(console, tmp_path, task, n_trials=2, max_epochs=1, n_jobs=1)
    assert "better than guessing, 11.1%, the share of the largest class." in console.file.getvalue()


def test_train_and_test_are_judged_apart(folders):
    task = make_task("mnist", folders["mnist"])
    inputs, labels = task.data.train_inputs, task.data.train_labels

    class ByHeart(torch.nn.Module):
        """Knows the images to train on, and takes all others for class 0."""

        def forward(self, images):
            known = (images[:, None] == inputs[None]).flatten(2).all(dim=2)
            answers = torch.where(known.any(1), labels[known.int().argmax(1)], 0)
            return 9.0 * F.one_hot(answers, 10)

    train, test = (task.judge(ByHeart(), part) for part in ("train", "test"))
    assert (train.value, train.recall) == (1.0, 1.0)
    assert train.loss == pytest.approx(
        math.log1p(9 * math.exp(-9.0)), abs=2**-22
    )  # near 9 a float32 has that
    assert test.value == pytest.approx((task.data.test_labels == 0).double().mean().item())
    assert test.recall == pytest.approx(1 / len(task.data.test_labels.unique()))


def test_what_was_left_out_is_listed(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastclip.bench.run", lambda *args, **kwargs: None)
    monkeypatch.setattr("fastclip.bench.table.render", lambda results: "")
    monkeypatch.setattr(importlib.import_module("fastclip.demo.run"), "rescue", lambda *args: True)
    photos = shutil.copytree(folders["imagefolder"], tmp_path / "photos")
    (photos / "3" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 unreadable entry: .*Thumbs"):
        run(tmp_path / "out", task="imagefolder", data=photos)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", task="imagefolder", data=photos, skip_unreadable=True) == 0
    sentence = f"{photos / '3' / 'Thumbs.db'} (no image that Pillow knows)"
    assert (tmp_path / "out" / "skipped.txt").read_text() == f"{sentence}\n"
    assert f"Left out 1 unreadable entry: {sentence}. All of them: " in capsys.readouterr().out
