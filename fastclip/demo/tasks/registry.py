"""The tasks by name, each with the recipe at which it explodes unclipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from fastclip.demo.data import (
    ClassificationData,
    DataError,
    load_cifar10,
    load_digits,
    load_image_folder,
    load_mnist,
    load_text,
    load_texts,
)
from fastclip.demo.models import TEXT_NETWORKS, ImageModel
from fastclip.demo.tasks.base import Expectation, Measure, Recipe, Task
from fastclip.demo.tasks.images import image_task
from fastclip.demo.tasks.reading import TextTask
from fastclip.demo.tasks.texts import texts_task

NUM_TRAIN, NUM_TEST = 4000, 1000
"""Images or texts taken from a folder, so that the comparison takes minutes on two cores and not hours."""

NETWORKS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "three-conv",
        "cifar10": "four-conv",
        "imagefolder": "batch-norm",
        "mnist": "simple",
        "text": "recurrent",
    }
)
"""Task -> the network that it is shown with, unless another is named."""

BUILT_IN = ("digits", "charlm")
FROM_FOLDER = ("cifar10", "imagefolder", "mnist", "text")
WITH_FOREIGN_FILES = ("imagefolder", "text")
TASKS = (*BUILT_IN, *FROM_FOLDER)


@dataclass(frozen=True)
class Choices:
    """What of a task may be chosen; None leaves its own.

    Attributes:
        model: The network, one of `fastclip.demo.models.IMAGE_NETWORKS` for a task that sorts images, of
            `TEXT_NETWORKS` for one that sorts texts.
        size: Height and width to which images are resized; of `imagefolder`.
        skip_unreadable: Whether to leave out what is foreign or broken; of `imagefolder` and `text`.
    """

    model: str | None = None
    size: int | None = None
    skip_unreadable: bool = False


def make_task(
    name: str,
    folder: Path | None = None,
    *,
    seed: int = 0,
    epochs: int | None = None,
    choices: Choices | None = None,
) -> Task:
    """Return a task with its data read.

    Args:
        name: One of `TASKS`.
        folder: Where the data of the tasks `FROM_FOLDER` lies.
        seed: Seed of splits, samples, weights and order.
        epochs: Passes over the training data; None leaves the task's own number.
        choices: What else is not to be the task's own.

    Raises:
        DataError: the data is missing, truncated or of another kind, a folder is given to a task that brings
            its data, or a choice does not fit the task or its images.
        ValueError: an unknown name.
    """
    choices = choices or Choices()
    if name not in TASKS:
        raise ValueError(f"make_task: {name!r} is unknown; expected one of {', '.join(TASKS)}.")
    if name in BUILT_IN and folder is not None:
        raise DataError(
            f"make_task: a folder is given to {name}, which brings its data; expected none. The tasks "
            f"that read a folder are {', '.join(FROM_FOLDER)}."
        )
    if name in FROM_FOLDER and folder is None:
        raise DataError(f"make_task: {name} needs a folder to read. Name it by --data.")
    if choices.size is not None and name != "imagefolder":
        raise DataError(
            f"make_task: size={choices.size} is given to {name}; expected none. It is for imagefolder."
        )
    if choices.skip_unreadable and name not in WITH_FOREIGN_FILES:
        raise DataError(
            f"make_task: skip_unreadable is given to {name}, whose files are all needed; expected False. "
            f"It is for {' and '.join(WITH_FOREIGN_FILES)}."
        )
    if name == "charlm":
        if choices.model is not None:
            raise DataError(
                f"make_task: the model {choices.model} is given to charlm, which predicts characters; "
                f"expected none. The tasks that sort are {', '.join(NETWORKS)}."
            )
        task: Task = _charlm(seed)
    elif name == "text" and folder is not None:
        task = _texts(folder, seed, choices)
    else:
        task = _images(name, _load(name, folder, seed, choices), seed, choices.model)
    return task if epochs is None else replace(task, recipe=replace(task.recipe, epochs=epochs))


def _load(name: str, folder: Path | None, seed: int, choices: Choices) -> ClassificationData:
    if folder is None:
        return load_digits(seed=seed)
    if name == "cifar10":
        return load_cifar10(folder, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
    if name == "mnist":
        return load_mnist(folder, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
    sized = {} if choices.size is None else {"size": choices.size}
    return load_image_folder(
        folder,
        num_train=NUM_TRAIN,
        num_test=NUM_TEST,
        skip_unreadable=choices.skip_unreadable,
        seed=seed,
        **sized,
    )


def _images(name: str, data: ClassificationData, seed: int, network: str | None) -> Task:
    """Return the sorting of images by the task's own network or by another."""
    try:
        model = ImageModel(network or NETWORKS[name], data.image_shape, data.num_classes)
    except ValueError as error:
        larger = " Take another model, or larger images by --size." if name == "imagefolder" else ""
        raise DataError(f"make_task: {name}: {error}{larger}") from error
    recipe = Recipe(learning_rate=0.3, momentum=0.9, max_norm=0.25, batch_size=32, epochs=4, seed=seed)
    if name != "digits":
        return image_task(name, model, data, recipe)
    # Guessing gives 0.1. The clipped runs of its own network end near 0.97, up to the rounding of a machine.
    is_own = model.name == NETWORKS[name]
    expectation = Expectation(unclipped=0.2, clipped=0.93) if is_own else None
    task = image_task(name, model, data, replace(recipe, epochs=10), expectation)
    return replace(task, with_nan_batch=True)


def _texts(folder: Path, seed: int, choices: Choices) -> Task:
    """Return the sorting of texts of different length."""
    network = choices.model or NETWORKS["text"]
    if network not in TEXT_NETWORKS:
        raise DataError(
            f"make_task: the model {network} is given to text; expected one of "
            f"{', '.join(TEXT_NETWORKS)}. The others sort images."
        )
    data = load_texts(
        folder, num_train=NUM_TRAIN, num_test=NUM_TEST, skip_unreadable=choices.skip_unreadable, seed=seed
    )
    recipe = Recipe(learning_rate=1.0, momentum=0.9, max_norm=0.25, batch_size=32, epochs=4, seed=seed)
    return texts_task("text", network, data, recipe)


def _charlm(seed: int) -> Task:
    """Return the prediction of the next character by a recurrent network."""
    data = load_text()
    guessing_loss = math.log(len(data.alphabet))
    recipe = Recipe(learning_rate=5.0, momentum=0.0, max_norm=0.25, batch_size=20, epochs=1, seed=seed)
    return TextTask(
        name="charlm",
        title="Character RNN",
        recipe=recipe,
        measure=Measure("held-out text", "training text", "{:.2f} bits/char", is_loss=True),
        guessing_loss=guessing_loss,
        # Clipped it ends near 2.3 bits per character.
        expectation=Expectation(unclipped=guessing_loss / math.log(2), clipped=3.0),
        data=data,
    )
