"""Study files that name the demo's data and networks: own images, CIFAR-10, MNIST, texts."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_demo_cifar10 import CIFAR_NAMES, cifar_records
from test_demo_data import write_mnist
from test_demo_image_folder import write_image
from test_demo_texts import write
from tuner_cli_cases import invoke

from fastclip.demo.models import ImageModel, TextModel
from fastclip.tuner import TunerCV
from fastclip.tuner.config import build, read_config
from fastclip.tuner.errors import ConfigError

STUDY = """
[study]
n_trials = 2
max_epochs = {epochs}
[model]
name = "{model}"
[data]
kind = "{kind}"
path = "{path}"
{more}
[cv]
folds = 2
[space]
lr = 0.1
optimizer = {{ choices = ["sgd", "adam"] }}
"""


@pytest.fixture
def study(tmp_path):
    """Writes a study file."""

    def write_study(kind, path, model, more="", epochs=1):
        file = tmp_path / "study.toml"
        file.write_text(STUDY.format(kind=kind, path=path, model=model, more=more, epochs=epochs))
        return file

    return write_study


@pytest.fixture
def photos(tmp_path):
    """Ten dark and ten light images, one of each to be held out in ten; and one that is none."""
    for number in range(10):
        write_image(tmp_path / "photos" / "dark" / f"{number}.png", (number, 0, 0))
        write_image(tmp_path / "photos" / "light" / f"{number}.png", (255 - number, 255, 255))
    (tmp_path / "photos" / "light" / "Thumbs.db").write_bytes(b"x")
    return tmp_path / "photos"


def test_own_images_are_searched_refitted_and_tested_by_class_names(study, photos, tmp_path):
    file = study("imagefolder", photos, "four-conv", "size = 16\nskip_unreadable = true", epochs=4)
    skipped = f"left out of the data: 1\n  {photos / 'light' / 'Thumbs.db'} (no image that Pillow knows)"
    checked = invoke("validate", file)
    assert checked.exit_code == 0, checked.output
    assert "16 samples and 4 set apart, 2 folds" in checked.output
    assert skipped in checked.output
    log = invoke("run", file, "-o", tmp_path / "run").output
    assert skipped in log
    assert re.search(
        r"on 4 samples set apart: .*accuracy [\d.]+, .*recall_dark [\d.]+, recall_light [\d.]+", log
    )
    experiment = build(read_config(file))
    assert isinstance(experiment.tuner.model_init, ImageModel)
    assert experiment.tuner.model_init.image_shape == (3, 16, 16)
    experiment.tuner.fit(experiment.data)
    assert experiment.tuner.score(experiment.test) == 1.0
    assert set(experiment.tuner.predict(experiment.test)) == {"dark", "light"}


def test_own_images_that_are_none_are_named(study, photos):
    result = invoke("validate", study("imagefolder", photos, "four-conv"))
    assert result.exit_code == 1
    assert "[data]: load_image_folder: " in result.output
    assert "Thumbs.db (no image that Pillow knows); expected images only." in result.output


def test_cifar_and_mnist(study, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in CIFAR_NAMES:
        cifar_records([0, 1, 9, 9]).tofile(folder / name)
    experiment = build(read_config(study("cifar10", tmp_path, "batch-norm", "num_train = 12\nseed = 1")))
    assert (len(experiment.data[1]), len(experiment.test)) == (12, 4)
    assert set(experiment.data[1]) == {"airplane", "automobile", "truck"}
    assert experiment.tuner.model_init == ImageModel(
        "batch-norm", (3, 32, 32), 3
    )  # of the classes that occur
    write_mnist(tmp_path / "mnist", num_train=40, num_test=10)
    experiment = build(read_config(study("mnist", tmp_path / "mnist", "simple")))
    assert experiment.tuner.model_init == ImageModel("simple", (1, 28, 29), 10)
    assert len(experiment.test) == 10


def test_digits_need_no_folder_and_a_test_section_replaces_their_test_part(study):
    file = study("digits", "", "three-conv")
    file.write_text(file.read_text().replace('path = ""', ""))
    assert len(build(read_config(file)).test) == 360
    assert len(build(read_config(file, ["test.size=0.5"])).test) == 719  # of 1437
    assert build(read_config(file, ["study.refit=false"])).test is None


def test_a_network_is_named_for_images_of_a_source_too(study):
    file = study("digits", "", "deep-mlp")
    text = re.sub(r"kind = .*\npath = .*\n", 'source = "test_demo_studies:images"\n', file.read_text())
    file.write_text(text)
    assert build(read_config(file)).tuner.model_init == ImageModel("deep-mlp", (2, 5, 6), 3)


@pytest.mark.parametrize("package", ["PIL", "matplotlib"])
def test_a_missing_extra_says_its_name(study, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["fastclip", "demo"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"\[data\] kind = .* pip install 'fastclip\[demo\]'"):
        build(read_config(study("digits", "", "four-conv")))


def images():
    return np.zeros((9, 2, 5, 6), np.float32), np.arange(9) % 3


def numbers():
    return np.zeros((9, 2, 5, 6), np.float32), np.linspace(0, 1, 9)


@pytest.fixture
def reviews(tmp_path):
    """Thirty texts of each class, of one word to nine, told apart by one word that comes last."""
    for number in range(30):
        filler = "well " * (number % 8)
        write(
            tmp_path / "reviews",
            {f"bad/{number}.txt": f"{filler} awful", f"good/{number}.txt": f"{filler} lovely"},
        )
    return tmp_path / "reviews"


@pytest.mark.parametrize(("model", "n_jobs"), [("embedding-bag", 1), ("recurrent", 2)])
def test_texts_of_different_length_are_searched_from_end_to_end(study, reviews, tmp_path, model, n_jobs):
    file = study("text", reviews, model, epochs=8)
    sets = ("lr=0.01", 'optimizer="adam"', "max_norm=1.0", "batch_size=8")
    overrides = [word for override in sets for word in ("--set", override)]
    checked = invoke("validate", file, *overrides)
    assert checked.exit_code == 0, checked.output
    assert "48 samples and 12 set apart, 2 folds" in checked.output
    log = invoke("run", file, "-o", tmp_path / "run", *overrides).output
    assert re.search(r"on 12 samples set apart: .*accuracy 1, ", log), log
    experiment = build(read_config(file, sets))
    assert isinstance(experiment.tuner.model_init, TextModel)
    experiment.tuner.set_params(n_jobs=n_jobs).fit(experiment.data)  # processes get texts and collate_fn, too
    assert experiment.tuner.score(experiment.test) == 1.0
    assert set(experiment.tuner.predict(experiment.test)) == {"bad", "good"}
    assert experiment.tuner.predict_proba(experiment.test).shape == (12, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.kind=images"],
            r"'images' is no kind of \[data\]; expected one of digits, mnist, cifar10, imagef",
        ),
        (["data.sise=64"], r"'sise' is no key of \[data\] with kind = 'imagefolder'; .* Did you mean size\?"),
        (["data.size=0"], r"\[data\]: load_image_folder: size=0; expected a whole number of at least 1"),
        (["data.path=nowhere"], r"\[data\]: load_image_folder: nowhere is not a folder"),
        (
            ["model.name=resnet"],
            r"'resnet' is unknown; expected one of three-conv, .* for texts, or a factory",
        ),
        (
            ["model.name=recurrent"],
            "recurrent sorts texts, and the data is of another kind; expected that of kind",
        ),
        (
            ["data.size=4", "model.name=batch-norm"],
            r"\[model\]: BatchNormCNN: images of 4 x 4 pixels vanish in 3",
        ),
        (["model.factory=tuner_cases:mlp"], r"\[model\] has both factory and name; expected"),
        (["data.source=tuner_cases:blobs"], r"\[data\] has both source and kind; expected"),
    ],
)
def test_a_mistake_is_named(study, photos, overrides, message):
    file = study("imagefolder", photos, "four-conv", "skip_unreadable = true")
    with pytest.raises(ConfigError, match=message):
        build(read_config(file, overrides))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "tuner_cases:blobs",
            r"four-conv sorts images, and the inputs are torch\.float32 of shape \('n', 4\)",
        ),
        ("test_demo_studies:numbers", r"four-conv sorts into classes, and the targets are torch\.float32"),
    ],
)
def test_data_that_no_named_network_sorts_is_named(study, source, message):
    file = study("digits", "", "four-conv")
    file.write_text(re.sub(r"kind = .*\npath = .*\n", f'source = "{source}"\n', file.read_text()))
    with pytest.raises(ConfigError, match=message):
        build(read_config(file))


def blocks_of_the_page(pattern):
    page = (Path(__file__).parent.parent / "docs" / "tuning.md").read_text(encoding="utf-8")
    return re.findall(rf"^```\w+\n(# {pattern}\n.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_study_of_photos_in_the_docs_is_valid(photos, tmp_path, monkeypatch):
    (text,) = blocks_of_the_page(r"photos\.toml")
    (tmp_path / "photos.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    result = invoke("validate", "photos.toml")
    assert result.exit_code == 0, result.output
    assert "16 samples and 4 set apart, 3 folds, 16 trials of at most 5 epochs" in result.output


def test_the_texts_of_the_docs_are_learned_and_predicted(tmp_path, monkeypatch):
    (text,) = blocks_of_the_page(r"my_texts\.py")
    (tmp_path / "my_texts.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    my_texts = importlib.import_module("my_texts")
    space = {"lr": [0.1, 0.3], "max_norm": 1.0}
    search = TunerCV(my_texts.make_model, space, sampler="grid", n_trials=None, cv=3, max_epochs=10)
    search.fit(my_texts.load())
    assert search.best_score_ == 1.0
    assert search.score(my_texts.load()) == 1.0
    assert search.predict(my_texts.load()).tolist() == [1, 1, 0, 0] * 12
    assert search.outputs(my_texts.load()).shape == (48, 2)
