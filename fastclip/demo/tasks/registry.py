"""The tasks by name, each with the recipe at which it explodes unclipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fastclip.demo.data import (
    DataError,
    load_cifar10,
    load_digits,
    load_image_folder,
    load_mnist,
    load_text,
)
from fastclip.demo.models import BatchNormCNN, DigitsCNN, FourConvCNN, SimpleNet
from fastclip.demo.tasks.base import Expectation, Measure, Recipe, Task
from fastclip.demo.tasks.images import image_task
from fastclip.demo.tasks.text import TextTask

NUM_TRAIN, NUM_TEST = 4000, 1000
"""Images taken from a folder, so that the comparison takes minutes on two cores and not hours."""


def digits(seed: int) -> Task:
    """Return the sorting of 8 x 8 digits."""
    recipe = Recipe(learning_rate=0.3, momentum=0.9, max_norm=0.25, batch_size=32, epochs=10, seed=seed)
    # Guessing gives 0.1. The clipped runs end near 0.97, give or take the rounding of a machine.
    expectation = Expectation(unclipped=0.2, clipped=0.93)
    task = image_task("digits", "Digits CNN", load_digits(seed=seed), DigitsCNN, recipe, expectation)
    return replace(task, with_nan_batch=True)


def charlm(seed: int) -> Task:
    """Return the prediction of the next character by a recurrent network."""
    data = load_text()
    guessing_loss = math.log(len(data.alphabet))
    recipe = Recipe(learning_rate=5.0, momentum=0.0, max_norm=0.25, batch_size=20, epochs=1, seed=seed)
    return TextTask(
        name="charlm",
        title="Character RNN",
        recipe=recipe,
        measure=Measure("held-out text", "{:.2f} bits/char", is_loss=True),
        guessing_loss=guessing_loss,
        # Clipped it ends near 2.3 bits per character.
        expectation=Expectation(unclipped=guessing_loss / math.log(2), clipped=3.0),
        data=data,
    )


def cifar10(folder: Path, seed: int) -> Task:
    """Return the sorting of CIFAR-10 by a network of four convolutions."""
    data = load_cifar10(folder, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
    return image_task("cifar10", "Four-convolution CNN", data, FourConvCNN, _image_recipe(seed))


def image_folder(folder: Path, seed: int) -> Task:
    """Return the sorting of the user's own images by a network with batch normalisation."""
    data = load_image_folder(folder, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
    return image_task("imagefolder", "BatchNorm CNN", data, BatchNormCNN, _image_recipe(seed))


def mnist(folder: Path, seed: int) -> Task:
    """Return the sorting of MNIST by a small network of linear layers."""
    data = load_mnist(folder, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
    return image_task("mnist", "SimpleNet", data, SimpleNet, _image_recipe(seed))


def _image_recipe(seed: int) -> Recipe:
    return Recipe(learning_rate=0.3, momentum=0.9, max_norm=0.25, batch_size=32, epochs=4, seed=seed)


BUILT_IN: Mapping[str, Callable[[int], Task]] = MappingProxyType({"digits": digits, "charlm": charlm})
FROM_FOLDER: Mapping[str, Callable[[Path, int], Task]] = MappingProxyType(
    {"cifar10": cifar10, "imagefolder": image_folder, "mnist": mnist}
)
TASKS = (*BUILT_IN, *FROM_FOLDER)


def make_task(name: str, folder: Path | None = None, *, seed: int = 0, epochs: int | None = None) -> Task:
    """Return a task with its data read.

    Args:
        name: One of `TASKS`.
        folder: Where the data of the tasks `FROM_FOLDER` lies.
        seed: Seed of splits, samples, weights and order.
        epochs: Passes over the training data; None leaves the task's own number.

    Raises:
        DataError: the data is missing, truncated or of another kind, or a folder is given to a task that
            brings its data.
        ValueError: an unknown name.
    """
    if name in BUILT_IN:
        if folder is not None:
            raise DataError(
                f"make_task: a folder is given to {name}, which brings its data; expected none. The tasks "
                f"that read a folder are {', '.join(FROM_FOLDER)}."
            )
        task = BUILT_IN[name](seed)
    elif name in FROM_FOLDER:
        if folder is None:
            raise DataError(f"make_task: {name} needs a folder to read. Name it by --data.")
        task = FROM_FOLDER[name](folder, seed)
    else:
        raise ValueError(f"make_task: {name!r} is unknown; expected one of {', '.join(TASKS)}.")
    return task if epochs is None else replace(task, recipe=replace(task.recipe, epochs=epochs))
